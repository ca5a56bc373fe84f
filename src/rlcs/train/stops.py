"""Reasons to end RL before its last step: answers that nothing scores, and steps without a signal."""

from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

from rlcs.errors import TrainingError
from rlcs.grading import health
from rlcs.grading.reward import advice
from rlcs.recipe.stages import Grpo
from rlcs.records import Group, StopReason
from rlcs.train.groups import zero_variance
from rlcs.train.health import READ_ROLLOUTS, SIGNS
from rlcs.train.run_dir import RunDir

WINDOW = 10
"""Steps over which answers that are not scored are counted."""
LEAST = 10
"""Fewer answers that are not scored never end a run."""
_KEY = "unscored"
_MOST = 0.8  # of a step's answers: a reason that explains why none has a signal


def stop_unscored(run: RunDir, groups: Sequence[Group], *, step: int, first: int) -> NoReturn:
    """Keep the steps before this one, and end the run with the reason why no answer is scored."""
    run.keep_rollouts(step + 1, groups)
    if step > first:
        run.save(step)
    why, words, count = _reason(groups)
    total = sum(len(group.grades) for group in groups)
    raise TrainingError(
        f"none of the {total:,} answers of step {step + 1} is scored; {count:,} of them: {words}",
        where="grpo.reward",
        fix=advice(why),
    )


class ScoreWatch:
    """Counts the answers of the last WINDOW steps that were not scored; checkpoints hold the counts."""

    def __init__(self, run: RunDir) -> None:
        """Go on with the counts of `run`, which has resumed."""
        self._run = run
        self._most = next(sign.most for sign in SIGNS if sign.key == _KEY)

    def add(self, groups: Sequence[Group]) -> None:
        """Count those of a step."""
        grades = [grade for group in groups for grade in group.grades]
        counts = [sum(not grade.scored for grade in grades), len(grades)]
        self._run.carried[_KEY] = [*self._run.carried.get(_KEY, []), counts][-WINDOW:]

    def require(self, groups: Sequence[Group], *, step: int) -> None:
        """After `step` steps, of which the last has these groups: end a run with too many of them.

        Raises TrainingError, with a checkpoint from which the run goes on with new counts.
        """
        missing, total = map(sum, zip(*self._run.carried[_KEY], strict=True))
        if missing < LEAST or missing <= self._most * total or not self._run.carried[_KEY][-1][0]:
            return
        steps = len(self._run.carried.pop(_KEY))
        self._run.save(step)
        why, words, count = _reason(groups)
        raise TrainingError(
            f"{missing:,} of the {total:,} answers of the last {steps} steps are not scored, more than "
            f"{self._most:.0%}; {count:,} of them in step {step}: {words}",
            where="grpo.reward",
            fix=advice(why),
        )


def _reason(groups: Sequence[Group]) -> tuple[str, str, int]:
    """The most frequent reason why answers are not scored, the same with a problem, and how many have it."""
    missing = [
        (grade.why, group.problem.id) for group in groups for grade in group.grades if not grade.scored
    ]
    [(why, count)] = Counter(why for why, _ in missing).most_common(1)
    problem = next(id for each, id in missing if each == why)
    return why, f"{why} (first for problem {problem!r})", count


def require_signal(run: RunDir, groups: Sequence[Group], settings: Grpo) -> None:
    """Count the last steps without two different rewards in a group; TrainingError after too many."""
    run.zero_variance_steps = run.zero_variance_steps + 1 if all(map(zero_variance, groups)) else 0
    if run.zero_variance_steps >= settings.max_zero_variance_steps:
        raise TrainingError(
            f"no group had two different rewards in {run.zero_variance_steps} steps in a row: "
            "nothing can be learnt",
            where="grpo",
            fix=_advice_without_signal(groups, settings),
        )


def _advice_without_signal(groups: Sequence[Group], settings: Grpo) -> str:
    """What to do about groups whose rewards are all equal, by what most of their answers have in common."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    grades = [grade for group in groups for grade in group.grades]
    most = _MOST * len(grades)
    if sum(not grade.scored for grade in grades) >= most:
        return advice(_reason(groups)[0])
    if (cut := sum(rollout.stop is StopReason.LENGTH for rollout in rollouts)) >= most:
        return (
            f"{cut:,} of the last {len(rollouts):,} answers were cut at grpo.max_new_tokens="
            f"{settings.max_new_tokens}: raise it; if they never end ({READ_ROLLOUTS}), the policy needs a "
            "longer cold start"
        )
    if sum(bool(grade.correct) for grade in grades) >= most:
        return "nearly all answers are right: nothing is left to learn here; take harder problems"
    decides = next(iter(settings.reward.weights))
    if decides != "accuracy":
        return (
            f"{decides} gives all answers to a problem the same reward ({grades[0].reward}): see what it "
            f"returns for some ({READ_ROLLOUTS})"
        )
    if health([rollout.text for rollout in rollouts])["no_format_share"] >= _MOST:
        return (
            rf"most answers have no \boxed{{}} to read: {READ_ROLLOUTS}; a longer cold start teaches the form"
        )
    return f"nearly all answers are wrong: {READ_ROLLOUTS}; easier problems, or a longer cold start"
