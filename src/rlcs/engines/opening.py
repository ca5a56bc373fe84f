"""The engine that a recipe asks for, opened once a run and closed with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlcs.chat import Chat
from rlcs.engines.base import Engine
from rlcs.engines.local import LocalEngine
from rlcs.engines.vllm import VllmEngine
from rlcs.engines.vllm_colocated import Colocated
from rlcs.engines.vllm_fleet import Fleet
from rlcs.engines.vllm_server import Launch
from rlcs.engines.weights import Unchanged, WeightsFolder
from rlcs.errors import UserError
from rlcs.models import Vlm
from rlcs.recipe.schema import Recipe

MakeEngine = Callable[[Vlm, Chat, int], Engine]
"""An engine that samples from a model in a chat format, so many rollouts at once."""


@contextmanager
def open_engines(recipe: Recipe, folder: Path, *, unchanged: str | None = None) -> Iterator[MakeEngine]:
    """Engines of one run, which share its vLLM servers; `folder` is for their logs and weights.

    vLLM starts with the first question and ends with the context. `unchanged` is a folder or hub id of a
    model that nobody trains, which vLLM then reads for itself.
    """
    settings = recipe.rollout
    backend: Fleet | Colocated | None = None
    bounds: dict[str, int] = {}
    elsewhere = settings.weights_folder
    published: WeightsFolder | Unchanged
    if unchanged is None:
        published = WeightsFolder(folder / "weights" if elsewhere is None else Path(elsewhere))
    else:
        published = Unchanged(unchanged)

    def make(vlm: Vlm, chat: Chat, max_rows: int) -> Engine:
        nonlocal backend, bounds
        if settings.engine == "local":
            return LocalEngine(vlm, chat, max_rows=max_rows)
        if backend is not None and bounds != dict(vlm.processor.image_processor.size):
            backend.close()  # vLLM resizes images as it was told when it started
            backend = None
        if backend is None:
            bounds = dict(vlm.processor.image_processor.size)
            launch = launch_of(recipe, vlm)
            if settings.engine == "vllm_colocated":
                if vlm.mesh.grouped:
                    raise UserError(
                        "vLLM inside a training process works with one process only",
                        where="rollout.engine=vllm_colocated",
                        fix="use rollout.engine=vllm_server with torchrun",
                    )
                backend = Colocated(launch, sleeps=unchanged is None)
            else:
                backend = Fleet(settings, logs=folder, launch=None if settings.urls else launch)
        return VllmEngine(backend, published, vlm, chat, decode_limit=recipe.images.decode_limit)

    try:
        yield make
    finally:
        if backend is not None:
            backend.close()


def launch_of(recipe: Recipe, vlm: Vlm) -> Launch:
    """How vLLM is started for a recipe: room for its longest prompt and answer, in its computing dtype."""
    grpo, computes = recipe.grpo, recipe.parallel.compute_dtype
    own = str(vlm.model.dtype).removeprefix("torch.")
    return Launch(
        settings=recipe.rollout,
        dtype=own if computes == "same" or not vlm.mesh.grouped else computes,
        max_tokens=recipe.prompt.max_tokens + max(grpo.max_new_tokens, recipe.eval.max_new_tokens),
        max_rows=max(grpo.max_rows, grpo.group_size),
        on_cpu=vlm.device.type == "cpu",
    )
