"""A model that answers and never learns: what is measured, or teaches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rlcs import models
from rlcs.chat import Chat
from rlcs.engines.base import Engine
from rlcs.engines.opening import open_engines
from rlcs.errors import UserError
from rlcs.recipe.rollout import Rollouts, Sampler
from rlcs.recipe.schema import Eval, Grpo, Images, Model, Prompts, Recipe


@dataclass(frozen=True, kw_only=True)
class Reader:
    """An engine over such a model and its chat format; give it some `at_once` answers a time to write."""

    chat: Chat
    engine: Engine
    at_once: int


@contextmanager
def open_reader(
    name: str, sampler: Sampler, *, system: str | None, max_new_tokens: int, max_rows: int, logs: Path
) -> Iterator[Reader]:
    """A model (folder, hub id, `builtin`) with its own pixel bounds and its own context length.

    By vLLM it is served as it lies there: nothing of its weights is loaded here or written anew. `logs` is
    for the servers' logs. Raises ModelError, UserError.
    """
    local = sampler.engine == "local"
    if sampler.engine == "vllm_colocated" and torch.distributed.is_initialized():
        raise UserError(
            "vLLM inside a process works with one process only",
            where="rollout.engine=vllm_colocated",
            fix="use vllm_server with torchrun",
        )
    vlm = models.load(Model(name=name), weights=local)
    size = vlm.processor.image_processor.size
    context = int(vlm.model.config.get_text_config().max_position_embeddings)
    recipe = Recipe(
        prompt=Prompts(system=system, max_tokens=max(1, context - max_new_tokens)),
        images=Images(min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]),
        grpo=Grpo(max_new_tokens=max_new_tokens, max_rows=max_rows),
        eval=Eval(max_new_tokens=max_new_tokens),
        rollout=Rollouts.model_validate(sampler.model_dump()),
    )
    chat = models.make_chat(vlm, recipe)
    # Two prompts for each place in vLLM, so that a long answer does not leave the others empty.
    at_once = max_rows if local else max(max_rows, 2 * sampler.servers * sampler.concurrency)
    with open_engines(recipe, logs, unchanged=models.resolve(name)) as make:
        yield Reader(chat=chat, engine=make(vlm, chat, max_rows), at_once=at_once)
