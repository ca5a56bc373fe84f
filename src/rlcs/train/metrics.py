"""The metrics file of a training stage.

A sink: a full disk is told once, through `logging`, and never stops the run. The file is repaired and
caught up on the next step that can write it.
"""

import os
from json import dumps, loads
from pathlib import Path

from rlcs.progress import SinkGuard
from rlcs.records import StepReport, to_row


class MetricsLog:
    """Appends step reports to a JSONL file, one whole line at a time.

    A torn last line (a killed writer) is dropped before the first write. Rows that could not be
    written wait in memory and go out with the next one that can, so the file has no holes.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is read or written until the first row or `resume_from`."""
        self._path = path
        self._guard = SinkGuard(f"metrics file {path}")
        self._waiting: list[bytes] = []
        self._end: int | None = None  # bytes of whole lines; None: not looked at yet

    def append(self, report: StepReport) -> None:
        """Write one row now; never raises."""
        self._waiting.append(dumps(to_row(report)).encode() + b"\n")
        self._guard.run(self._write)

    def resume_from(self, step: int) -> None:
        """Drop the rows after checkpoint `step`, which the continued run writes again; never raises."""
        self._waiting.clear()
        self._end = None
        self._guard.run(lambda: self._cut(step))

    def _cut(self, step: int) -> None:
        if not self._path.exists():
            return
        self._end = _rows_end(self._path.read_bytes(), step)
        os.truncate(self._path, self._end)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            if self._end is None:
                self._end = _rows_end(file.read(), None)
            # A file that someone shortened must not be filled up with zeros.
            self._end = min(self._end, os.fstat(file.fileno()).st_size)
            file.truncate(self._end)
            file.seek(self._end)
            rows = b"".join(self._waiting)
            file.write(rows)
            file.flush()
        self._end += len(rows)
        self._waiting.clear()


def _rows_end(data: bytes, last_step: int | None) -> int:
    """Bytes of the whole lines at the start of `data`, up to the first row after `last_step`."""
    end = 0
    for line in data.split(b"\n")[:-1]:  # what follows the last newline is torn, or nothing
        if last_step is not None and _step_of(line) > last_step:
            break
        end += len(line) + 1
    return end


def _step_of(line: bytes) -> int:
    try:
        row = loads(line)
    except ValueError:
        return 0
    step = row.get("step", 0) if isinstance(row, dict) else 0
    return step if isinstance(step, int) else 0
