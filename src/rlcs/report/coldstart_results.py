"""The figures of a study of the cold start: every cell's accuracy before and after RL, and their differences.

A study's folder has `grid.json` with its cells, each a run folder below `cells/`. Cells that differ by their
seed alone are one result. Differences are paired: by problem, and over the seeds that both sides have.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

from rlcs.evals.intervals import interval_of_mean, wilson
from rlcs.recipe.coldstart import GIVEN, NONE
from rlcs.records import GradedSample
from rlcs.report.load_run import number, part, read_object, read_records, read_rows, text

GRID = "grid.json"
"""The file with the cells of a study, which makes a folder one."""
KINDS: Mapping[str, str] = {NONE: "no cold start", GIVEN: "the data's own", "self_critic": "self-critic"}
"""Kinds of demonstrations that are called by another word than their name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one cell ended: whether it `finished`, was `stopped` or `failed`, and each problem's right answers.

    A failed cell has learnt nothing that counts: its model is the one before RL.
    """

    name: str
    how: str
    why: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    sft_s: float
    rl_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The cells of one kind, number and length, by seed."""

    chain: str
    demonstrations: int
    epochs: float
    steps: int
    cells: Mapping[int, Outcome]

    @property
    def title(self) -> str:
        """What distinguishes it, in words."""
        if self.chain == NONE:
            return "no cold start"
        return (
            f"{self.demonstrations:,} demonstrations, {self.steps:,} {'step' if self.steps == 1 else 'steps'}"
        )

    @property
    def kind(self) -> str:
        """The kind of its demonstrations, in words."""
        return KINDS.get(self.chain, self.chain)

    @property
    def before(self) -> float:
        """Mean accuracy before RL."""
        return fmean(fmean(cell.before.values()) for cell in self.cells.values())

    @property
    def by_seed(self) -> tuple[float, ...]:
        """Accuracy after RL with each seed."""
        return tuple(fmean(cell.after.values()) for cell in self.cells.values())

    @property
    def after(self) -> float:
        """Mean accuracy after RL."""
        return fmean(self.by_seed)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of `after` over problems, which seeds share."""
        n = len(next(iter(self.cells.values())).after)
        return wilson(round(self.after * n), n)

    @property
    def stopped(self) -> int:
        """How many of its cells did not get all of their RL, so that it might be better than it is here."""
        return sum(cell.how == "stopped" for cell in self.cells.values())

    @property
    def sft_s(self) -> float:
        """Mean seconds of SFT."""
        return fmean(cell.sft_s for cell in self.cells.values())

    @property
    def rl_s(self) -> float:
        """Mean seconds of RL."""
        return fmean(cell.rl_s for cell in self.cells.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """One result's accuracy after RL minus another's, with an interval over problems."""

    points: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    @property
    def clear(self) -> bool:
        """Whether the interval and the difference of every seed lie on the same side of zero."""
        return (self.low > 0 or self.high < 0) and all(gap * self.points > 0 for gap in self.by_seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """A study, as far as it has come: what was measured, and how many cells there are in all."""

    folder: Path
    facts: Mapping[str, Any]
    none: Result | None
    cold: tuple[Result, ...]
    cells: int

    @property
    def over(self) -> int:
        """How many cells are over."""
        return sum(len(result.cells) for result in (*self.cold, *([self.none] if self.none else [])))

    @property
    def seeds(self) -> int:
        """How many seeds there are of a cell."""
        return len({row["seed"] for row in self.facts["cells"]})

    @property
    def z(self) -> float:
        """Half widths of intervals in standard errors.

        The chance that any comparison with no cold start shows a difference that is none is 5% for all of
        them together (Bonferroni).
        """
        return NormalDist().inv_cdf(1 - 0.025 / max(1, len(self.cold)))

    def gap(self, first: Result, second: Result) -> Gap | None:
        """The second result minus the first one; None where no seed has both."""
        seeds = [seed for seed in second.cells if seed in first.cells]
        if not seeds:
            return None
        moves: dict[str, list[float]] = {}
        for seed in seeds:
            before, after = first.cells[seed].after, second.cells[seed].after
            for name in before.keys() & after.keys():
                moves.setdefault(name, []).append(after[name] - before[name])
        means = [fmean(each) for each in moves.values()]
        low, high = interval_of_mean(means, self.z)
        by_seed = tuple(
            fmean(second.cells[s].after.values()) - fmean(first.cells[s].after.values()) for s in seeds
        )
        return Gap(points=fmean(means), low=low, high=high, by_seed=by_seed)

    def against_none(self, result: Result) -> Gap | None:
        """A result minus the one without a cold start."""
        return None if self.none is None or result.chain == NONE else self.gap(self.none, result)


def read(folder: Path) -> Results:
    """Read what a study has measured so far."""
    facts: Mapping[str, Any] = read_object(folder / GRID)
    found: dict[tuple[Any, ...], dict[int, Outcome]] = {}
    rows: list[dict[str, Any]] = facts.get("cells", [])
    for row in rows:
        key = (row["chain"], row["demonstrations"], row["epochs"], row["steps"])
        if (outcome := _outcome(folder, row)) is not None:
            found.setdefault(key, {})[row["seed"]] = outcome
    results = [
        Result(chain=chain, demonstrations=count, epochs=epochs, steps=steps, cells=cells)
        for (chain, count, epochs, steps), cells in found.items()
    ]
    results.sort(key=lambda result: (result.chain, result.demonstrations, result.steps))
    return Results(
        folder=folder,
        facts=facts,
        none=next((result for result in results if result.chain == NONE), None),
        cold=tuple(result for result in results if result.chain != NONE),
        cells=len(rows),
    )


def _outcome(folder: Path, row: Mapping[str, Any]) -> Outcome | None:
    """How a cell ended; None if it has not, or cannot be read."""
    cell = folder / "cells" / row["folder"]
    over = read_object(cell / "over.json")
    before = _right(cell / "eval" / "base")
    places = {"finished": cell / "eval" / "grpo", "stopped": cell / "stopped" / "eval" / "base"}
    how = text(over, "how")
    after = _right(places[how]) if how in places else before
    if not (over and before and after):
        return None
    done = read_object(folder / "sft" / row["sft"] / "sft" / "done.json")
    share = row["steps"] / (number(done, "optimizer_steps") or math.inf)
    seconds = [part(row, "seconds") for row in read_rows(cell / "grpo" / "metrics.jsonl")]
    return Outcome(
        name=row["folder"],
        how=how,
        why=text(over, "why"),
        before=before,
        after=after,
        sft_s=share * (number(done, "seconds") or 0.0),
        rl_s=sum(number(spent, name) or 0.0 for spent in seconds for name in spent),
    )


def _right(folder: Path) -> dict[str, float]:
    """Whether each problem was answered right, as 0 or 1."""
    rows = read_records(GradedSample, folder / "predictions.jsonl")
    return {row.sample.id: float(row.grade.correct is True) for row in rows}
