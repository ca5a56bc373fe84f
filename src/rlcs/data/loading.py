"""Read a source: every row a problem or a demonstration, the bad ones set aside and named.

`load` reads, `check` also decodes every image, `require_usable` decides whether the rows may be trained on.
"""

from dataclasses import dataclass
from typing import Literal

from rlcs.data.rows import BadRow, Row, RowReader
from rlcs.data.sources import Role, is_builtin, open_builtin, open_table
from rlcs.errors import DataError
from rlcs.recipe.schema import Data

_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """Every row of a source, in its order: the usable ones, and the bad ones with their reasons."""

    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...] = ()
    source: str = ""


def load(source: str, settings: Data, *, decode_limit: int, role: Role) -> Loaded:
    """Read a source; image headers are checked, pixels are not decoded.

    `source` is a `.jsonl`, `.json` or `.parquet` file, a folder or hub id of a Hugging Face data set
    (with `?split=...&config=...` if need be), or `builtin:NAME?count=...&seed=...`. `decode_limit` is
    in pixels an image. `role` says what a row must hold: `ask` a question, `rl` and `test` an answer too; in
    `cold_start` a row with a response is a demonstration, and so is one whose *answer* is a worked
    solution that ends in a box (see `rows.demonstrated`).

    A bad row is returned as such. Raises DataError when the source as a whole cannot be used.
    """
    return _read(source, settings, decode_limit=decode_limit, role=role, images="header")


def check(source: str, settings: Data, *, decode_limit: int, role: Role) -> Loaded:
    """What `load` does, and every image is decoded in full: a damaged one makes its row a bad one."""
    return _read(source, settings, decode_limit=decode_limit, role=role, images="pixels")


def _read(
    source: str, settings: Data, *, decode_limit: int, role: Role, images: Literal["header", "pixels"]
) -> Loaded:
    if is_builtin(source):
        problems = open_builtin(source, role)
        return Loaded(rows=tuple(Row(problem=p, response=None) for p in problems), source=source)
    table = open_table(source, settings, role)
    reader = RowReader(table, settings, role=role, limit=decode_limit, decode=images == "pixels")
    rows: list[Row] = []
    bad: list[BadRow] = []
    for raw in table.rows:
        result = reader.read(raw)
        if isinstance(result, Row):
            rows.append(result)
        else:
            bad.append(result)
    return Loaded(rows=tuple(rows), bad=tuple(bad), source=source)


def require_usable(loaded: Loaded, settings: Data) -> None:
    """Raise DataError, with the first bad rows, if nothing is usable or too large a share is not."""
    total = len(loaded.rows) + len(loaded.bad)
    if total == 0:
        raise DataError("the source has no rows", where=loaded.source, fix="name a source with data")
    if loaded.rows and len(loaded.bad) <= settings.max_bad_share * total:
        return
    named = [str(row) for row in loaded.bad[:_SHOWN]]
    if len(loaded.bad) > _SHOWN:
        named.append(f"... and {len(loaded.bad) - _SHOWN:,} more")
    raise DataError(
        f"{len(loaded.bad):,} of {total:,} rows cannot be used "
        f"(allowed: {settings.max_bad_share:.1%})\n    " + "\n    ".join(named),
        where=loaded.source,
        fix="correct the rows (`rlcs data check SOURCE` names them all), or raise data.max_bad_share",
    )
