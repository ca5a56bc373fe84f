"""Measures the seconds of a training step by its phases."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rlcs.errors import out_of_memory_in


class Clock:
    """Measures wall seconds by phase: `with clock("update"): ...`. OutOfMemory names the phase."""

    def __init__(self) -> None:
        """Starts all phases at zero."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the seconds of the body to a phase."""
        started = time.perf_counter()
        try:
            with out_of_memory_in(phase):
                yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
