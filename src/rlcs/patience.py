"""Limits in seconds that hold on a slow machine: the time that a process had, not the time that passed.

A limit is to end what hangs, never what is starved: on a machine with ten times the work it can do, a healthy
process needs ten times as long.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import psutil

LONGEST = 20
"""Most seconds that may pass for each second of a limit, whatever kept the process from its work."""
_LEAST_SHARE = 0.02  # of a core: processes that use less, and could use more, wait for something
_TICK_S = 0.5
_NOT_BY_CHOICE = {
    psutil.STATUS_RUNNING,
    psutil.STATUS_WAKING,
    psutil.STATUS_DISK_SLEEP,
    psutil.STATUS_STOPPED,
    psutil.STATUS_TRACING_STOP,
}
"""States of a process that would go on if the machine let it."""


class Patience:
    """The seconds that a process and its descendants have had of a limit, since `restart`.

    What counts is their CPU time, and time in which all of them wait by choice (asleep, or for a reply).
    Time in which one could run and did not (the cores are busy, it was stopped, its disk is slow) does not
    count, nor does time in which this process itself could not look. After LONGEST times the limit patience
    ends in any case. Where a process's state cannot be read (not Linux), time that passes counts.
    """

    def __init__(self, pid: int, limit_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`pid` is the process; it may end at any time."""
        self.limit_s, self.tick_s = limit_s, min(limit_s / 10, max(_TICK_S, limit_s / 100))
        self._pid, self._clock = pid, clock
        self.restart()

    def restart(self) -> None:
        """Begin to count anew."""
        self._began = self._looked = self._clock()
        self._had, self._cpu = 0.0, dict[int, float]()

    @property
    def next_look_s(self) -> float:
        """Seconds until `is_over` looks again."""
        return max(0.0, self._looked + self.tick_s - self._clock())

    @property
    def is_over(self) -> bool:
        """Whether the limit is reached. To be called about every `tick_s`; more often costs nothing."""
        now = self._clock()
        if sys.platform != "linux":
            return now - self._began >= self.limit_s
        if (passed := now - self._looked) >= self.tick_s:
            self._looked = now
            self._had += self._counted(passed)
        return self._had >= self.limit_s or now - self._began >= LONGEST * self.limit_s

    def _counted(self, passed: float) -> float:
        """The part of the time since the last look that counts; at the first look all that may."""
        before, self._cpu, waits = self._cpu, {}, True
        for process in _tree(self._pid):
            with suppress(psutil.Error):
                times = process.cpu_times()
                self._cpu[process.pid] = times.user + times.system
                waits = waits and process.status() not in _NOT_BY_CHOICE
        used = sum(cpu - before.get(pid, cpu) for pid, cpu in self._cpu.items())
        waits = waits and used < _LEAST_SHARE * passed
        return min(passed, 2 * self.tick_s if waits else used)


def _tree(pid: int) -> Iterator[psutil.Process]:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)
