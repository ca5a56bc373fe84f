"""Reads and checks all rows of a table; of many lines, in several processes.

The result is that of one process: a part of the rows that depends on the rows before it is read once more.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import TypeVar

from rlcs.cores import usable_cores
from rlcs.data.files import JsonLines, NumberedLine, RawRow
from rlcs.data.scan_workers import Chunk, ScanWorkers
from rlcs.data.scanner import S, Scanner, ScanTask

_CHUNK_ROWS = 1_000
_CHUNK_BYTES = 1 << 23
"""A chunk ends after so many rows or bytes: what a process gets at once."""
_MIN_CHUNKS = 20
"""Other processes read the rows if there are so many chunks; to start them costs as much as 10,000 rows."""
LARGE = _MIN_CHUNKS * _CHUNK_ROWS
"""Rows of a table whose rows do not stand in lines, from which on it counts as large."""
_MAX_WORKERS = 16
"""More are hardly kept busy: to send lines and to add what is found takes a thirtieth of the time of one."""


T = TypeVar("T")
Watch = Callable[[int], None]
"""What is done now and then while rows are read: it gets their number."""
WATCHED = 10_000
"""Rows after which it is done."""


def unwatched(rows: int) -> None:
    """Do nothing."""
    del rows


def scan(task: ScanTask[S], sink: S | None = None, watch: Watch = unwatched) -> Scanner[S]:
    """Scan all rows of a table into a sink, by default a new one of the task; see `Watch`.

    Raises DataError where the table cannot be used as a whole.
    """
    scanner, rows = Scanner(task, sink), task.table.rows
    workers = min(usable_cores(), _MAX_WORKERS)
    if not isinstance(rows, JsonLines) or workers < 2:
        scanner.read(watched(rows, watch))
        return scanner
    chunks = _chunks(watched(rows.lines(), watch))
    first = [chunk for _, chunk in zip(range(_MIN_CHUNKS), chunks, strict=False)]
    if len(first) < _MIN_CHUNKS:
        scanner.read(map(rows.row, chain.from_iterable(first)))
        return scanner
    with ScanWorkers(task, workers) as others:
        for chunk, found in others.scanned(chain(first, chunks)):
            if found is None or not scanner.take(found):
                scanner.read(map(rows.row, chunk))
    return scanner


def watched(items: Iterable[T], watch: Watch) -> Iterator[T]:
    """The items, of which every WATCHED-th calls `watch`."""
    for number, item in enumerate(items, start=1):
        yield item
        if number % WATCHED == 0:
            watch(number)


def is_large(rows: Iterable[RawRow]) -> tuple[bool, Iterable[RawRow]]:
    """Whether rows are more than LARGE, or of large lines; and the same rows, of which some may be held."""
    if isinstance(rows, JsonLines):
        chunks = zip(range(_MIN_CHUNKS), _chunks(rows.lines()), strict=False)
        return sum(1 for _ in chunks) == _MIN_CHUNKS, rows
    others, first, size = iter(rows), list[RawRow](), 0
    for row in others:
        first.append(row)
        size += _num_bytes(row.fields)
        if len(first) >= LARGE or size >= _MIN_CHUNKS * _CHUNK_BYTES:
            return True, chain(_taken(first), others)
    return False, first


def _num_bytes(value: object) -> int:
    """About how much memory the texts and images of a row take."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if isinstance(value, list) else 0


def _taken(items: list[T]) -> Iterator[T]:
    """The items of a list, which they leave, so that their memory becomes free."""
    items.reverse()
    while items:
        yield items.pop()


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
