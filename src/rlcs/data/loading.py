"""Reads a source into problems and demonstrations, with a reason for every row that cannot be used.

`load` reads, `require_usable` decides whether the rows may be trained on.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlcs.data.check import grouped
from rlcs.data.row_cache import RowCache
from rlcs.data.row_counts import RowCounts
from rlcs.data.row_index import RowIndex
from rlcs.data.rows import BadRow, Row, RowReader
from rlcs.data.scan import Watch, is_large, unwatched, watched
from rlcs.data.source_options import SourceOptions, read_options
from rlcs.data.sources import Role, Table, is_builtin, open_builtin, open_table
from rlcs.data.stored import Stored, chosen, remembered
from rlcs.errors import DataError, RunFolderError
from rlcs.recipe.schema import Data

_LOG = logging.getLogger("rlcs")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """The rows of a source, in order: the usable ones, and the bad ones with their reasons.

    `notes` say what a user should know: the layout, columns that differ, which gold answers were unwrapped.
    """

    rows: Sequence[Row]
    bad: Sequence[BadRow] = ()
    source: str = ""
    notes: tuple[str, ...] = ()


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
    watch: Watch = unwatched,
) -> Loaded:
    """Read a source; image headers are checked, and with `decode` every image is decoded in full.

    `watch` is told how far the reading is.

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
    return _held(source, table, reader, options, watch)


def load_indexed(
    source: str,
    settings: Data,
    *,
    decode_limit: int,
    role: Role,
    store: Path | None = None,
    watch: Watch = unwatched,
) -> Loaded:
    """Read a source as `load` does, but the rows of a large one lie on disk, and are read when asked for.

    The next call finds them there as long as nothing changes: see `row_cache`. `watch` is told how far the
    reading is. Raises DataError.
    """
    if is_builtin(source):
        return load(source, settings, decode_limit=decode_limit, role=role)
    table, settings, options = open_source(source, settings, role)
    index, table = _index_of(table, settings, role=role, decode_limit=decode_limit, watch=watch)
    if index is None:
        reader = RowReader(table, settings, role=role, limit=decode_limit, decode=False, store=store)
        return _held(source, table, reader, options, watch)
    rows: Sequence[Row] = Stored(index, Row)
    counts = index.head.counts
    if options.part:
        rows = chosen(rows, options.part.positions(rows))
        counts = tuple(remembered(rows, "counts", None, lambda: _counts(rows)))
    notes = (*table.notes, *index.head.notes, *counts)
    return Loaded(rows=rows, bad=index.head.bad, source=source, notes=notes)


def _held(source: str, table: Table, reader: RowReader, options: SourceOptions, watch: Watch) -> Loaded:
    results = list(map(reader.read, watched(table.rows, watch)))
    rows: Sequence[Row] = tuple(result for result in results if isinstance(result, Row))
    bad = tuple(result for result in results if isinstance(result, BadRow))
    if options.part:
        rows = chosen(rows, options.part.positions(rows))
    notes = (*table.notes, *reader.notes.lines, *_counts(rows))
    return Loaded(rows=rows, bad=bad, source=source, notes=notes)


def _index_of(
    table: Table, settings: Data, *, role: Role, decode_limit: int, watch: Watch
) -> tuple[RowIndex | None, Table]:
    """The index of a large table, which is written if there is none, and the table to read without one."""
    if not (table.files or table.fingerprint):  # it is not known whether it changes
        return None, table
    try:
        cache = RowCache(table, settings, role=role, decode_limit=decode_limit)
        if index := cache.find():
            return index, table
        large, rows = is_large(table.rows)
        return (cache.write(rows, watch), table) if large else (None, replace(table, rows=rows))
    except (OSError, RunFolderError) as error:  # of the cache: faults of a source are DataErrors
        _LOG.warning("%s is held in memory, as its rows cannot be written to disk: %s", table.source, error)
        return None, open_table(table.source, settings, role)


def _counts(rows: Iterable[Row]) -> list[str]:
    counts = RowCounts()
    for row in rows:
        counts.add(row)
    return list(counts.lines)


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
