"""Reads data files into raw rows: JSON lines, JSON, CSV, TSV and Parquet, and finds those of a folder.

Values stay as they are written: a date or `007` in a text is not converted. JSON lines, CSV and Parquet are
read row by row, a JSON list is held as text; lines and texts are bounded, so that memory is.
"""

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any, cast

from rlcs.data.layouts import recognise
from rlcs.data.values import is_filled
from rlcs.errors import DataError
from rlcs.storage import parse_object, require_regular

BATCH = 64
"""Rows of Arrow tables that are read at once; few, because embedded images may be megabytes each."""
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_POINTER = b"version https://git-lfs"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_ESCAPED = re.compile("[\udc80-\udcff]")
"""What stands for bytes that are not UTF-8."""
_QUESTION = ("question", "problem", "query")
_SHORT_FLOATS = ("float", "halffloat")
"""Numbers of 32 and 16 bits: 0.1 is 0.1 among them, and 0.10000000149 with 64 bits."""
LONGEST_LINE = 1 << 26
"""Most bytes of one line, and of one cell: a row may hold images. A longer one is left out, unread."""
_BUFFER = 1 << 20  # a long line is skipped some ten times faster than with the usual 8 KiB
LARGEST_TEXT = 1 << 30
"""Most bytes of a JSON file that is one value, which is held as a whole."""
_SHOWN = 200
_DELIMITERS = ",;\t"
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files and folders that say to which split they belong, as `datasets` has them."""
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

Rows = Iterable["RawRow"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """One row with its columns unchanged; `number` is the line (from 1) or the row (from 0).

    A row that cannot be parsed has a `reason` and no `fields`.
    """

    where: str
    number: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


def _kind(path: Path) -> str:
    """The suffix that says what a file holds, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]


def is_data_file(path: Path) -> bool:
    """Whether the name of a file says that it is a data file."""
    kind = _kind(path)
    return kind in KINDS and not (kind == ".parquet" and path.suffix.lower() == ".gz")


def read_file(path: Path) -> tuple[tuple[str, ...] | None, Rows]:
    """The columns of a file, if they are known before its rows, and its rows. Raises DataError."""
    require_regular(path)
    return KINDS[_kind(path)](path)


def files_of(folder: Path, split: str | None, by_role: str) -> list[Path]:
    """The data files of a folder that belong to a split; none if it has no data file at all.

    The split is in the names, such as `train.jsonl`, `train-00000-of-00002.parquet` or `test/rows.csv`. Where
    no name has one, every file is data. Raises DataError when the split is missing, or files are of several
    kinds.
    """
    found = sorted(path for path in folder.rglob("*") if is_data_file(path) and _is_shown(path, folder))
    splits: dict[str, list[Path]] = {}
    for path in found:
        splits.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    chosen = splits.get(by_role, [])
    if found and not chosen:
        if split is not None or set(splits) != {""}:
            known = ", ".join(sorted(filter(None, splits))) or "none, by the names of its files"
            fix = f"its splits are: {known}; add ?split=NAME, or name one file"
            raise DataError(f"no split {by_role}", where=str(folder), fix=fix)
        chosen = found
    kinds = {_kind(path) for path in chosen}
    if len(kinds) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in chosen[:5])
        raise DataError(f"files of several kinds: {names}", where=str(folder), fix="name one of them")
    return chosen


