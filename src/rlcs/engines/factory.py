"""The engine that is asked for, opened once and closed in the end: of a run, or of a model that is read."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rlcs.engines.base import Answered, Engine, ask
from rlcs.engines.local import LocalEngine
from rlcs.engines.vllm.colocated import Colocated
from rlcs.engines.vllm.engine import VllmEngine
from rlcs.engines.vllm.fleet import Fleet
from rlcs.engines.vllm.server import Launch, context_length
from rlcs.engines.vllm.weights import Unchanged, WeightsFolder
from rlcs.errors import UserError
from rlcs.model import loading
from rlcs.model.chat import Chat
from rlcs.model.vlm import Vlm
from rlcs.recipe.rollout import Rollouts, Sampler
from rlcs.recipe.schema import Eval, Images, Model, Prompts, Recipe
from rlcs.recipe.stages import Grpo
from rlcs.records import Problem, Sampling

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
    published = WeightsFolder(weights_place(recipe, folder), as_adapters=recipe.samples_by_adapters)
    if unchanged is not None:
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


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A model that answers and never learns; ask some `at_once` answers a time of it."""

    chat: Chat
    engine: Engine
    sampling: Sampling
    at_once: int

    def ask(self, problems: Sequence[Problem], *, step: int = 0) -> list[Answered]:
        """What it says to each problem, in their order."""
        return ask(self.engine, self.chat, problems, self.sampling, step=step)


@contextmanager
def open_reader(
    name: str, sampler: Sampler, how: Eval, *, system: str | None, seed: int, logs: Path, n: int = 1
) -> Iterator[Reader]:
    """A model (folder, hub id, `builtin`) with its own pixel bounds and its own context length.

    By vLLM it is served as it lies there: nothing of its weights is loaded here or written anew. A problem
    gets `n` answers, drawn by `seed`; `how.max_rows` are under way at once, in each server. `logs` is for
    the servers' logs. Raises ModelError, UserError.
    """
    rows, longest, local = how.max_rows, how.max_new_tokens, sampler.engine == "local"
    vlm = loading.load(Model(name=name), weights=local)
    size = vlm.processor.image_processor.size
    own = int(vlm.model.config.get_text_config().max_position_embeddings)
    context = context_length(sampler, own) or own
    recipe = Recipe(
        prompt=Prompts(system=system, max_tokens=max(1, context - longest)),
        images=Images(min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]),
        grpo=Grpo(max_new_tokens=longest, max_rows=rows),
        eval=how,
        rollout=Rollouts.model_validate(sampler.model_dump() | {"concurrency": max(1, rows // n)}),
    )
    chat = loading.make_chat(vlm, recipe.prompt, recipe.images)
    drawn = how.model_dump(include={"temperature", "top_p", "max_new_tokens"})
    sampling = chat.sampling(n=n, seed=seed, **drawn)
    # Two prompts for each place in vLLM, so that a long answer does not leave the others empty.
    at_once = rows if local else 2 * rows * sampler.servers
    with open_engines(recipe, logs, unchanged=loading.resolve(name)) as make:
        yield Reader(chat=chat, engine=make(vlm, chat, rows), sampling=sampling, at_once=at_once)
