"""Opens the engine that a recipe names, and closes it in the end."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rlcs.engines.base import Engine
from rlcs.engines.local import LocalEngine
from rlcs.engines.vllm.colocated import Colocated
from rlcs.engines.vllm.engine import VllmEngine
from rlcs.engines.vllm.fleet import Fleet
from rlcs.engines.vllm.server import Launch
from rlcs.engines.vllm.weights import Unchanged, WeightsFolder
from rlcs.errors import UserError
from rlcs.model.chat import Chat
from rlcs.model.loading import Vlm
from rlcs.recipe.schema import Recipe

MakeEngine = Callable[[Vlm, Chat, int], Engine]
"""An engine that samples from a model in a chat format, so many rollouts at once."""


@contextmanager
def open_engines(recipe: Recipe, folder: Path, *, unchanged: str | None = None) -> Iterator[MakeEngine]:
    """Engines of one run, which share its vLLM servers; `folder` is for their logs and weights.

    vLLM starts with the first question and ends with the context. `unchanged` is a folder or hub id of a
    model that does not train, which vLLM then reads for itself.
    """
    settings = recipe.rollout
    backend: Fleet | Colocated | None = None
    bounds: dict[str, int] = {}
    published = WeightsFolder(weights_place(recipe, folder), as_adapters=recipe.samples_by_adapters)
    if unchanged is not None:
        published = Unchanged(unchanged)

    def make(vlm: Vlm, chat: Chat, max_rows: int) -> Engine:
        nonlocal backend, bounds
        if settings.engine == "local":
            return LocalEngine(vlm, chat, max_rows=max_rows)
        if backend is not None and bounds != dict(vlm.processor.image_processor.size):
            backend.close()  # the bounds to which vLLM resizes images are fixed when it starts
            backend = None
        if backend is None:
            bounds = dict(vlm.processor.image_processor.size)
            launch = launch_of(recipe, vlm)
            if settings.engine == "vllm_colocated":
                if torch.distributed.is_initialized():
                    raise UserError(
                        "vLLM inside a training process works with one process only",
                        where="rollout.engine=vllm_colocated",
                        fix="use rollout.engine=vllm_server with torchrun",
                    )
                backend = Colocated(launch, sleeps=unchanged is None)
            else:
                backend = Fleet(settings, logs=folder, launch=launch)
        return VllmEngine(backend, published, vlm, chat, decode_limit=recipe.images.decode_limit)

    try:
        yield make
    finally:
        if backend is not None:
            backend.close()
        published.remove()


def weights_place(recipe: Recipe, folder: Path) -> Path:
    """Where the weights of a run go whose `folder` this is; `rollout.weights_folder` may be many runs'."""
    elsewhere = recipe.rollout.weights_folder
    if elsewhere is None:
        return folder / "weights"
    mark = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:8]
    return Path(elsewhere) / f"{recipe.name}-{mark}"


def launch_of(recipe: Recipe, vlm: Vlm) -> Launch:
    """How vLLM is started for a recipe: room for its longest prompt and answer, in its computing dtype."""
    grpo, computes = recipe.grpo, recipe.parallel.compute_dtype
    own = str(vlm.model.dtype).removeprefix("torch.")
    return Launch(
        settings=recipe.rollout,
        dtype=own if computes == "same" or not vlm.world.grouped else computes,
        max_tokens=recipe.prompt.max_tokens + max(grpo.max_new_tokens, recipe.eval.max_new_tokens),
        max_rows=max(grpo.max_rows, grpo.group_size),
        on_cpu=vlm.device.type == "cpu",
        adapter_rank=recipe.lora.rank if recipe.samples_by_adapters else 0,
    )
