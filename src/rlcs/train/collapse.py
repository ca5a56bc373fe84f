"""Notices when RL collapses, and keeps what explains it: the answers of that step, and an earlier checkpoint.

A sign crosses its limit when its mean over the last WINDOW steps does, and did not before: an arm that begins
without boxes is no collapse. Of `health.SIGNS` all are watched but those that say nothing about the policy
(answers that a grader could not score) or that success shows as well (groups with equal rewards). Besides:
steps without a finite gradient, a gradient norm far above the usual, and an accuracy, a length or an entropy
far below its best so far (an accuracy not in `easy_first`, where problems become harder).
"""

import math
from bisect import insort
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rlcs.grading import health
from rlcs.records import NOT_FINITE, Group, Rollout, StopReason, from_row, from_row_or_none, to_row
from rlcs.storage import read_json, read_jsonl, write_json, write_jsonl
from rlcs.train.health import FALLS, SIGNS

WINDOW = 5
"""Steps whose mean is compared with a limit."""
LEAD = 10
"""Steps that a checkpoint should lie before the crossing, so that a change has time to prevent it."""
MOST = 2
"""Collapses of a stage that are kept."""
FOLDER, BATCH, RESULT = "collapse", "batch.jsonl", "replay.json"
"""Of a stage: the folder of its collapses; of a collapse: its answers, and what its replays showed."""
_UNWATCHED = ("unscored", "zero_variance_groups")
_USUAL_STEPS = 20
_NORM_FACTOR = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """A sign that crossed its limit in a step: it was to stay below it, or above it where it `fell`."""

    step: int
    key: str
    name: str
    form: str
    value: float
    limit: float
    fell: bool = False
    checkpoint: int = 0
    """The step of the checkpoint before it; 0: the beginning of the stage."""

    def is_bad(self, value: float) -> bool:
        """Whether a value is beyond the limit."""
        return value < self.limit if self.fell else value > self.limit

    @property
    def message(self) -> str:
        """One sentence about it."""
        value, limit = self.form.format(self.value), self.form.format(self.limit)
        than = "less" if self.fell else "more"
        return f"{self.name}: {value} over the last {WINDOW} steps, {than} than {limit}"


class _Means:
    """The means of one sign over WINDOW values, as its values come: the last one, and the ends of the others.

    `before` is the highest mean of all rows but the last one.
    """

    def __init__(self) -> None:
        self.last: float | None = None
        self.lowest, self.highest, self.before = math.inf, -math.inf, -math.inf
        self._known: deque[float] = deque(maxlen=WINDOW)

    def add(self, value: float | None) -> None:
        if self.last is not None:
            self.before = max(self.highest, self.last)
        if value is None:
            return
        self._known.append(value)
        if len(self._known) == WINDOW:
            if self.last is not None:
                self.lowest, self.highest = min(self.lowest, self.last), max(self.highest, self.last)
            self.last = fmean(self._known)


