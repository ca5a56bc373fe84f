"""The groups of rollout steps: requested, sampled, graded, and given their places in the step."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlcs.data.stream import ProblemStream
from rlcs.errors import DataError
from rlcs.recipe.stages import Grpo
from rlcs.records import Group, Problem, Prompt, Sampling
from rlcs.train.clock import Clock
from rlcs.train.context import Arrived, GrpoContext, Sampled
from rlcs.train.earlier import EarlierAnswers
from rlcs.train.groups import make_group, zero_variance

POLL_S = 1.0
"""Most seconds that ranks wait for a group before they look for a stop signal."""
JUDGED_PARTS = 8
"""Parts in which a judge's grades are asked for: each time all ranks wait for its slowest reply."""


class StepGroups:
    """The groups of one rollout step in the order of their problems, as far as they have arrived."""

    def __init__(self, settings: Grpo) -> None:
        """Nothing has been requested yet."""
        self.groups: list[Group | None] = []
        self.skipped = 0
        """Problems that could not become prompts."""
        self.complete = False
        """Whether no group will be added."""
        self._settings = settings
        self._placed: set[int] = set()

    @property
    def arrived(self) -> list[Group]:
        """The groups that are there."""
        return [group for group in self.groups if group is not None]

    @property
    def missing(self) -> int:
        """Groups with two different rewards that a step wants beyond those that are there."""
        return self._settings.prompts_per_step - sum(not zero_variance(group) for group in self.arrived)

    @property
    def chosen(self) -> list[Group]:
        """The groups of the complete step; dynamic sampling prefers those with two different rewards."""
        if not self._settings.dynamic_sampling:
            return self.arrived
        return sorted(self.arrived, key=zero_variance)[: self._settings.prompts_per_step]

    def newly_placed(self) -> list[tuple[int, Group]]:
        """Groups whose optimiser step is certain and was not so before, each after a place of that step.

        The places of a step are those of the groups in `chosen`, and its optimiser steps are runs of places.
        """
        last = self._settings.prompts_per_step - 1
        size = -(-self._settings.prompts_per_step // self._settings.optimizer_steps)
        new = []
        for index, first_place, last_place in self._places():
            group = self.groups[index]
            if group is None or index in self._placed:
                continue
            if first_place // size == min(last_place, last) // size:
                self._placed.add(index)
                new.append((first_place, group))
        return new

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """The index of a group, and between which places it will be, in the order of the complete step.

        In dynamic sampling groups with two different rewards come first: how many there are before a group
        depends on those that have not come. Others may be replaced until the step is complete.
        """
        if not self._settings.dynamic_sampling:
            yield from ((index, index, index) for index in range(len(self.groups)))
            return
        count, unknown, alike = 0, 0, list[int]()
        for index, group in enumerate(self.groups):
            if group is None:
                unknown += 1
            elif zero_variance(group):
                alike.append(index)
            else:
                yield index, count, count + unknown
                count += 1
        if self.complete:
            places = range(count, self._settings.prompts_per_step)
            yield from ((index, place, place) for place, index in zip(places, alike, strict=False))


@dataclass(frozen=True, kw_only=True, slots=True)
class Requested:
    """Problems and their prompts, which are being sampled by the weights after `version` rollout steps."""

    problems: Sequence[Problem]
    prompts: Sequence[Prompt]
    sampled: Sampled
    skipped: int
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ahead:
    """What was requested in advance, and the position of the stream behind it."""

    requested: Requested
    cursor: Mapping[str, Any]


class Collector:
    """Collects the groups of one rollout step after the other."""

    def __init__(
        self,
        context: GrpoContext,
        stream: ProblemStream[Problem],
        settings: Grpo,
        sampling: Sampling,
        *,
        check: Callable[[int, Clock], None] = lambda version, clock: None,
        earlier: EarlierAnswers | None = None,
    ) -> None:
        """`stream` stays behind the last step that was collected, whatever is requested in advance.

        `check` is called with the version of the weights, which engine and policy have, before sampling.
        Prompts get what is known of `earlier` answers, which take note of each step.
        """
        self._context, self._stream = context, stream
        self._settings, self._sampling, self._check = settings, sampling, check
        self._earlier = earlier
        self._version = -1
        self._ahead: _Ahead | None = None
        by_judge = "judge" in settings.reward.weights and context.overlap != "none"
        self._least = max(1, settings.prompts_per_step // JUDGED_PARTS) if by_judge else 1

    def synced(self, step: int) -> None:
        """Take note that the engine has the weights after `step` rollout steps."""
        self._version = step

    def collect(self, step: int, clock: Clock) -> Iterator[StepGroups]:
        """Sample and grade the groups of one step; yields them after each part, the last time complete.

        DAPO (arXiv 2503.14476, section 3.2) samples until every group has two different rewards; here
        for at most `dynamic_sampling` more rounds. A problem that cannot become a
        prompt is skipped, and the next one takes its place.
        """
        found, times_sampled = StepGroups(self._settings), Counter[str]()
        for _ in range(1 + self._settings.dynamic_sampling):
            if found.missing <= 0:
                break
            if (ahead := self._ahead) is not None:
                self._ahead, requested = None, ahead.requested
                self._stream.restore(ahead.cursor)
                times_sampled.update(prompt.problem_id for prompt in requested.prompts)
            else:
                requested = self._request(found.missing, times_sampled, step, step, clock)
            yield from self._receive(requested, found, step, clock)
        if self._context.overlap == "none":
            with clock("rollout"):
                self._context.engine.rest()
        found.complete = True
        if self._earlier is not None:
            self._earlier.keep(found.chosen, step=step + 1)
        yield found

    def request_ahead(self, step: int, clock: Clock) -> None:
        """Begin to sample the first round of `step`, by the weights of now, which are one step older.

        To be called when the step before has been sampled.
        """
        cursor = self._stream.state()
        requested = self._request(self._settings.prompts_per_step, Counter(), step, step - 1, clock)
        self._ahead = _Ahead(requested=requested, cursor=self._stream.state())
        self._stream.restore(cursor)

    def _request(
        self, count: int, times_sampled: Counter[str], step: int, version: int, clock: Clock
    ) -> Requested:
        """Take problems from the stream and let the engine sample them, by the weights of now."""
        if self._version != version:
            with clock("rollout"):
                self._context.engine.sync()
            self._version = version
        self._check(version, clock)
        problems, prompts, skipped = take_prompts(self._stream, self._context.prompts, count)
        prompts = number_repeats(prompts, times_sampled)
        if self._earlier is not None:
            prompts = self._earlier.given(prompts, step)
        self._context.prepare(self._stream.peek(self._settings.prompts_per_step))
        with clock("rollout"):
            sampled = self._context.start(problems, prompts, self._sampling, step=step)
        return Requested(
            problems=problems, prompts=prompts, sampled=sampled, skipped=skipped, version=version
        )

    def _receive(
        self, requested: Requested, found: StepGroups, step: int, clock: Clock
    ) -> Iterator[StepGroups]:
        """Grade groups as they arrive, and yield after each part but the last, also if it is empty."""
        context, first = self._context, len(found.groups)
        found.groups += [None] * len(requested.problems)
        found.skipped += requested.skipped
        ungraded: Arrived = []
        while requested.sampled.left:
            with clock("rollout"):
                arrived = requested.sampled.take(POLL_S)
            if context.overlap != "none":
                for index, rollouts in arrived:
                    context.start_judge(requested.problems[index], rollouts)
            ungraded += arrived
            if ungraded and (len(ungraded) >= self._least or not requested.sampled.left):
                with clock("grade"):
                    for index, group in self._graded(requested, ungraded, step):
                        found.groups[first + index] = group
                ungraded = []
            if requested.sampled.left:
                yield found

    def _graded(self, requested: Requested, arrived: Arrived, step: int) -> Iterator[tuple[int, Group]]:
        problems, prompts = requested.problems, requested.prompts
        answers = [(problems[i], rollout.text) for i, rollouts in arrived for rollout in rollouts]
        grades = iter(self._context.grade(answers))
        for i, rollouts in arrived:
            own = [next(grades) for _ in rollouts]
            group = make_group(problems[i], prompts[i], rollouts, own, self._settings)
            yield i, replace(group, staleness=step - requested.version)


def take_prompts(
    stream: ProblemStream[Problem],
    prompts_of: Callable[[Sequence[Problem]], Sequence[Prompt | DataError]],
    count: int,
) -> tuple[list[Problem], list[Prompt], int]:
    """The next `count` problems that can be prompts, their prompts, and how many cannot.

    Raises DataError when none of the next `count` can, which a few bad rows do not explain.
    """
    problems: list[Problem] = []
    prompts: list[Prompt] = []
    skipped = 0
    while len(problems) < count:
        taken, refused = stream.take(count - len(problems)), set[str]()
        for problem, prompt in zip(taken, prompts_of(taken), strict=True):
            if isinstance(prompt, Prompt):
                problems.append(problem)
                prompts.append(prompt)
            else:
                skipped, error = skipped + 1, prompt
                refused.add(problem.id)
        stream.set_aside(refused)
        if skipped >= count and not problems:
            raise error
    return problems, prompts, skipped


def number_repeats(prompts: Sequence[Prompt], times_sampled: Counter[str]) -> list[Prompt]:
    """The prompts, each with the number of times that its problem was sampled before in this step.

    Where there are few problems a step may sample one twice, and equal seeds would give equal answers. Adds
    these prompts to the counts in `times_sampled`.
    """
    numbered = []
    for prompt in prompts:
        numbered.append(replace(prompt, repeat=times_sampled[prompt.problem_id]))
        times_sampled[prompt.problem_id] += 1
    return numbered
