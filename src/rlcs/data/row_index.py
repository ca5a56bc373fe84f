"""Rows of a source in a folder, of which few are in memory at a time.

`rows.jsonl` has a line for each row, `columns/` one number a row of what is asked of all rows at once,
`images/` the images that were embedded in rows, `images.jsonl` the files of the others, as they were, and
`manifest.json`, which is written last, the rest. `facts/` has what was found out about the rows later.
"""

import fcntl
import hashlib
import json
import math
import os
import sys
from array import array
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from rlcs.data.images import image_kind
from rlcs.data.rows import BadRow, Row
from rlcs.data.scanner import Scanner
from rlcs.errors import RunFolderError
from rlcs.records import ImageRef, Problem, Turn, from_row, to_row
from rlcs.storage import MANIFEST, atomic_write, fsync, read_json, write_json

ROWS, _FILES, _IMAGES, _COLUMNS, _FACTS = "rows.jsonl", "images.jsonl", "images", "columns", "facts"
_BUFFER = 1 << 20
_DIGEST_BYTES = 4

Stamp = list[int]
Column = Literal["offset", "id", "digest", "pixels", "answered", "pass_rate"]
_TYPES: Mapping[Column, str] = {
    "offset": "Q", "id": "Q", "digest": "I", "pixels": "Q", "answered": "B", "pass_rate": "d",
}  # fmt: skip
"""Where the line of a row begins; hashes of its id and of all of it; pixels of its images; whether it has a
response; its `pass_rate`, or NaN."""


def id_hash(name: str) -> int:
    """The number that stands for an id in the column `id`."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def row_digest(problem: Problem, response: str | None = None) -> str:
    """Eight hexadecimal digits of all that training, grading and selection read of a row."""
    facts = [problem.id, problem.digest, response, problem.metadata]
    text = json.dumps(facts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[: 2 * _DIGEST_BYTES]


def pixels_of(problem: Problem) -> int:
    """Pixels of all images of a problem; 0 without images."""
    return sum(image.width * image.height for image in problem.images)


def pass_rate_of(problem: Problem) -> float:
    """The `pass_rate` of a problem's row; NaN without one."""
    rate = problem.metadata.get("pass_rate")
    if not isinstance(rate, int | float):
        return math.nan
    return float(rate) if abs(rate) <= sys.float_info.max else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """What an index says of its source: its bad rows, how rows were read, and `RowCounts` of all of them.

    `row_bytes` is the size of all rows, `images` and `image_bytes` are the number and size of embedded ones;
    indices of one source that is used in the same way have the same `place`.
    """

    source: str
    rows: int
    row_bytes: int
    images: int
    image_bytes: int
    place: str
    bad: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()


class EncodedRows:
    """Some rows as an index holds them. A sink of `Scanner`, which goes between processes."""

    def __init__(self, *, with_responses: bool) -> None:
        """There is no row yet; `with_responses`: the digests are those of demonstrations."""
        self._with_responses = with_responses
        self.lines: list[bytes] = []
        self.columns: dict[Column, array[Any]] = {name: array(code) for name, code in _TYPES.items()}
        self.files: dict[str, Stamp | None] = {}
        """Files of images, and what they were like."""
        self.images: dict[str, bytes] = {}
        """Embedded images by the names of their files."""
        self._at = 0

    def add(self, place: int, row: Row) -> None:
        """Take the next row."""
        del place
        problem = row.problem
        line = json.dumps([
            row.where, problem.id, problem.question, problem.answer,
            [self._image(ref) for ref in problem.images], problem.choices, dict(problem.metadata),
            [[turn.role, turn.text] for turn in problem.history],
            row.response, row.given, row.mark, row.gradable, row.own_system,
        ]).encode() + b"\n"  # fmt: skip
        self.lines.append(line)
        values: dict[Column, int | float] = {
            "offset": self._at,
            "id": id_hash(problem.id),
            "digest": int(row_digest(problem, row.response if self._with_responses else None), 16),
            "pixels": pixels_of(problem),
            "answered": row.response is not None,
            "pass_rate": pass_rate_of(problem),
        }
        for name, value in values.items():
            self.columns[name].append(value)
        self._at += len(line)

    def _image(self, ref: ImageRef) -> list[Any]:
        """An image for a row's line, with the name of its file and whether that is one of the index."""
        name = ref.path
        if ref.data is not None:
            name = f"{ref.sha256}.{image_kind(ref.data)}"
            self.images[name] = ref.data
        elif ref.path is not None and ref.path not in self.files:
            self.files[ref.path] = stamp_of(ref.path)
        return [ref.sha256, ref.width, ref.height, name, ref.data is not None]

    def merge(self, other: "EncodedRows") -> None:
        """Take the next rows from another one."""
        offsets = other.columns["offset"]
        self.columns["offset"].extend(self._at + offset for offset in offsets)
        for name, values in other.columns.items():
            if name != "offset":
                self.columns[name].extend(values)
        self.lines += other.lines
        self.files |= other.files
        self.images |= other.images
        self._at += other._at


