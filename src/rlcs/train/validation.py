"""The measurements of a model while a stage trains: when they are due, their rows on disk, the best step.

How a model is measured is the caller's: training does not know benchmarks, samplers or graders.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from rlcs.signals import StopFlag
from rlcs.storage import read_jsonl
from rlcs.train.metrics import MetricsLog

Measure = Callable[[StopFlag], Mapping[str, Any]]
"""Measures the model's current weights, on all ranks together; the same row on every rank. Raises Stopped."""
AfterValidation = Callable[[Mapping[int, Mapping[str, Any]]], None]
"""Gets the rows so far, by step, after each one. Stopped, raised here, ends the stage with a checkpoint."""
FILE = "validation.jsonl"
SENT = (
    *("accuracy", "pass_at_k", "signal", "entropy", "distinct", "alike", "format", "loss"),
    *("mean_tokens", "truncated", "unscored", "seconds"),
)
"""The values of a row that trackers get, where they were measured."""


def shares(row: Mapping[str, Any]) -> list[float]:
    """The share of right answers to each problem of a measurement."""
    return [right / row["samples"] for right in row["right"]]


class Validation:
    """The measurements of one stage: one row of `validation.jsonl` for each, also before the first step."""

    def __init__(self, *, every: int, measure: Measure, at: Collection[int] = ()) -> None:
        """Measure by `measure` before the first step, after each `every`-th and after the last; 0: none.

        Besides it is measured after the steps `at`.
        """
        self.measure = measure
        self.after: AfterValidation | None = None
        self.rows: dict[int, Mapping[str, Any]] = {}
        """The rows so far, by step."""
        self.sent = -1
        """The last step that an earlier attempt measured; trackers got it then."""
        self._every, self._at = every, at
        self._log: MetricsLog | None = None

    def read(self, path: Path, step: int) -> dict[int, Mapping[str, Any]]:
        """The rows of a file up to `step`, where a resumed stage goes on; later ones are cut off."""
        log = MetricsLog(path)
        if path.exists():
            self.sent = max((row["step"] for row in read_jsonl(path)), default=-1)
        log.resume_from(step)
        self._log = log
        return {row["step"]: row for row in read_jsonl(path)} if path.exists() else {}

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the model after `step` of `steps` steps is still to be measured."""
        regular = self._every > 0 and (step % self._every == 0 or step == steps)
        return step not in self.rows and (regular or step in self._at)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take up a row; write it where this process has read the file. Raises Stopped, as `after` does."""
        self.rows[row["step"]] = row
        if self._log is not None:
            self._log.append_row(row)
        if self.after is not None:
            self.after(self.rows)


def sentence(row: Mapping[str, Any], steps: int) -> str:
    """A measurement in words, for the screen."""
    several = "" if row["pass_at_k"] is None else f", pass@{row['samples']} {row['pass_at_k']:.1%}"
    several += "" if row.get("signal") is None else f", signal in {row['signal']:.1%} of groups"
    unscored = f", {row['unscored']:,} not scored" if row["unscored"] else ""
    interval = f"[{row['low']:.1%}, {row['high']:.1%}]"
    return (
        f"validation after step {row['step']:,} of {steps:,}: {row['accuracy']:.1%} right {interval} "
        f"of {row['n']:,}{several}{unscored}, {row['seconds']:.1f} s"
    )
