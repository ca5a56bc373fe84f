"""Reads a source into problems and demonstrations, with a reason for every row that cannot be used.

`load` reads, `require_usable` decides whether the rows may be trained on.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rlcs.data.check import grouped
from rlcs.data.row_notes import counted
from rlcs.data.rows import BadRow, Row, RowReader
from rlcs.data.source_options import SourceOptions, read_options
from rlcs.data.sources import Role, Table, is_builtin, open_builtin, open_table
from rlcs.errors import DataError
from rlcs.recipe.schema import Data

_SHOWN = 5
_SHOWN_ENDING = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """The rows of a source, in order: the usable ones, and the bad ones with their reasons.

    `notes` say what a user should know: the layout, columns that differ, which gold answers were unwrapped.
    """

    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...] = ()
    source: str = ""
    notes: tuple[str, ...] = ()


class RowCounts:
    """Counts what a user should know of rows that could be read: their gold answers and system prompts."""

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self._marks: Counter[str] = Counter()
        self._example = ""
        self._own_systems = 0
        self._system_used = False

    def add(self, row: Row) -> None:
        """Count the next row."""
        if row.mark:
            self._example = self._example or _unwrapped_example(row)
            self._marks[row.mark] += 1
        if row.own_system:
            self._own_systems += 1
            self._system_used |= any(turn.role == "system" for turn in row.problem.history)

    def merge(self, later: "RowCounts") -> None:
        """Add what was counted of the rows that follow."""
        self._marks.update(later._marks)
        self._example = self._example or later._example
        self._own_systems += later._own_systems
        self._system_used |= later._system_used

    @property
    def lines(self) -> tuple[str, ...]:
        """How many gold answers were unwrapped, from what, and how many rows have a system prompt."""
        lines = []
        if self._marks:
            marks = ", ".join(f"{mark}: {n:,}" for mark, n in self._marks.most_common())
            total = self._marks.total()
            lines.append(f"{total:,} gold answers were unwrapped ({marks}), e.g. {self._example}")
        if self._own_systems:
            how = "used instead of prompt.system" if self._system_used else "left out (data.system=recipe)"
            lines.append(f"{counted(self._own_systems)} with a system prompt in the data, {how}")
        return tuple(lines)


def _unwrapped_example(row: Row) -> str:
    given = row.given if len(row.given) <= _SHOWN_ENDING else f"...{row.given[-_SHOWN_ENDING:]}"
    return f"row {row.problem.id}: {given!r} is {row.problem.answer[:_SHOWN_ENDING]!r}"


def open_source(source: str, settings: Data, role: Role) -> tuple[Table, Data, SourceOptions]:
    """Open a source with options: its rows, the settings by which they are read, and what it says of them.

    Raises DataError when it cannot be used as a whole.
    """
    whole, options = read_options(source)
    if options.response is not None:
        columns = settings.columns.model_copy(update={"response": (options.response,)})
        settings = settings.model_copy(update={"columns": columns})
    return open_table(whole, settings, role), settings, options


def load(
    source: str,
    settings: Data,
    *,
    decode_limit: int,
    role: Role,
    decode: bool = False,
    store: Path | None = None,
) -> Loaded:
    """Read a source; image headers are checked, and with `decode` every image is decoded in full.

    Images that are embedded in rows are held in memory, or written into the folder `store`.

    `source` is a JSONL, JSON, CSV, TSV or Parquet file, a folder of such files, a folder or hub id of a
    Hugging Face data set (with `?split=...&config=...` if need be), or `builtin:NAME?count=...&seed=...`.
    All but the last may have the options of `source_options`, as in `?part=test`.
    `decode_limit` is in pixels an image. `role` decides what a row must have: `ask` a question, `rl` and
    `test` also an answer; in `cold_start` a row with a response is a demonstration, and so is one whose
    *answer* is a worked solution that ends in a box (see `rows.demonstrated`).

    A row that cannot be used, also for a damaged image, is returned in `bad`. Raises DataError when the
    source as a whole cannot be used.
    """
    if is_builtin(source):
        problems = open_builtin(source, role)
        return Loaded(rows=tuple(Row(problem=p, response=None) for p in problems), source=source)
    table, settings, options = open_source(source, settings, role)
    reader = RowReader(table, settings, role=role, limit=decode_limit, decode=decode, store=store)
    rows: list[Row] = []
    bad: list[BadRow] = []
    for raw in table.rows:
        result = reader.read(raw)
        if isinstance(result, Row):
            rows.append(result)
        else:
            bad.append(result)
    rows = options.part.of(rows) if options.part else rows
    counts = RowCounts()
    for row in rows:
        counts.add(row)
    notes = (*table.notes, *reader.notes.lines, *counts.lines)
    return Loaded(rows=tuple(rows), bad=tuple(bad), source=source, notes=notes)


def require_usable(loaded: Loaded, settings: Data) -> None:
    """Raise DataError, with the kinds of faults, if no row is usable or too large a share is bad."""
    total = len(loaded.rows) + len(loaded.bad)
    if total == 0:
        raise DataError("the source has no rows", where=loaded.source, fix="name a source with data")
    if loaded.rows and len(loaded.bad) <= settings.max_bad_share * total:
        return
    lines = grouped(loaded.bad)
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"and {len(lines) - _SHOWN:,} more kinds of faults"]
    share = math.ceil(100 * len(loaded.bad) / total) / 100
    leave_out = f"or leave them out with data.max_bad_share={share:g}; " if loaded.rows else ""
    raise DataError(
        f"{len(loaded.bad):,} of {total:,} rows cannot be used "
        f"(allowed: {settings.max_bad_share:.1%})\n    " + "\n    ".join(lines),
        where=loaded.source,
        fix="correct the rows (`rlcs data check SOURCE --json` names them all, `--write GOOD.jsonl` writes "
        f"the others), {leave_out}data.answers=as_given leaves gold answers to a reward of your own",
    )
