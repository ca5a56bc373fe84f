"""Reads rows of a table and holds none of them: each goes into a sink, which keeps what it needs.

What was found in a part of the rows by another process can be taken, but where it depends on the rows before
that part, such as by an id that comes again.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from rlcs.data.files import RawRow
from rlcs.data.row_counts import RowCounts
from rlcs.data.row_notes import RowNotes
from rlcs.data.rows import BadRow, Row, RowReader
from rlcs.data.sources import Role, Table
from rlcs.recipe.schema import Data


class Sink(Protocol):
    """Takes rows, one after the other; `place` is a number that grows from row to row."""

    def add(self, place: int, row: Row) -> None:
        """Take the next row."""
        ...

    def merge(self, other: Any) -> None:
        """Take what another sink of the task took of the next rows."""
        ...


S = TypeVar("S", bound=Sink)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanTask(ABC, Generic[S]):
    """What to scan and how: see `RowReader`."""

    table: Table
    settings: Data
    role: Role
    decode_limit: int

    @abstractmethod
    def reader(self) -> RowReader:
        """A reader of the rows. Raises DataError when the table lacks a column that every row needs."""

    @abstractmethod
    def sink(self) -> S:
        """A new sink for rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found(Generic[S]):
    """What was found in some rows alone; `ids` and `looks_back` are those of the `RowReader`."""

    ids: dict[str, str]
    looks_back: bool
    bad: list[BadRow]
    notes: RowNotes
    counts: RowCounts
    sink: S


class Scanner(Generic[S]):
    """Reads rows, and keeps what was found in them: `bad` ones, and the `sink` of the others."""

    def __init__(self, task: ScanTask[S], sink: S | None = None) -> None:
        """Nothing is read yet. Raises DataError when the table lacks a column that every row needs."""
        self._task = task
        self._reader = task.reader()
        self._begin(sink)

    def _begin(self, sink: S | None) -> None:
        self.bad: list[BadRow] = []
        self.sink: S = self._task.sink() if sink is None else sink
        self._counts = RowCounts()

    def read(self, rows: Iterable[RawRow]) -> None:
        """Read the next rows."""
        for raw in rows:
            result = self._reader.read(raw)
            if isinstance(result, Row):
                self._counts.add(result)
                self.sink.add(raw.number, result)
            else:
                self.bad.append(result)

    def read_alone(self, rows: Iterable[RawRow]) -> Found[S]:
        """What is found in rows if there are no others before them; this scanner keeps none of it."""
        self._reader.forget()
        self._begin(None)
        self.read(rows)
        return Found(
            ids=self._reader.ids,
            looks_back=self._reader.looks_back,
            bad=self.bad,
            notes=self._reader.notes,
            counts=self._counts,
            sink=self.sink,
        )

    def take(self, found: Found[S]) -> bool:
        """Add what was found in the next rows alone, unless it depends on the rows before them."""
        if found.looks_back or not self._reader.ids.keys().isdisjoint(found.ids):
            return False
        self._reader.ids |= found.ids
        self._reader.notes.merge(found.notes)
        self._counts.merge(found.counts)
        self.sink.merge(found.sink)
        self.bad += found.bad
        return True

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the rows: how they were read, then their gold answers and prompts."""
        return (*self._task.table.notes, *self.notes_of_reading, *self.counts)

    @property
    def notes_of_reading(self) -> tuple[str, ...]:
        """What a user should know of how the rows were read."""
        return self._reader.notes.lines

    @property
    def counts(self) -> tuple[str, ...]:
        """What a user should know of gold answers and system prompts."""
        return self._counts.lines