class Signs:
    """The watched signs of a stage, as its rows of metrics come."""

    def __init__(self, gap_limit: float, without: Collection[str] = ()) -> None:
        """No row yet; signs in `without` do not count."""
        self._without = without
        limits = {sign.key: gap_limit if sign.key == "sampler_gap" else sign.most for sign in SIGNS}
        self._signs = [(s.key, s.name, s.form, limits[s.key]) for s in SIGNS if s.key not in _UNWATCHED]
        self._signs.append((NOT_FINITE, "Steps without a finite gradient", "{:.0%}", 0.5))
        keys = [*(key for key, *_ in self._signs), *(key for key, *_ in FALLS), "grad_norm"]
        self._means = {key: _Means() for key in keys}
        self._new_norms: deque[float | None] = deque()
        self._norms: list[float] = []
        """The norms of all rows but the last WINDOW, sorted."""

    def add(self, row: Mapping[str, Any]) -> Iterator[Crossing]:
        """Those whose mean over the last WINDOW rows is beyond a limit that it kept before."""
        for key, means in self._means.items():
            means.add(_value(row, key))
        self._new_norms.append(_value(row, "grad_norm"))
        if len(self._new_norms) > WINDOW and (norm := self._new_norms.popleft()) is not None:
            insort(self._norms, norm)
        return self._crossings(int(row["step"]))

    def _crossings(self, step: int) -> Iterator[Crossing]:
        for key, name, form, limit, fell in self._limits():
            means = self._means[key]
            if key in self._without or means.last is None or means.lowest == math.inf:
                continue
            found = Crossing(
                step=step, key=key, name=name, form=form, value=means.last, limit=limit, fell=fell
            )
            if found.is_bad(means.last) and not found.is_bad(means.highest if fell else means.lowest):
                yield found

    def _limits(self) -> Iterator[tuple[str, str, str, float, bool]]:
        """The key, name, form and limit of every watched sign, and whether it must not fall below it."""
        yield from ((*sign, False) for sign in self._signs)
        if (count := len(self._norms)) >= _USUAL_STEPS:
            usual = self._norms[count // 2]
            usual = usual if count % 2 else (self._norms[count // 2 - 1] + usual) / 2
            yield "grad_norm", "Gradient norm", "{:.3g}", _NORM_FACTOR * usual, False
        for key, name, form, share, least in FALLS:
            if (best := self._means[key].before) >= least:
                yield key, name, form, share * best, True


def _value(row: Mapping[str, Any], key: str) -> float | None:
    if key == NOT_FINITE:
        return float(row.get("skipped") == NOT_FINITE)
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else None


def last_mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The mean of a sign over the last WINDOW rows of metrics, which may be fewer."""
    known = [value for row in rows[-WINDOW:] if (value := _value(row, key)) is not None]
    return fmean(known) if known else None


class CollapseWatch:
    """Watches the steps of one stage; `kept` are the crossings whose batches are in `folder`."""

    def __init__(
        self,
        folder: Path,
        rows: Sequence[Mapping[str, Any]],
        *,
        gap_limit: float,
        without: Collection[str] = (),
    ) -> None:
        """Go on after the steps of `rows`, those of the metrics so far; signs in `without` do not count."""
        self.kept: list[Crossing] = kept_crossings(folder)
        self._folder, self._signs = folder, Signs(gap_limit, without)
        for row in rows:
            self._signs.add(row)

    def add(self, row: Mapping[str, Any]) -> Crossing | None:
        """Take note of a step's metrics; the first sign that crossed its limit, if it is to be kept.

        A sign is kept once, and MOST in all. A step that is taken again after a stop is kept as before.
        """
        found = self._signs.add(row)
        known = {each.key for each in self.kept if each.step < row["step"]}
        if len(known) >= MOST:
            return None
        return next((each for each in found if each.key not in known), None)

    def keep(self, crossing: Crossing, groups: Sequence[Group], checkpoints: Collection[int]) -> Crossing:
        """Write the groups of the step, and which of the checkpoints is to be kept for it; rank 0 alone."""
        kept = replace(crossing, checkpoint=_before(crossing.step, checkpoints))
        folder = self._folder / f"step-{crossing.step:06d}"
        write_jsonl(folder / BATCH, [to_row(_by_reference(group)) for group in groups])
        write_json(folder / "crossing.json", to_row(kept))
        return kept


def _before(step: int, checkpoints: Collection[int]) -> int:
    """The checkpoint that lies LEAD steps before, else the stage's beginning or, where that is far, any."""
    early = [each for each in checkpoints if each <= step - LEAD]
    late = [each for each in checkpoints if step - LEAD < each < step]
    return max(early, default=0 if step <= 10 * LEAD else min(late, default=0))


def _by_reference(group: Group) -> Group:
    """The group without the bytes of its images, and without the experts of its tokens."""

    def stripped(record: Any) -> Any:
        return replace(record, images=tuple(replace(image, data=None) for image in record.images))

    return replace(
        group,
        problem=stripped(group.problem),
        prompt=stripped(group.prompt),
        rollouts=tuple(replace(rollout, routes=None) for rollout in group.rollouts),
    )


def kept_crossings(folder: Path) -> list[Crossing]:
    """The crossings that were kept in a stage's collapse folder, in order."""
    found = (
        from_row_or_none(Crossing, read_json(path)) for path in sorted(folder.glob("step-*/crossing.json"))
    )
    return [each for each in found if each is not None]


def read_batch(folder: Path, crossing: Crossing) -> list[Group]:
    """The groups of a crossing's step."""
    rows = read_jsonl(folder / f"step-{crossing.step:06d}" / BATCH)
    return [from_row(Group, row) for row in rows]


def examples(groups: Sequence[Group], key: str, count: int = 3) -> list[tuple[Rollout, float | None]]:
    """The answers of a batch in which a sign shows most, with their rewards; else those with most reward."""

    def rank(pair: tuple[Rollout, float | None]) -> tuple[float, float]:
        rollout, reward = pair
        of_text = health([rollout.text]) | {"truncated": float(rollout.stop is StopReason.LENGTH)}
        return of_text.get(key, 0.0), reward or 0.0

    pairs = [
        (rollout, grade.reward)
        for group in groups
        for rollout, grade in zip(group.rollouts, group.grades, strict=True)
    ]
    return sorted(pairs, key=rank, reverse=True)[:count]
