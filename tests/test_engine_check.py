"""The comparison of engine and trainer: healthy engines pass, and each kind of fault is named.

Faults are put into real engines of the built-in model, between the trainer and what it is compared with.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from conftest import LengthGrader, make_problem
from rlcs.data.sources import open_builtin
from rlcs.engines import decoding
from rlcs.engines.base import Engine
from rlcs.engines.local import LocalEngine
from rlcs.errors import TrainingError
from rlcs.model import loading, packing
from rlcs.model.chat import Chat
from rlcs.model.vlm import Vlm
from rlcs.recipe.execution import Lora
from rlcs.recipe.schema import Model
from rlcs.recipe.stages import Grpo
from rlcs.records import Problem, Prompt
from rlcs.train import engine_faults
from rlcs.train.context import GrpoContext
from rlcs.train.engine_check import EngineCheck, cases
from rlcs.train.engine_verdict import IMAGE, SWAPPED, TEXT, Case

CPU = torch.device("cpu")
PUZZLES = [row for row in open_builtin("builtin:puzzles?count=40&seed=1", "rl")]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def trained(request) -> tuple[Vlm, Chat]:
    vlm = loading.load(Model(name="builtin", dtype=request.param), device=CPU)
    return vlm, loading.make_chat(vlm)


@pytest.fixture
def plain() -> tuple[Vlm, Chat]:
    """The built-in model in float32, for a test that changes it."""
    vlm = loading.load(Model(name="builtin"), device=CPU)
    return vlm, loading.make_chat(vlm)


def check_of(
    vlm: Vlm, chat: Chat, engine: Engine, *, problems: Sequence[Problem] = PUZZLES, lines: list | None = None
) -> EngineCheck:
    context = GrpoContext(
        vlm=vlm, reference=None, chat=chat, engine=engine, grader=LengthGrader(), checks=3
    )
    return EngineCheck(context, problems, Grpo(), say=(lines if lines is not None else []).append)


def copied(vlm: Vlm) -> Vlm:
    return replace(vlm, model=copy.deepcopy(vlm.model))


def perturb(vlm: Vlm, scale: float, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (scale * parameter.float().std().nan_to_num() * noise).to(parameter.dtype)


class Faulty:
    """An engine that gets other prompts than it was given, or reports other ids."""

    def __init__(
        self,
        engine: LocalEngine,
        *,
        prompt: Callable[[Prompt], Prompt] = lambda prompt: prompt,
        ids: Callable[[Prompt], tuple[int, ...]] = lambda prompt: prompt.ids,
    ) -> None:
        self._engine, self._prompt, self._ids = engine, prompt, ids

    def inspect(self, prompts, sampling, *, candidates):
        [view] = self._engine.inspect(
            [self._prompt(prompt) for prompt in prompts], sampling, candidates=candidates
        )
        seen = [replace(s, prompt_ids=self._ids(p)) for s, p in zip(view.prompts, prompts, strict=True)]
        return [replace(view, prompts=tuple(seen))]

    def rest(self) -> None:
        pass


def caught(check: EngineCheck, version: int = 0) -> str:
    """The layer that is blamed."""
    with pytest.raises(TrainingError, match="the rollout engine does not compute what the trainer does") as e:
        check(version)
    assert "rollout.checks=0" in e.value.fix and e.value.where
    print(e.value)
    return e.value.what.partition("wrong first: ")[2].partition(".")[0]


def test_a_healthy_engine_passes_with_room_to_spare(trained):
    lines: list[str] = []
    check = check_of(*trained, LocalEngine(*trained, max_rows=16), lines=lines)
    before = torch.get_rng_state()
    for version in (0, 0, 1, 2, 3, 4):
        check(version)
    assert torch.equal(before, torch.get_rng_state())
    assert check.worst is not None and 0 < check.worst.share < 0.25
    assert len(lines) == 3 and "3 with images, the same with others" in lines[0] and "2 without" in lines[0]


FAULTS = {
    "ids": {"ids": lambda prompt: (*prompt.ids[:5], 7, *prompt.ids[5:])},
    "grid": {"ids": lambda prompt: tuple(i for n, i in enumerate(prompt.ids) if n != prompt.spans[0][0]) if prompt.spans else prompt.ids},
}


@pytest.mark.parametrize("layer", FAULTS)
def test_other_ids_and_other_sizes_of_images(plain, layer):
    vlm, chat = plain
    assert caught(check_of(vlm, chat, Faulty(LocalEngine(vlm, chat, max_rows=16), **FAULTS[layer]))) == layer
