"""Differences of accuracy, problem by problem: between two arms of a run, or an arm in two runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rlcs.evals.intervals import mcnemar, newcombe, paired_interval
from rlcs.recipe.arms import ArmName
from rlcs.report.findings import ArmResult, arm_results
from rlcs.report.load_run import Run

PAIRS: tuple[tuple[ArmName, ArmName], ...] = (
    ("sft_grpo", "sft"),
    ("sft", "base"),
    ("sft_grpo", "grpo"),
    ("grpo", "base"),
    ("sft_grpo", "base"),
    ("mixed", "sft_grpo"),
    ("mixed", "grpo"),
    ("mixed", "sft"),
    ("mixed", "base"),
)
"""Which arm is compared with which, in the order of interest: each pair differs by one or both stages."""

Side = tuple[Sequence[Run], ArmResult]
"""The runs (one a seed) of one side of a difference, and the arm's result in them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The accuracy of `arm` (`second`) minus that of `against` (`first`), with its 95% interval.

    `shared` problems were answered by both: both shares are of these, `gained` are right in the second alone,
    `lost` in the first alone, and `p` is McNemar's exact test (one seed each). With `shared` 0 the interval
    is that of two independent shares. `by_seed` is the difference in each run, where there are several.
    """

    arm: str
    against: str
    first: float
    second: float
    points: float
    low: float
    high: float
    shared: int
    gained: int
    lost: int
    p: float | None
    by_seed: tuple[float, ...] = ()

    @property
    def clear(self) -> bool:
        """Whether the interval and the difference of every seed lie on the same side of zero."""
        return (self.low > 0 or self.high < 0) and all(gap * self.points > 0 for gap in self.by_seed)


def differences(runs: Sequence[Run]) -> list[Difference]:
    """The differences between the arms of a run (or of its seeds), those of PAIRS that were measured."""
    results = {result.arm: result for result in arm_results(runs)}
    return [
        difference((runs, results[against]), (runs, results[arm]))
        for arm, against in PAIRS
        if arm in results and against in results
    ]


def difference(first: Side, second: Side) -> Difference:
    """The second arm's accuracy minus the first's, over the problems that both answered.

    One run each: the interval of a difference of paired shares (Agresti & Min 2005). Several: each problem's
    mean over seeds, so that seeds do not count as more problems. No problem in common: Newcombe's interval.
    """
    (runs, a), (others, b) = first, second
    before, after = _shares(runs, a.arm), _shares(others, b.arm)
    both = [key for key in before if key in after]
    moves = [after[key] - before[key] for key in both]
    gained, lost = sum(move > 0 for move in moves), sum(move < 0 for move in moves)
    points = fmean(moves) if moves else b.accuracy - a.accuracy
    single = len(runs) == len(others) == 1
    if not moves:
        low, high = newcombe((a.accuracy, a.n), (b.accuracy, b.n))
    elif single:
        low, high = paired_interval(gained, lost, len(moves))
    else:
        half = 1.96 * stdev(moves) / math.sqrt(len(moves)) if len(moves) > 1 else 1.0
        low, high = points - half, points + half
    within = runs is others and not single and len(a.seeds) == len(b.seeds)
    return Difference(
        arm=b.arm, against=a.arm, points=points, low=low, high=high, gained=gained, lost=lost,
        first=fmean(before[key] for key in both) if both else a.accuracy,
        second=fmean(after[key] for key in both) if both else b.accuracy,
        shared=len(moves), p=mcnemar(gained, lost) if moves and single else None,
        by_seed=tuple(y - x for x, y in zip(a.seeds, b.seeds, strict=True)) if within else (),
    )  # fmt: skip


def _shares(runs: Sequence[Run], arm: str) -> dict[object, float]:
    """The share of right seeds of each problem; the same id with another question is another problem."""
    verdicts: dict[object, list[bool]] = {}
    for run in runs:
        known = {p.id: (p.id, p.question, p.answer, p.history) for p in run.problems}
        for name, answer in run.answers.get(arm, {}).items():
            verdicts.setdefault(known.get(name, name), []).append(answer.grade.correct is True)
    return {key: fmean(right) for key, right in verdicts.items()}
