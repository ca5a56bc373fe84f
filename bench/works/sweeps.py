"""How a GRPO step grows with group size, trunk, answer length and images: seconds, and their exponent.

An exponent of 1 is twice the seconds for twice the size, 0 no growth. Beside the group size stands TRL, which
repeats the prompt for every answer; the other sweeps are of our side alone.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.pairs import Options, Pair, row
from bench.shapes import Shape, make_case
from bench.sides import steps_in_turns
from bench.table import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What grows, over which values, and the shape at each; from `peer_from` on TRL runs too."""

    name: str
    values: Sequence[int]
    base: Shape
    peer_from: float = math.inf

    def shape(self, value: int) -> Shape:
        """The shape at one value."""
        changes: dict[str, Any] = (
            {"answers": (value, value)} if self.name == "answers" else {self.name: value}
        )
        return replace(self.base, **changes)


BASE = Shape(
    name="sweep",
    says="built-in model",
    model="built-in",
    prompts=2,
    group=8,
    trunk=100,
    side=112,
    answers=(40, 40),
)
SWEEPS = (
    Sweep(
        name="group",
        values=(2, 4, 8, 16, 32),  # a group of one has no advantages
        base=replace(BASE, prompts=8),
        peer_from=2,
    ),
    Sweep(name="trunk", values=(60, 200, 800, 2000), base=BASE),
    Sweep(name="answers", values=(25, 50, 100, 200, 400), base=BASE),
    Sweep(name="images", values=(1, 2, 4, 8), base=replace(BASE, trunk=250)),
)


def rows(options: Options) -> list[Row]:
    """A row for each value of each sweep; the exponent stands in the last of a sweep."""
    return [found for sweep in SWEEPS for found in measured(sweep, options)]


def measured(sweep: Sweep, options: Options) -> list[Row]:
    """One sweep."""
    pairs = {value: _pair(sweep, value, options) for value in sweep.values}
    peer = f"trl {version('trl')}" if sweep.peer_from < math.inf else ""
    return rows_of(sweep, pairs, peer)


def rows_of(sweep: Sweep, pairs: Mapping[int, Pair], peer: str) -> list[Row]:
    """The rows of a sweep from what was measured at its values."""
    rows = []
    ours = [pair.seconds for pair in pairs.values()]
    theirs = {value: pair.peer_seconds for value, pair in pairs.items() if pair.peer_seconds is not None}
    of_eight = {value: pair.seconds for value, pair in pairs.items()}.get(8)
    for value, pair in pairs.items():
        more: dict[str, Any] = {}
        if value == sweep.values[-1]:
            more["exponent"] = round(exponent(sweep.values, ours), 2)
            if theirs:
                more["peer_exponent"] = round(exponent(list(theirs), list(theirs.values())), 2)
        if sweep.name == "group" and of_eight:
            more["times_group_8"] = round(pair.seconds / of_eight, 2)
        rows.append(
            row(
                work="sweeps",
                shape=f"{sweep.name} {value:,}",
                phase="step",
                peer=peer if pair.theirs else "",
                pair=pair,
                **more,
            )
        )
    return rows


def _pair(sweep: Sweep, value: int, options: Options) -> Pair:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        case = make_case(sweep.shape(value), Path(folder), options.rounds, cpu_time=options.cpu_time)
        names = ("peer", "ours") if value >= sweep.peer_from else ("ours",)
        measured = steps_in_turns(case, names, memory=False)
    seconds = {name: [step.seconds["step"] for step in steps] for name, steps in measured.items()}
    return Pair(ours=seconds["ours"], theirs=seconds.get("peer", ()))


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(each) for each in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covered = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covered / sum((a - mean_x) ** 2 for a in x)
