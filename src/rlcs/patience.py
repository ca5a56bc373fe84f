"""Limits in seconds that hold on a slow machine: the time that a process had, not the time that passed.

A limit is to end what hangs, never what is starved: on a machine with ten times the work it can do, a healthy
process needs ten times as long.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil

T = TypeVar("T")

LONGEST = 20
"""Most seconds that may pass for each second of a limit, whatever kept the process from its work."""
LOOKS = 10
"""A process that has not worked in so many looks in a row counts as waiting, whatever its state."""
_LEAST_SHARE = 0.02  # of a core: processes that use less, and could use more, wait for something
_STOPPED = {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP}
_NOT_BY_CHOICE = {psutil.STATUS_RUNNING, psutil.STATUS_WAKING, psutil.STATUS_DISK_SLEEP, *_STOPPED}
"""States of a process that would go on if the machine let it."""


class OwnTime:
    """A clock of the seconds that a process and its descendants have had.

    What counts is their CPU time, and time in which all of them wait by choice (asleep, or for a reply), but
    never more than the time that passed. Time in which one could run and did not (the cores are busy, it was
    stopped, its disk is slow) does not count, unless that one has not run in the last LOOKS looks; nor does
    time in which this process itself could not look. Where one was stopped for as many looks, all time
    counts, whatever the others do. Where states of processes cannot be read (not Linux), time that passes
    counts.
    """

    def __init__(
        self, pid: int | None, tick_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Look at a process every `tick_s`; it may end at any time. None: one elsewhere, that only waits."""
        self.tick_s, self.clock = tick_s, clock
        self._pid = pid if sys.platform == "linux" else None
        self._looked = clock()
        self._seconds = 0.0
        self._seen: dict[int, _Seen] = {}

    @property
    def next_look_s(self) -> float:
        """Seconds until `seconds` changes."""
        return max(0.0, self._looked + self.tick_s - self.clock())

    @property
    def seconds(self) -> float:
        """The seconds so far. To be read about every `tick_s`; more often costs nothing."""
        now = self.clock()
        if (passed := now - self._looked) >= self.tick_s:
            self._looked = now
            self._seconds += self._counted(passed)
        return self._seconds

    def _counted(self, passed: float) -> float:
        """The part of the time since the last look that counts."""
        before, waits, is_stopped, used = self._seen, True, False, 0.0
        self._seen = {}
        for process in _tree(self._pid) if self._pid is not None else ():
            with suppress(psutil.Error):
                times, switches = process.cpu_times(), sum(process.num_ctx_switches())
                cpu, last = times.user + times.system, before.get(process.pid)
                has_run = last is None or (cpu, switches) != (last.cpu, last.switches)
                idle = 0 if last is None or has_run else last.idle + 1
                self._seen[process.pid] = _Seen(cpu=cpu, switches=switches, idle=idle)
                used += 0.0 if last is None else cpu - last.cpu
                status = process.status()
                waits = waits and (idle > LOOKS or status not in _NOT_BY_CHOICE)
                is_stopped = is_stopped or (idle > LOOKS and status in _STOPPED)
        waits = waits and used < _LEAST_SHARE * passed
        return min(passed, 2 * self.tick_s if waits or is_stopped else used)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """A process at a look: its CPU time (in steps of 10 ms), its context switches, and looks without work."""

    cpu: float
    switches: int
    idle: int


class Patience:
    """A limit in seconds of a process's own time, which begins now; it ends after LONGEST times the limit."""

    def __init__(self, own: OwnTime, limit_s: float) -> None:
        """The first tick is given away, so that what ends within it needs no look at the process."""
        self.own, self.limit_s = own, limit_s
        self._began, self._before = own.clock(), None if limit_s > own.tick_s else own.seconds

    @property
    def is_over(self) -> bool:
        """Whether the limit is reached."""
        passed = self.own.clock() - self._began
        if self._before is None:
            if passed < self.own.tick_s:
                return False
            self._before = self.own.seconds
        return self.own.seconds - self._before >= self.limit_s or passed >= LONGEST * self.limit_s


async def within(patience: Patience, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises TimeoutError, and cancels it, when the patience is over."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            if patience.is_over:
                raise TimeoutError
            await asyncio.wait([task], timeout=patience.own.tick_s)
        return task.result()
    finally:
        task.cancel()


def run_within(limit_s: float, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command, which has so many seconds. Raises OSError, and TimeoutExpired with its process ended."""
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(
        command, stdin=null, stdout=pipe, stderr=pipe, text=True, errors="replace"
    ) as process:
        patience = Patience(OwnTime(process.pid, min(1.0, limit_s / 10)), limit_s)
        while True:
            try:
                out, error = process.communicate(timeout=patience.own.tick_s)
            except subprocess.TimeoutExpired:
                if patience.is_over:
                    process.kill()
                    raise
            else:
                return subprocess.CompletedProcess(command, process.returncode, out, error)


def _tree(pid: int) -> Iterator[psutil.Process]:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)
