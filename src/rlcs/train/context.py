"""The models and services of a GRPO step, and how its work is shared over ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from rlcs.engines.base import BackgroundEngine, Engine
from rlcs.errors import DataError
from rlcs.generation.judge import Judge
from rlcs.grading.reward import Grader
from rlcs.model.chat import Chat
from rlcs.model.packing import Pack
from rlcs.model.vlm import Vlm
from rlcs.recipe.stages import Overlap, Turns
from rlcs.records import Demonstration, Grade, Problem, Prompt, Rollout, Sampling
from rlcs.train.batching import guessed_tokens, own_share, shared

Arrived = list[tuple[int, tuple[Rollout, ...]]]
"""The index of a prompt and its rollouts, of some prompts."""


class Sampled(Protocol):
    """Rollouts of prompts, which arrive in one or in many parts; `engines.arrivals.Arrivals` is one."""

    left: int
    """Prompts whose rollouts have not been taken."""

    def take(self, wait_s: float) -> Arrived:
        """What has arrived since the last call, after at most `wait_s` if that is nothing."""
        ...


class TokenScorer(Protocol):
    """The teacher of on-policy distillation."""

    def logprobs(self, packs: Sequence[Pack], *, temperature: float) -> list[Tensor]:
        """Its logprobs (N,) of the target tokens of each pack; all ranks call it in step."""
        ...


class _AllAtOnce:
    """Rollouts that are sampled by `take`, all in one part, however long that takes."""

    def __init__(self, sample: Callable[[], Sequence[tuple[Rollout, ...]]], count: int) -> None:
        self._sample, self.left = sample, count

    def take(self, wait_s: float) -> Arrived:
        self.left = 0
        return list(enumerate(self._sample()))


@dataclass(frozen=True, kw_only=True)
class GrpoContext:
    """The models and services of a step: policy, reference (None without KL), chat format, engine, grader.

    A `judge` is one that the grader asks, on rank 0: it starts on each group as soon as that is sampled.

    `importance_cap` bounds the weights that correct for differences between the engine's logprobs and the
    policy's; None: no correction. `overlap` is what goes on while the engine samples: see `train.grpo`; any
    but `none` needs a `BackgroundEngine`. A step keeps up to `feature_bytes` of what a frozen vision tower
    makes of its images. With the first `checks` versions of the weights the engine is compared with the
    trainer (`train.engine_check`). `drafts`: the engine drafts from what problems were answered before.

    `demonstrations`, whose `turns` are learnt, and a `teacher` are there where `grpo.also` weighs them.

    Under `torchrun` all ranks call the methods together: each does its share of the work, and all get all
    results.
    """

    vlm: Vlm
    reference: Vlm | None
    chat: Chat
    engine: Engine
    grader: Grader
    judge: Judge | None = None
    importance_cap: float | None = None
    overlap: Overlap = "none"
    feature_bytes: int = 1 << 30
    checks: int = 0
    drafts: bool = False
    demonstrations: Sequence[Demonstration] = ()
    turns: Turns = "all"
    teacher: TokenScorer | None = None

    def prompts(self, problems: Sequence[Problem]) -> list[Prompt | DataError]:
        """The prompt of each problem, or the error for which it has none."""
        return shared(self.chat.prompts, problems, guessed_tokens, self.vlm.world)

    def prepare(self, problems: Sequence[Problem]) -> None:
        """Begin to decode the images for which `prompts` is called next, while something else is done."""
        own = own_share([guessed_tokens(problem) for problem in problems], self.vlm.world)
        self.chat.prepare(image for index in own for image in problems[index].images)

    def start(
        self, problems: Sequence[Problem], prompts: Sequence[Prompt], sampling: Sampling, *, step: int
    ) -> Sampled:
        """The rollouts of each problem's prompt: in the background, unless nothing overlaps."""
        if self.overlap == "none":
            work = partial(self.sample, problems, prompts, sampling, step=step)
            return _AllAtOnce(work, len(prompts))
        assert isinstance(self.engine, BackgroundEngine), "the recipe was checked for one"
        return self.engine.start(prompts, sampling, step=step)

    def sample(
        self, problems: Sequence[Problem], prompts: Sequence[Prompt], sampling: Sampling, *, step: int
    ) -> list[tuple[Rollout, ...]]:
        """The rollouts of each problem's prompt, when all are there."""
        sample = partial(self.engine.sample, sampling=sampling, step=step)
        if self.judge is not None:
            by_id = {problem.id: problem for problem in problems}
            sample = partial(
                sample, on_group=lambda group: self.start_judge(by_id[group[0].problem_id], group)
            )
        return shared(sample, prompts, lambda prompt: len(prompt.ids), self.vlm.world)

    def start_judge(self, problem: Problem, group: Sequence[Rollout]) -> None:
        """Let the judge, if there is one here, begin with a group that `grade` will ask about."""
        if self.judge is not None:
            self.judge.start([(problem, rollout.text) for rollout in group])

    def grade(self, answers: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """The grade of each (problem, response)."""
        return shared(self.grader.grade, answers, lambda answer: len(answer[1]), self.vlm.world)
