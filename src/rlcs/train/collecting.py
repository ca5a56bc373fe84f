"""The groups of rollout steps: asked for, sampled, graded, and given their places in the step."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rlcs.data.stream import ProblemStream
from rlcs.errors import DataError
from rlcs.recipe.stages import Grpo
from rlcs.records import Group, Problem, Prompt, Sampling
from rlcs.train.clock import Clock
from rlcs.train.context import Arrived, GrpoContext, Sampled
from rlcs.train.groups import make_group, zero_variance

POLL_S = 1.0
"""Most seconds that ranks wait for a group before they look for a stop signal."""
JUDGED_PARTS = 8
"""Parts in which a judge's grades are asked for: each time all ranks wait for its slowest reply."""


class StepGroups:
    """The groups of one rollout step in the order of their problems, as far as they have arrived."""

    def __init__(self, settings: Grpo) -> None:
        """Nothing has been asked for yet."""
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
        """Groups whose place in the step is certain and was not so before, each after its place."""
        new = []
        for place, (index, group) in enumerate(self._in_order()):
            if group is not None and index not in self._placed:
                self._placed.add(index)
                new.append((place, group))
        return new

    def _in_order(self) -> Iterator[tuple[int, Group | None]]:
        """The groups (with their indices) of the first place, the second, ...; None: not there yet.

        In dynamic sampling a place is certain when all groups before are graded; with a single optimiser step
        it does not matter which place a group has, as long as it has one.
        """
        dynamic = bool(self._settings.dynamic_sampling)
        count = 0
        for index, group in enumerate(self.groups):
            if group is None and dynamic:
                if self._settings.optimizer_steps > 1:
                    return
            elif not (dynamic and group is not None and zero_variance(group)):
                count += 1
                yield index, group
        if dynamic and self.complete:
            alike = [(i, group) for i, group in enumerate(self.groups) if group and zero_variance(group)]
            yield from alike[: self._settings.prompts_per_step - count]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Problems and their prompts, which are being sampled by the weights after `version` rollout steps."""

    problems: Sequence[Problem]
    prompts: Sequence[Prompt]
    sampled: Sampled
    skipped: int
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ahead:
    """What was asked for in advance, and the position of the stream behind it."""

    asked: Asked
    cursor: Mapping[str, int]


class Collector:
    """Collects the groups of one rollout step after the other."""

    def __init__(
        self, context: GrpoContext, stream: ProblemStream[Problem], settings: Grpo, sampling: Sampling
    ) -> None:
        """`stream` stays behind the last step that was collected, whatever is asked for in advance."""
        self._context, self._stream = context, stream
        self._settings, self._sampling = settings, sampling
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
                self._ahead, asked = None, ahead.asked
                self._stream.restore(ahead.cursor)
                times_sampled.update(prompt.problem_id for prompt in asked.prompts)
            else:
                asked = self._ask(found.missing, times_sampled, step, step, clock)
            yield from self._receive(asked, found, step, clock)
        if self._context.overlap == "none":
            with clock("rollout"):
                self._context.engine.rest()
        found.complete = True
        yield found

    def ask_ahead(self, step: int, clock: Clock) -> None:
        """Begin to sample the first round of `step`, by the weights of now, which are one step older.

        To be called when the step before has been sampled.
        """
        cursor = self._stream.state()
        asked = self._ask(self._settings.prompts_per_step, Counter(), step, step - 1, clock)
        self._ahead = _Ahead(asked=asked, cursor=self._stream.state())
        self._stream.restore(cursor)

    def _ask(self, count: int, times_sampled: Counter[str], step: int, version: int, clock: Clock) -> Asked:
        """Take problems from the stream and let the engine sample them, by the weights of now."""
        if self._version != version:
            with clock("rollout"):
                self._context.engine.sync()
            self._version = version
        problems, prompts, skipped = take_prompts(self._stream, self._context.prompts, count)
        prompts = number_repeats(prompts, times_sampled)
        with clock("rollout"):
            sampled = self._context.start(problems, prompts, self._sampling, step=step)
        return Asked(problems=problems, prompts=prompts, sampled=sampled, skipped=skipped, version=version)

    def _receive(self, asked: Asked, found: StepGroups, step: int, clock: Clock) -> Iterator[StepGroups]:
        """Grade groups as they arrive, and yield after each part but the last, also if it is empty."""
        context, first = self._context, len(found.groups)
        found.groups += [None] * len(asked.problems)
        found.skipped += asked.skipped
        ungraded: Arrived = []
        while asked.sampled.left:
            with clock("rollout"):
                arrived = asked.sampled.take(POLL_S)
            if context.overlap != "none":
                for index, rollouts in arrived:
                    context.start_judge(asked.problems[index], rollouts)
            ungraded += arrived
            if ungraded and (len(ungraded) >= self._least or not asked.sampled.left):
                with clock("grade"):
                    for index, group in self._graded(asked, ungraded, step):
                        found.groups[first + index] = group
                ungraded = []
            if asked.sampled.left:
                yield found

    def _graded(self, asked: Asked, arrived: Arrived, step: int) -> Iterator[tuple[int, Group]]:
        problems, prompts = asked.problems, asked.prompts
        answers = [(problems[i], rollout.text) for i, rollouts in arrived for rollout in rollouts]
        grades = iter(self._context.grade(answers))
        for i, rollouts in arrived:
            own = [next(grades) for _ in rollouts]
            group = make_group(problems[i], prompts[i], rollouts, own, self._settings)
            yield i, replace(group, staleness=step - asked.version)


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
        taken = stream.take(count - len(problems))
        for problem, prompt in zip(taken, prompts_of(taken), strict=True):
            if isinstance(prompt, Prompt):
                problems.append(problem)
                prompts.append(prompt)
            else:
                skipped, error = skipped + 1, prompt
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
