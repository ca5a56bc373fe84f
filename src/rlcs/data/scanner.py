"""Reads and checks rows of a table and holds none of them.

What was found in a part of the rows by another process can be taken, but where it depends on the rows before
that part, such as by an id that comes again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from rlcs.data.files import RawRow
from rlcs.data.loading import RowCounts
from rlcs.data.row_notes import RowNotes
from rlcs.data.rows import BadRow, Row, RowReader
from rlcs.data.sources import Role, Table
from rlcs.data.tally import PromptLimit, RowCheck
from rlcs.recipe.schema import Data


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanTask:
    """What to scan and how: see `RowReader`, `RowCheck`. Every image is decoded."""

    table: Table
    settings: Data
    role: Role
    decode_limit: int
    prompt_limit: PromptLimit


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What was found in some rows alone; `ids` and `looks_back` are those of the `RowReader`."""

    ids: dict[str, str]
    looks_back: bool
    bad: list[BadRow]
    notes: RowNotes
    counts: RowCounts
    check: RowCheck


class Scanner:
    """Reads rows and keeps what was found in them: `bad` ones, and `check` of the others."""

    def __init__(self, task: ScanTask) -> None:
        """Nothing is read yet. Raises DataError when the table lacks a column that every row needs."""
        self._task = task
        self._reader = RowReader(
            task.table, task.settings, role=task.role, limit=task.decode_limit, decode=True
        )
        self._reader.images.hold_no_bytes()
        self._begin()

    def _begin(self) -> None:
        golds = self._task.settings.answers == "unwrapped"
        self.bad: list[BadRow] = []
        self.check = RowCheck(self._task.prompt_limit, golds=golds)
        self._counts = RowCounts()

    def read(self, rows: Iterable[RawRow]) -> None:
        """Read the next rows."""
        for raw in rows:
            result = self._reader.read(raw)
            if isinstance(result, Row):
                self._counts.add(result)
                self.check.add(raw.number, result)
            else:
                self.bad.append(result)

    def read_alone(self, rows: Iterable[RawRow]) -> Found:
        """What is found in rows if there are no others before them; this scanner keeps none of it."""
        self._reader.forget()
        self._begin()
        self.read(rows)
        return Found(
            ids=self._reader.ids,
            looks_back=self._reader.looks_back,
            bad=self.bad,
            notes=self._reader.notes,
            counts=self._counts,
            check=self.check,
        )

    def take(self, found: Found) -> bool:
        """Add what was found in the next rows alone, unless it depends on the rows before them."""
        if found.looks_back or not self._reader.ids.keys().isdisjoint(found.ids):
            return False
        self._reader.ids |= found.ids
        self._reader.notes.merge(found.notes)
        self._counts.merge(found.counts)
        self.check.merge(found.check)
        self.bad += found.bad
        return True

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the rows."""
        return (*self._task.table.notes, *self._reader.notes.lines, *self._counts.lines)
