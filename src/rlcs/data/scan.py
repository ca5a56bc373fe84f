"""Reads and checks all rows of a table; of many lines, in several processes.

The result is that of one process: a part of the rows that depends on the rows before it is read once more.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

from rlcs.cores import usable_cores
from rlcs.data.files import JsonLines, NumberedLine
from rlcs.data.scan_workers import Chunk, ScanWorkers
from rlcs.data.scanner import Scanner, ScanTask

_CHUNK_ROWS = 1_000
_CHUNK_BYTES = 1 << 23
"""A chunk ends after so many rows or bytes: what a process gets at once."""
_MIN_CHUNKS = 20
"""Other processes read the rows if there are so many chunks; to start them costs as much as 10,000 rows."""
_MAX_WORKERS = 16
"""More are hardly kept busy: to send lines and to add what is found takes a thirtieth of the time of one."""


def scan(task: ScanTask) -> Scanner:
    """Scan all rows of a table. Raises DataError where it cannot be used as a whole."""
    scanner, rows = Scanner(task), task.table.rows
    workers = min(usable_cores(), _MAX_WORKERS)
    if not isinstance(rows, JsonLines) or workers < 2:
        scanner.read(rows)
        return scanner
    chunks = _chunks(rows.lines())
    first = [chunk for _, chunk in zip(range(_MIN_CHUNKS), chunks, strict=False)]
    if len(first) < _MIN_CHUNKS:
        scanner.read(map(rows.row, chain.from_iterable(first)))
        return scanner
    with ScanWorkers(task, workers) as others:
        for chunk, found in others.scanned(chain(first, chunks)):
            if found is None or not scanner.take(found):
                scanner.read(map(rows.row, chunk))
    return scanner


def _chunks(lines: Iterable[NumberedLine]) -> Iterator[Chunk]:
    chunk: Chunk = []
    size = 0
    for number, line in lines:
        chunk.append((number, line))
        size += len(line)
        if len(chunk) >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
