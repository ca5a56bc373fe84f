"""Seconds and resident memory of the phases of a step."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

PHASES = ("rollout", "logprobs", "update")
PAGE = 4096
INTERVAL_S = 0.002


@dataclass(kw_only=True)
class Measured:
    """One step: `seconds` by phase and of the whole `step`; `peaks` in bytes above what stood before it.

    `busy` is CPU seconds over wall seconds of the step: far below the number of threads, something
    else had the machine and the seconds mean little.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    busy: float = 0.0


def wall_seconds() -> float:
    """Wall seconds; a GPU's work until now is waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def trim() -> None:
    """Give freed memory back, so that what is resident is what is held (glibc)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


class Meter:
    """Measures one step. Memory is sampled in a thread, and only when `memory` is set.

    What stands before the step (weights, reference, optimiser state, libraries) is subtracted.
    """

    def __init__(self, *, memory: bool, cpu_time: bool = False) -> None:
        self.measured = Measured()
        self._phase = "step"
        self._memory = memory
        self._now = time.process_time if cpu_time else wall_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Meter":
        """Start the clock of the whole step."""
        if self._memory:
            trim()
            self._before = resident()
            self._thread.start()
        self._began = time.perf_counter(), time.process_time()
        self._started = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """Stop the clock."""
        self.measured.seconds["step"] = self._now() - self._started
        wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        self.measured.busy = cpu / wall
        self._done.set()
        if self._memory:
            self._thread.join()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the body to a phase."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def begin(self, name: str) -> None:
        """Count what follows to a phase; a phase may come in several pieces."""
        self._phase = name
        self._phase_started = self._now()

    def end(self) -> None:
        """Close the phase."""
        seconds = self.measured.seconds
        seconds[self._phase] = seconds.get(self._phase, 0.0) + self._now() - self._phase_started
        self._phase = "step"

    def _sample(self) -> None:
        while not self._done.wait(INTERVAL_S):
            above = resident() - self._before
            for name in {self._phase, "step"}:
                self.measured.peaks[name] = max(self.measured.peaks.get(name, 0), above)