class RowIndexWriter(EncodedRows):
    """Writes rows into an empty folder. Methods raise OSError, as on a full disk."""

    def __init__(self, folder: Path, *, with_responses: bool) -> None:
        """Make the folder."""
        super().__init__(with_responses=with_responses)
        self._folder = folder
        folder.mkdir(parents=True)
        (folder / _IMAGES).mkdir()
        self._rows = (folder / ROWS).open("wb", buffering=_BUFFER)
        _hold(self._rows)
        self._files = (folder / _FILES).open("w", buffering=_BUFFER)
        self._known: set[int] = set()

    def add(self, place: int, row: Row) -> None:
        """Write the next row."""
        super().add(place, row)
        self._flush()

    def merge(self, other: EncodedRows) -> None:
        """Write the next rows."""
        super().merge(other)
        self._flush()

    def _flush(self) -> None:
        self._rows.writelines(self.lines)
        for name, data in self.images.items():
            path = self._folder / _IMAGES / name
            if not path.exists():
                path.write_bytes(data)
        for name, stamp in self.files.items():
            self._write_file(name, stamp)
        self.lines, self.images, self.files = [], {}, {}

    def _write_file(self, name: str, stamp: Stamp | None) -> None:
        if (number := id_hash(name)) not in self._known:
            self._known.add(number)
            self._files.write(json.dumps([name, stamp]) + "\n")

    def close(self) -> None:
        """End an index without a manifest, which is none."""
        self._rows.close()
        self._files.close()

    def finish(self, scanner: Scanner[Any], *, source: str, place: str) -> None:
        """End the index of what a scanner found."""
        for bad in scanner.bad:
            if bad.file:
                self._write_file(bad.file, stamp_of(bad.file))
        self.close()
        (self._folder / _COLUMNS).mkdir()
        for name, values in self.columns.items():
            with (self._folder / _COLUMNS / name).open("wb") as column:
                values.tofile(column)
        images, image_bytes = _size_of(self._folder / _IMAGES)
        head = Head(
            source=source,
            rows=len(self.columns["id"]),
            row_bytes=self._at,
            images=images,
            image_bytes=image_bytes,
            place=place,
            bad=tuple(scanner.bad),
            notes=scanner.notes_of_reading,
            counts=scanner.counts,
        )
        for path in (self._folder / ROWS, *(self._folder / _COLUMNS).iterdir()):
            fsync(path)  # the manifest must not survive a power cut that its rows do not
        write_json(self._folder / MANIFEST, to_row(head))


class RowIndex:
    """An open index. `key` names it: the same key is the same rows."""

    def __init__(self, folder: Path) -> None:
        """Open a finished index, which is not removed as long as it is open. Raises OSError, ValueError."""
        self.key = folder.name
        self._folder = folder
        self._rows = (folder / ROWS).open("rb", buffering=0)
        _hold(self._rows)
        self.head = from_row(Head, read_json(folder / MANIFEST))
        with suppress(OSError):  # the cache of another user
            os.utime(folder / MANIFEST)
        self._columns = {name: self._column(name) for name in _TYPES}
        self._end = os.fstat(self._rows.fileno()).st_size
        head = self.head
        sizes = (self._end, *_size_of(folder / _IMAGES))
        lengths = {len(values) for values in self._columns.values()}
        if lengths != {head.rows} or sizes != (head.row_bytes, head.images, head.image_bytes):
            raise ValueError("a part of the index is missing")

    def _column(self, name: Column) -> "array[Any]":
        values = array(_TYPES[name])
        values.frombytes((self._folder / _COLUMNS / name).read_bytes())
        return values

    def column(self, name: Column) -> "array[Any]":
        """A number for each row."""
        return self._columns[name]

    def row(self, place: int) -> Row:
        """Read a row."""
        offsets = self._columns["offset"]
        start = offsets[place]
        end = offsets[place + 1] if place + 1 < len(offsets) else self._end
        (where, name, question, answer, images, choices, metadata, history,
         response, given, mark, gradable, own_system) = json.loads(
            os.pread(self._rows.fileno(), end - start, start)
        )  # fmt: skip
        problem = Problem(
            id=name,
            source=self.head.source,
            question=question,
            answer=answer,
            images=tuple(map(self._image, images)),
            choices=tuple(choices),
            metadata=metadata,
            history=tuple(Turn(role=role, text=text) for role, text in history),
        )
        return Row(problem=problem, response=response, given=given, mark=mark, where=where,
                   gradable=gradable, own_system=own_system)  # fmt: skip

    def _image(self, fields: list[Any]) -> ImageRef:
        sha256, width, height, path, inside = fields
        if inside:
            path = str(self._folder / _IMAGES / path)
        return ImageRef(sha256=sha256, width=width, height=height, path=path)

    def has_its_images(self) -> bool:
        """Whether all files of images are as they were when the index was written, or are missing as then."""
        with (self._folder / _FILES).open(encoding="utf-8") as lines:
            return all(stamp_of(path) == stamp for path, stamp in map(json.loads, lines))

    def remember(self, name: str, about: object, find_out: Callable[[], Any]) -> Any:
        """A fact about the rows as JSON, found out once: `about` is all else that it depends on."""
        text = json.dumps(about, sort_keys=True, default=str)
        path = self._folder / _FACTS / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        with suppress(OSError, ValueError):
            return json.loads(path.read_bytes())
        fact = json.loads(json.dumps(find_out()))
        with suppress(RunFolderError):  # it is found out again next time
            atomic_write(path, json.dumps(fact).encode(), sync=False)
        return fact


def _hold(file: IO[bytes]) -> None:
    """Show other processes, as long as this file of rows is open, that its index is in use."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def stamp_of(path: str) -> Stamp | None:
    """Size, times and number of a file, of which one differs once it is another; None if it is not there."""
    try:
        facts = Path(path).stat()
    except (OSError, ValueError):
        return None
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _size_of(folder: Path) -> tuple[int, int]:
    """The number of files in a folder, and their bytes: after a power cut a file may be empty."""
    with os.scandir(folder) as entries:
        sizes = [entry.stat().st_size for entry in entries]
    return len(sizes), sum(sizes)
