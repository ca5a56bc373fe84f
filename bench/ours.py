"""rlcs's side of the measurement: `Collector` and `Learner` as training calls them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from bench.meter import Meter
from bench.shapes import SEED, Case, grpo_settings, rewards
from bench.sides import asked
from rlcs.data.stream import ProblemStream
from rlcs.distributed import ALONE, World, join_world
from rlcs.engines import decoding
from rlcs.engines.local import LocalEngine
from rlcs.engines.sampling import choose, uniform
from rlcs.model import loading
from rlcs.model.vlm import Vlm
from rlcs.recipe.execution import Parallel
from rlcs.recipe.schema import Model
from rlcs.records import Grade, Problem, rollout_seed
from rlcs.train import grpo
from rlcs.train.clock import Clock
from rlcs.train.collecting import Collector
from rlcs.train.context import GrpoContext
from rlcs.train.learning import Learner
from rlcs.train.trainer import Trainer

WAIT_S = 600.0
"""The longest that a rank waits for another."""
PHASE_NAMES = {"rollout": "rollout", "reference": "logprobs", "update": "update", "grade": "step"}
"""Our phases by the names of the table."""


class MeterClock(Clock):
    """A stage's clock that reports to the meter."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the body under the table's name of the phase."""
        with self._meter.phase(PHASE_NAMES[phase]):
            yield


class FixedRewards:
    """Stands in for the graders: the same rewards on both sides, at no cost."""

    def grade(self, answers: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """One grade an answer, in order."""
        return [Grade(reward=r, correct=r > 0.5) for r in rewards(len(answers))]


class ForcedLengths:
    """Makes the engine end every rollout at its length: random models do not stop by themselves.

    Rows are known by their seeds, which `uniform` sees just before `choose` is asked.
    """

    def __init__(self, case: Case, end_id: int) -> None:
        self._end = end_id
        self._lengths: dict[int, int] = {}
        for step in range(case.steps):
            for problem in case.step_problems(step):
                for index, length in enumerate(case.lengths[problem.id]):
                    self._lengths[rollout_seed(SEED, step, problem.id, index)] = length
        self._ending = torch.empty(0, dtype=torch.bool)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Force lengths inside the body."""
        with (
            mock.patch.object(decoding, "uniform", self._uniform),
            mock.patch.object(decoding, "choose", self._choose),
        ):
            yield

    def _uniform(self, seeds: Tensor, counters: Tensor) -> Tensor:
        lengths = [[self._lengths.get(seed, 0) for seed in row] for row in seeds.tolist()]
        self._ending = counters + 1 >= torch.tensor(lengths)
        return uniform(seeds, counters)

    def _choose(
        self, logits: Tensor, draws: Tensor, *, banned: Tensor, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        banned = torch.cat([banned, torch.tensor([self._end])])
        ids, logprobs = choose(logits, draws, banned=banned, **settings)
        end = torch.log_softmax(logits, -1)[:, self._end, None].expand_as(logprobs)
        return ids.masked_fill(self._ending, self._end), torch.where(self._ending, end, logprobs)


def load(case: Case, world: World = ALONE) -> tuple[Vlm, GrpoContext]:
    """The policy and what a step works with."""
    device = None if world.grouped else loading.default_device()
    vlm = loading.load(Model(name=case.folder), device=device, world=world)
    vlm, reference = grpo.with_reference(vlm, partial(loading.spread, settings=Parallel()))
    chat = loading.make_chat(vlm)
    engine = LocalEngine(vlm, chat, max_rows=grpo_settings(case).max_rows)
    return vlm, GrpoContext(vlm=vlm, reference=reference, chat=chat, engine=engine, grader=FixedRewards())


def main(pipe: Connection | None, case: Case) -> None:
    """Run a step for every word that comes through the pipe, and answer with what was measured."""
    disable_progress_bar()
    with join_world(timeout_s=WAIT_S) as world:
        torch.set_num_threads(case.threads // world.size)
        _steps(pipe, case, world)


def _steps(pipe: Connection | None, case: Case, world: World) -> None:
    """The steps of one rank; the first one has the pipe."""
    settings = grpo_settings(case)
    vlm, context = load(case, world)
    trainer = Trainer(vlm, settings.optimizer, steps=case.steps, max_bad_steps=1)
    stream = InOrder(case.problems, seed=SEED)
    sampling = context.chat.sampling(
        n=settings.group_size, temperature=1.0, max_new_tokens=settings.max_new_tokens, seed=SEED
    )
    collector = Collector(context, stream, settings, sampling)

    if pipe is not None:
        pipe.send("ready")
    with ForcedLengths(case, context.chat.end_id).installed():
        for step in range(case.steps):
            memory = bool(asked(pipe, world))
            with Meter(memory=memory, cpu_time=case.cpu_time) as meter:
                clock = MeterClock(meter)
                learner = Learner(trainer, context, settings, clock)
                [found] = collector.collect(step, clock)
                learner.add(found.newly_placed())
                learner.finish()
            got = {g.problem.id: tuple(len(r.ids) for r in g.rollouts) for g in found.chosen}
            assert got == {p.id: case.lengths[p.id] for p in case.step_problems(step)}, "lengths are forced"
            meter.measured.peaks = {name: int(size) for name, size in world.sum(meter.measured.peaks).items()}
            meter.measured.busy = sum(world.gather(meter.measured.busy))
            if pipe is not None:
                pipe.send(meter.measured)


class InOrder(ProblemStream[Problem]):
    """Deals problems in the order of the case, the same on both sides."""

    def _next(self) -> int:
        super()._next()
        return self._position - 1
