"""Stops a run at its next safe point on the first Ctrl-C or SIGTERM, and at once on the second.

Long loops check the flag between two units of work, save, and raise `Stopped`.
"""

import signal
from types import FrameType
from typing import Any, Self

from rlcs.errors import RlcsError


class Stopped(RlcsError):
    """A signal stopped the run; everything done is saved. Exit code 130, as of shells after Ctrl-C."""

    exit_code = 130


class StopFlag:
    """A context in which SIGINT and SIGTERM set a flag instead of killing the process."""

    def __init__(self) -> None:
        """Start unset; handlers are installed when the context is entered."""
        self.is_set = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Handle both signals (in the main thread, where Python delivers them)."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True

    def check(self, where: str) -> None:
        """Raise Stopped if the flag is set; call it where everything done is on disk."""
        if self.is_set:
            raise Stopped("stopped as asked", where=where, fix="the same command continues from here")