def _is_shown(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    return not hidden and path.name not in _NO_DATA and path.is_file()


def _split_of(path: Path) -> str:
    words = [word for part in reversed(path.parts) for word in re.split(r"[^a-z]+", part.lower())]
    return next((split for word in words for split, names in _SPLITS.items() if word in names), "")


# ---------------------------------------------------------------------------------- JSON


def _open(path: Path) -> BufferedReader:
    """Open a regular file for reading, unpacked, after its byte order mark. Raises DataError."""
    require_regular(path)
    try:
        file = cast(BufferedReader, path.open("rb", buffering=_BUFFER))
        if file.peek(2)[:2] == _GZIP:  # whatever its name says
            file = cast(BufferedReader, gzip.open(file))  # noqa: SIM115 - returned
        start = file.read(len(_POINTER))
        file.seek(3 if start[:3] == _BOM else 0)
    except (OSError, EOFError) as error:
        raise _damaged(f"cannot be read: {error}", str(path)) from error
    if start[:2] in _UTF16 or b"\0" in start[:4]:
        raise DataError("the file is UTF-16", where=str(path), fix="save it as UTF-8")
    if start == _POINTER:
        raise no_content(path)
    return file


def no_content(path: Path) -> DataError:
    """The error for a file that Git LFS has not downloaded."""
    what = "only the pointer of Git LFS is here, not the file itself"
    return DataError(what, where=str(path), fix="run `git lfs pull` in its repository")


def _json(path: Path) -> tuple[None, Rows]:
    """JSON lines, or a list, or an object with the list: what the file holds counts, not its name."""
    with _open(path) as file:
        lines = (line for line in _guarded(_pieces(file), path) if line.strip())
        first, more = next(lines, b"").strip(), next(lines, None) is not None
    by_name = _kind(path) == ".json"
    is_lines = more and _is_whole(first)
    if (first[:1] == b"[" and not is_lines) or (by_name and first[:1] not in (b"[", b"{")):
        return None, _json_list(path)
    return None, JsonLines(path) if is_lines or not by_name else _json_object(path)


def _is_whole(line: bytes) -> bool:
    """Whether a line is a JSON value of its own."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


NumberedLine = tuple[int, bytes]
"""A line of a file, and its number from 1."""


class JsonLines:
    """The rows of a file with one JSON object a line; its lines can also be parsed elsewhere, each alone."""

    def __init__(self, path: Path) -> None:
        """Take the file, which is opened for each pass over its rows."""
        self._path = path

    def __iter__(self) -> Iterator[RawRow]:
        """Parse one line after the other."""
        return map(self.row, self.lines())

    def lines(self) -> Iterator[NumberedLine]:
        """The lines that are not blank. Raises DataError where the file is damaged."""
        with _open(self._path) as file:
            for number, line in enumerate(_guarded(_lines(file), self._path), start=1):
                if line.strip():
                    yield number, line

    def row(self, numbered: NumberedLine) -> RawRow:
        """Parse a line."""
        number, line = numbered
        where = f"{self._path}:{number}"
        try:
            if len(line) >= LONGEST_LINE:
                raise ValueError(f"the line is longer than {LONGEST_LINE:,} bytes")
            return RawRow(where=where, number=number, fields=parse_object(line))
        except ValueError as error:
            return RawRow(where=where, number=number, reason=str(error))


def _pieces(file: Any) -> Iterator[Any]:
    """The lines of a file of bytes or text; longer ones than LONGEST_LINE in pieces of that length."""
    while piece := file.readline(LONGEST_LINE):
        yield piece


def _lines(file: Any) -> Iterator[Any]:
    """The lines of a file; of one that is too long only the first piece, of length LONGEST_LINE.

    Raises EOFError for one without end.
    """
    length = 0
    for piece in _pieces(file):
        if not length:
            yield piece
        ends = len(piece) < LONGEST_LINE or piece[-1:] in (b"\n", "\n")
        length = 0 if ends else length + len(piece)
        if length > LARGEST_TEXT:  # as in a file with a hole
            raise EOFError(f"a line has more than {LARGEST_TEXT:,} bytes")


def _guarded(lines: Iterable[Any], path: Path) -> Iterator[Any]:
    """Lines of a file that may be packed. Raises DataError where it is damaged."""
    try:
        yield from lines
    except (OSError, EOFError) as error:
        raise _damaged(f"cannot be read: {error}", str(path)) from error


def _damaged(what: str, where: str) -> DataError:
    return DataError(what, where=where, fix="copy or download it again")


def _text(path: Path) -> str:
    try:
        data = bytearray()
        with _open(path) as file:
            for piece in _guarded(_pieces(file), path):
                data += piece
                if len(data) > LARGEST_TEXT:
                    fix = "write one object a line (.jsonl), which is read line by line"
                    what = f"the file is larger than {LARGEST_TEXT:,} bytes"
                    raise DataError(what, where=str(path), fix=fix)
        return data.decode()
    except UnicodeDecodeError as error:
        what = f"not UTF-8: {error.reason} at byte {error.start:,}"
        raise DataError(what, where=str(path), fix="save it as UTF-8") from error


def _json_list(path: Path) -> Iterator[RawRow]:
    """The items of a JSON list, one after the other, so that its text alone is held."""
    text, decoder, number = _text(path), json.JSONDecoder(), 0
    place = _past_space(text, 0)
    if text[place : place + 1] != "[":
        raise _no_json(path, "the file is no list of rows" if text.strip() else "the file is empty")
    place = _past_space(text, place + 1)
    while text[place : place + 1] != "]":
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise _no_json(path, f"not valid JSON in row {number} (counted from 0): {error}") from error
        yield _item(path, number, value)
        number += 1
        place = _past_space(text, place)
        if text[place : place + 1] == ",":
            place = _past_space(text, place + 1)
        elif text[place : place + 1] != "]":
            raise _no_json(path, f"not valid JSON after row {number - 1} (counted from 0)")
    if text[place + 1 :].strip():
        raise _no_json(path, "not valid JSON: there is more after the list")


def _past_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\n", "\r", "\t"):
        place += 1
    return place


def _no_json(path: Path, what: str) -> DataError:
    fix = "write a JSON list of objects, or one object a line"
    return DataError(what[:_SHOWN], where=str(path), fix=fix)


def _item(path: Path, number: int, value: object) -> RawRow:
    where = f"{path}#{number}"
    if isinstance(value, dict):
        return RawRow(where=where, number=number, fields=value)
    reason = f"a row must be a JSON object, not {type(value).__name__}"
    return RawRow(where=where, number=number, reason=reason)


def _json_object(path: Path) -> Iterator[RawRow]:
    """A file of one object: the one list of rows in it, a row for each of its keys, or a single row."""
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise _no_json(path, f"not valid JSON: {error}") from error
    lists = [key for key, value in content.items() if _is_rows(value)]
    if not content:
        raise _no_json(path, "the file holds one dict, not a list of rows")
    filled = {key: value for key, value in content.items() if is_filled(value)}
    if recognise(filled, has_question=False) or any(isinstance(filled.get(key), str) for key in _QUESTION):
        rows = [content]
    elif len(lists) > 1:
        raise _no_json(path, f"the file holds several lists: {', '.join(lists)}")
    elif lists:
        rows = content[lists[0]]
    elif all(isinstance(value, dict) for value in content.values()):
        rows = [{"id": key, **value} for key, value in content.items()]
    else:
        rows = [content]
    yield from (_item(path, number, value) for number, value in enumerate(rows))


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


# ---------------------------------------------------------------------------------- tables


def _table(path: Path) -> tuple[tuple[str, ...], Iterator[RawRow]]:
    """A CSV or TSV file, all of whose values are texts; an empty cell is null."""
    with _open(path) as file:
        first = file.readline(LONGEST_LINE).decode("utf-8", "replace")
    counts = {mark: first.count(mark) for mark in _DELIMITERS}
    delimiter = "\t" if _kind(path) == ".tsv" else max(_DELIMITERS, key=lambda mark: counts[mark])
    records = _records(path, delimiter)
    _, names, reason = next(records, (1, [], ""))
    if reason:
        raise DataError(f"the first line cannot be read: {reason}", where=str(path), fix="correct it")
    header = [name.strip() for name in names]
    if any(_ESCAPED.search(name) or not name.isprintable() for name in header):
        raise DataError("the first line is not text in UTF-8", where=str(path), fix="save it as UTF-8")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        what = f"two columns are named {twice[0][:_SHOWN]!r}"
        raise DataError(what, where=str(path), fix="the first line must name the columns, each once")
    return tuple(filter(None, header)), _table_rows(path, header, records)


def _table_rows(
    path: Path, header: list[str], records: Iterator[tuple[int, list[str], str]]
) -> Iterator[RawRow]:
    for number, cells, reason in records:
        where = f"{path}:{number}"
        if not reason and len(cells) != len(header):
            reason = f"{len(cells):,} cells in a table of {len(header):,} columns"
        if not reason and any(_ESCAPED.search(cell) for cell in cells):
            reason = "not UTF-8: save the file as UTF-8"
        if reason:
            yield RawRow(where=where, number=number, reason=reason)
        elif any(cells):
            pairs = zip(header, cells, strict=True)
            fields = {name: cell or None for name, cell in pairs if name}
            yield RawRow(where=where, number=number, fields=fields)


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """The first line, the cells and the fault of every record; a quoted cell may have line breaks."""
    with _open(path) as file:
        text = TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        lines = _guarded(_lines(text), path)

        def next_line() -> str:
            found = str(next(lines, ""))
            if len(found) >= LONGEST_LINE:
                raise csv.Error(f"the line is longer than {LONGEST_LINE:,} characters")
            return found

        reader = csv.reader(iter(next_line, ""), delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            before = csv.field_size_limit(LONGEST_LINE)  # of the process, for cells that hold images
            try:
                cells, reason = next(reader), ""
            except StopIteration:
                return
            except csv.Error as error:
                cells, reason = [], f"not a row of a table, is a quote not closed? ({error})"
            finally:
                csv.field_size_limit(before)
            if cells or reason:
                yield line, cells, reason


def _parquet(path: Path) -> tuple[tuple[str, ...], Iterator[RawRow]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    require_regular(path)
    try:
        with path.open("rb") as start:
            if start.read(len(_POINTER)) == _POINTER:
                raise no_content(path)
        file = ParquetFile(path, page_checksum_verification=True)
    except (ArrowException, OSError) as error:
        raise _damaged(f"not a readable Parquet file: {str(error)[:_SHOWN]}", str(path)) from error
    names = file.schema_arrow.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"two columns are named {twice[0][:_SHOWN]!r}", where=str(path), fix="rename one of them"
        )
    return tuple(names), batch_rows(file.iter_batches(BATCH), str(path))


def batch_rows(batches: Iterator[Any], name: str) -> Iterator[RawRow]:
    """Yield the rows of Arrow batches, converted one by one, so that invalid UTF-8 spoils only its row."""
    from pyarrow import ArrowException

    number = 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ArrowException, OSError) as error:
            raise _damaged(f"cannot be read beyond row {number}: {str(error)[:_SHOWN]}", name) from error
        short = {
            one.name: one.type.to_pandas_dtype() for one in batch.schema if str(one.type) in _SHORT_FLOATS
        }
        for offset in range(batch.num_rows):
            where = f"{name}#{number}"
            try:
                fields = batch.slice(offset, 1).to_pylist()[0]
                fields |= {key: float(str(kind(fields[key]))) for key, kind in short.items() if fields[key]}
                yield RawRow(where=where, number=number, fields=fields)
            except (ArrowException, ValueError, OverflowError) as error:
                yield RawRow(where=where, number=number, reason=f"cannot be decoded: {str(error)[:_SHOWN]}")
            number += 1


KINDS: Mapping[str, Callable[[Path], tuple[tuple[str, ...] | None, Rows]]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
"""How files are read, by the last part of their names; all but Parquet files may be packed (`.gz`)."""
