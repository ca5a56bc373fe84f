"""Counts the rows of a data source that lies on this machine, without opening an image."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from urllib.parse import parse_qs

from rlcs.data.files import is_data_file, read_file
from rlcs.data.source_options import read_options
from rlcs.data.sources import is_builtin
from rlcs.storage import at_home

PUBLISHED: Mapping[str, int] = MappingProxyType(
    {
        "WaltonFuture/Multimodal-Cold-Start": 51_534,
        "WaltonFuture/Multimodal-RL-Data": 31_818,
        "hiyouga/geometry3k": 601,
    }
)
"""Rows of the paper's sets on the hub; of Geometry3K those of its test split."""
_BUILTIN_COUNT = 1000
_CONVERSATIONS = ("conversations", "messages", "conversation", "completion")
"""Columns of other layouts, whose last turn is mostly an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The number of rows (None: unknown), how it is known, and whether the first has a given response."""

    count: int | None
    basis: str
    answered: bool = False


def rows_of(source: str, response: tuple[str, ...] = ()) -> Rows:
    """Count the rows of a source; `response` are the columns that make a row a demonstration."""
    if is_builtin(source):
        given = parse_qs(source.partition("?")[2]).get("count", [""])[0]
        return Rows(count=int(given) if given.isdigit() else _BUILTIN_COUNT, basis="built in")
    name, options = read_options(source)
    if name in PUBLISHED:
        return Rows(count=PUBLISHED[name], basis="published size", answered="Cold-Start" in name)
    path = at_home(name)
    if not (path.is_file() and is_data_file(path)):
        return Rows(count=None, basis="unknown")
    columns, rows = read_file(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        count, first = pyarrow.parquet.read_metadata(path).num_rows, dict.fromkeys(columns or (), True)
    else:
        remaining = iter(rows)
        first = dict(getattr(next(remaining, None), "fields", {}))
        count = bool(first) + sum(1 for _ in remaining)
    answers = {*response, *([options.response] if options.response else ()), *_CONVERSATIONS}
    if options.part is not None:
        held_out = round(count * options.part.share)
        count = held_out if options.part.name == "test" else count - held_out
    return Rows(count=count, basis="rows of the file", answered=any(first.get(each) for each in answers))
