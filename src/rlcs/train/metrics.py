"""The metrics file of a training stage.

A full disk never stops the run: it is reported once, through `logging`, and the rows that could not be
written follow with the next one that can.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from rlcs.progress import SinkGuard
from rlcs.records import StepReport, to_row
from rlcs.storage import append_jsonl, parse_object


class MetricsLog:
    """Appends rows of steps to a JSONL file without ever leaving one out."""

    def __init__(self, path: Path) -> None:
        """Reads and writes nothing until the first row or `resume_from`."""
        self._path = path
        self._guard = SinkGuard(f"metrics file {path}")
        self._waiting: list[Mapping[str, object]] = []

    def append(self, report: StepReport) -> None:
        """Write one row now; never raises."""
        self.append_row(to_row(report))

    def append_row(self, row: Mapping[str, object]) -> None:
        """Write one row, which has a `step`, now; never raises."""
        self._waiting.append(row)
        self._guard.run(self._write)

    def resume_from(self, step: int) -> None:
        """Drop the rows after checkpoint `step`, which the resumed run writes again; never raises."""
        self._waiting.clear()
        self._guard.run(lambda: self._cut(step))

    def _write(self) -> None:
        append_jsonl(self._path, self._waiting, sync=False)
        self._waiting.clear()

    def _cut(self, step: int) -> None:
        """Cut the file off before the first row after `step`, or before a torn last line."""
        if not self._path.exists():
            return
        end = 0
        for line in self._path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is torn
            if _step_of(line) > step:
                break
            end += len(line) + 1
        os.truncate(self._path, end)


def _step_of(line: bytes) -> int:
    try:
        step = parse_object(line).get("step", 0)
    except ValueError:
        return 0
    return step if isinstance(step, int) else 0
