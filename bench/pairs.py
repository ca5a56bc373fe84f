"""Two sides of one work, measured in turns: whatever else the machine does falls on both."""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from bench.meter import wall_seconds
from bench.table import Row
from rlcs.model.loading import default_device

Clock = Callable[[], float]
"""Seconds since any moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line chose: measured `rounds`, the kind of seconds, a `model` (a folder or a name)."""

    rounds: int = 3
    cpu_time: bool = False
    model: str = "builtin"

    @property
    def device(self) -> torch.device:
        """The GPU, if there is one."""
        return default_device()

    @property
    def clock(self) -> Clock:
        """The clock of works that run in this process and below it."""
        return cpu_seconds if self.cpu_time else wall_seconds


def cpu_seconds(root: int | None = None) -> float:
    """CPU seconds of a process (this one by default) and of all that it has started."""
    process = psutil.Process(root)
    family = [process, *process.children(recursive=True)]
    return float(sum(times.user + times.system for times in map(_times, family) if times))


def _times(process: psutil.Process) -> Any:
    try:
        return process.cpu_times()
    except psutil.NoSuchProcess:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Seconds of both sides, a number a round; `theirs` is empty where no peer was measured."""

    ours: Sequence[float]
    theirs: Sequence[float] = field(default=())

    @property
    def seconds(self) -> float:
        """Our median."""
        return statistics.median(self.ours)

    @property
    def peer_seconds(self) -> float | None:
        """The peer's median."""
        return statistics.median(self.theirs) if self.theirs else None

    @property
    def ratio(self) -> float | None:
        """The peer's median over ours."""
        return None if self.peer_seconds is None else self.peer_seconds / self.seconds

    @property
    def spread(self) -> tuple[float, float] | None:
        """The smallest and the largest ratio of one round."""
        ratios = [other / mine for mine, other in zip(self.ours, self.theirs, strict=False)]
        return (min(ratios), max(ratios)) if ratios else None


def in_turns(
    ours: Callable[[], object], theirs: Callable[[], object] | None, *, rounds: int, clock: Clock
) -> Pair:
    """Run both so many rounds in turn; each should have run once before, for what is set up at first use."""
    mine: list[float] = []
    others: list[float] = []
    for _ in range(rounds):
        for side, seconds in ((theirs, others), (ours, mine)):
            if side is not None:
                gc.collect()
                started = clock()
                side()
                seconds.append(clock() - started)
    return Pair(ours=mine, theirs=others)


def row(
    *,
    work: str,
    shape: str,
    phase: str,
    peer: str,
    pair: Pair,
    share_of_limit: float | None = None,
    **more: Any,
) -> Row:
    """One row of the table; `more` are figures of one kind of work, under names that say their units."""
    spread = pair.spread
    return {
        "work": work,
        "shape": shape,
        "phase": phase,
        "peer": peer,
        "ratio": None if pair.ratio is None else round(pair.ratio, 3),
        "spread": None if spread is None else [round(each, 3) for each in spread],
        "share_of_limit": share_of_limit,
        "seconds": round(pair.seconds, 4),
        "peer_seconds": None if pair.peer_seconds is None else round(pair.peer_seconds, 4),
        **more,
    }
