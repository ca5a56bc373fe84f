"""The accuracy that was measured while a stage trained, and which step's weights the stage ended with."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rlcs.recipe.arms import TRAINING_ORDER
from rlcs.records import from_row_or_none
from rlcs.report.load_run import Row, Run, number, text

_EARLY = 0.8
"""The best step is well before the end when it lies in the first 80% of the steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One row of validation.jsonl: shares of right answers; `samples` to a problem are k of `pass_at_k`."""

    step: int
    accuracy: float
    low: float
    high: float
    n: int
    samples: int
    pass_at_k: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationCurve:
    """The measurements of one stage in step order; `kept` is the step that was chosen by them."""

    stage: str
    points: tuple[Measured, ...]
    kept: int | None

    @property
    def best(self) -> Measured:
        """The measurement with the highest accuracy, the first of equal ones."""
        return max(self.points, key=lambda point: point.accuracy)

    @property
    def peaked_early(self) -> bool:
        """Whether the best step is well before the end, and the last one at least a point below it."""
        last = self.points[-1]
        return self.best.step <= _EARLY * last.step and self.best.accuracy - last.accuracy >= 0.01

    @property
    def fell(self) -> bool:
        """Whether the last step is so far below the best one that the interval excludes it."""
        return self.points[-1].accuracy < self.best.low


def validation_curves(runs: Sequence[Run]) -> list[ValidationCurve]:
    """The curve of every stage that was measured; over seeds the mean, with the lowest and the highest."""
    found = []
    for stage in TRAINING_ORDER:
        by_run = [_measured(run.validation.get(stage, ())) for run in runs]
        by_run = [points for points in by_run if points]
        if by_run:
            steps = sorted(set.intersection(*(set(points) for points in by_run)))
            points = tuple(_mean([each[step] for each in by_run]) for step in steps)
            chosen = [run for run in runs if text(run.done.get(stage, {}), "rule") not in ("", "last")]
            kept = [number(run.done.get(stage, {}), "step") for run in chosen]
            same = kept[0] if len(set(kept)) == 1 else None
            if points:
                at = None if same is None else int(same)
                found.append(ValidationCurve(stage=stage, points=points, kept=at))
    return found


def _measured(rows: Sequence[Row]) -> dict[int, Measured]:
    found = [each for row in rows if (each := from_row_or_none(Measured, row)) is not None]
    return {each.step: each for each in found}


def _mean(points: Sequence[Measured]) -> Measured:
    if len(points) == 1:
        return points[0]
    shares = [point.accuracy for point in points]
    wide = [point.pass_at_k for point in points if point.pass_at_k is not None]
    return Measured(
        step=points[0].step, accuracy=fmean(shares), low=min(shares), high=max(shares), n=points[0].n,
        samples=points[0].samples, pass_at_k=fmean(wide) if wide else None,
    )  # fmt: skip
