"""Files: atomic writes, JSON and JSONL, manifests with checksums, paths confined to a folder.

After a crash at any moment a replaced file is whole: either the old one or the new one. A path in a data set
may not lead out of its folder.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Self

from rlcs.errors import CheckpointError, DataError, RunFolderError
from rlcs.redaction import redacted

MANIFEST = "manifest.json"
"""The file that is written last: a folder with a valid one is complete."""
_FORM = "JSON Lines has one object a line"
_BOM = b"\xef\xbb\xbf"
_WRITTEN_AT_ONCE = 1 << 24
"""Bytes that are written and hashed in one call, while other threads run."""

# ---------------------------------------------------------------------------------- writing


def fsync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, size: int, error: Exception) -> RunFolderError:
    """Make the error for `size` bytes that could not be written to `path`; it states the free space."""
    try:
        free = f"{shutil.disk_usage(path.parent).free:,} bytes are free there"
    except OSError:
        free = "the folder cannot be read either"
    return RunFolderError(
        f"cannot write {size:,} bytes: {getattr(error, 'strerror', None) or error}",
        where=str(path),
        fix=f"free some space or write elsewhere ({free}); the previous version is untouched",
    )


def atomic_write(path: Path, content: bytes | str, *, sync: bool = True) -> None:
    """Replace `path` by `content` (text as UTF-8, without secrets) in one step; missing folders are made.

    A temporary file in the same folder is written, fsynced and renamed, and the folder fsynced; without
    `sync` the file survives a kill but maybe not a power cut. Raises RunFolderError, with the old file
    untouched, when the disk is full or not writable.
    """
    # A lone surrogate becomes \udXXX, which JSON reads as the same character.
    data = (
        redacted(content, is_json=True).encode("utf-8", "backslashreplace")
        if isinstance(content, str)
        else content
    )
    temporary = path.parent / f".tmp-{os.getpid()}-{secrets.token_hex(6)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
        if sync:
            fsync(temporary)
        temporary.replace(path)
        if sync:
            fsync(path.parent)
    except OSError as error:
        raise cannot_write(path, len(data), error) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def open_to_readers(folder: Path, *, sync: bool = False) -> None:
    """Make the weights in a folder readable to all users who may read the folder; `sync` all to disk.

    safetensors makes its files readable to their owner alone, and a server may run as another user.
    """
    for path in (*folder.rglob("*"), folder):
        if path.suffix == ".safetensors":
            open_as_its_folder(path)
        if sync:
            fsync(path)


def open_as_its_folder(path: Path) -> None:
    """Give a file the read and write permissions of its folder."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def write_json(path: Path, obj: object) -> None:
    """Write `obj` as indented JSON, atomically. Raises ValueError for NaN, which JSON lacks."""
    atomic_write(path, to_json(obj))


def to_json(obj: object) -> str:
    """Encode `obj` as indented JSON. Raises ValueError for NaN, which JSON lacks."""
    return json.dumps(obj, ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def _jsonl(rows: Iterable[Mapping[str, object]]) -> bytes:
    """Encode rows, one JSON object a line. Raises ValueError for NaN."""
    lines = (json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    return redacted("".join(lines), is_json=True).encode("utf-8", "backslashreplace")


def as_written(rows: Iterable[Mapping[str, object]]) -> list[dict[str, Any]]:
    """Rows as they would be read from a file that rlcs wrote: without secrets."""
    return [json.loads(line) for line in _jsonl(rows).split(b"\n")[:-1]]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object a line, atomically."""
    atomic_write(path, _jsonl(rows))


class JsonlAppender:
    """An open JSONL file that rows are appended to; a context manager.

    A kill loses no appended row, a power cut at most those of the last `sync_s` seconds (infinite: any).
    """

    def __init__(self, path: Path, *, sync_s: float = 0.0) -> None:
        """Open the file, making missing folders; a last line that a crash left torn is cut off.

        Raises RunFolderError when the file cannot be written.
        """
        self._path, self._sync_s, self._synced = path, sync_s, time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
            _mend_tail(self._file)
        except OSError as error:
            raise cannot_write(path, 0, error) from error

    def __enter__(self) -> Self:
        """Return the open file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Flush to disk and close. Raises RunFolderError when the disk is full."""
        try:
            with self._file:
                if self._sync_s < math.inf:
                    os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self._path, 0, error) from error

    def append(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append all these rows or, when the disk is full, none of them: then RunFolderError is raised."""
        data = memoryview(_jsonl(rows))
        end = self._file.seek(0, os.SEEK_END)
        try:
            left = data
            while left:
                left = left[self._file.write(left) :]
            if time.monotonic() - self._synced >= self._sync_s:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            with suppress(OSError):  # a torn line is cut off when the file is opened again
                self._file.truncate(end)
            raise cannot_write(self._path, len(data), error) from error


def append_jsonl(path: Path, rows: Iterable[Mapping[str, object]], *, sync: bool = True) -> None:
    """Append rows to a JSONL file and, with `sync`, flush it to disk; see `JsonlAppender`."""
    with JsonlAppender(path, sync_s=0.0 if sync else math.inf) as file:
        file.append(rows)


def _mend_tail(file: Any) -> None:
    """Make an open JSONL file end with a line end: complete a whole last line, cut off a torn one."""
    end = file.seek(0, os.SEEK_END)
    tail, start = b"", end
    while start > 0 and b"\n" not in tail:
        step = min(start, 1 << 16)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
    rest = tail.rpartition(b"\n")[2]
    if not rest:
        return
    try:
        parse_object(rest)
    except ValueError:
        file.truncate(end - len(rest))
    else:
        file.write(b"\n")


# ---------------------------------------------------------------------------------- reading


def at_home(path: str) -> Path:
    """The path with `~` and `~USER` as the home folder; unchanged where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def require_regular(path: Path) -> None:
    """Raise DataError unless `path` is a regular file; never opens a pipe or a device."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise DataError("no such file", where=str(path), fix="check the path") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), fix="check the path") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise DataError(f"this is {kind}", where=str(path), fix="name a file")


def read_regular(path: Path) -> bytes:
    """Read the bytes of a regular file. Raises DataError for anything else."""
    require_regular(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error}", where=str(path), fix="check its permissions") from error


def read_json(path: Path) -> Any:
    """Read a JSON file (UTF-8, with or without BOM). Raises DataError."""
    try:
        return json.loads(read_regular(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}", where=str(path), fix="correct or delete it") from error


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse the JSON object in one line of a JSONL file. Raises ValueError saying what is wrong."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"torn or invalid JSON: {error.msg} at column {error.colno}; {_FORM}") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a line must hold a JSON object, not {type(value).__name__}; {_FORM}")
    return value


def jsonl_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield line numbers (from 1) and lines of a JSONL file, without blank ones; BOM and CRLF are accepted.

    Only line feeds end lines: a U+2028 may stand inside a text. Raises DataError.
    """
    for number, line in enumerate(BytesIO(read_regular(path).removeprefix(_BOM)), start=1):
        if line.strip():
            yield number, line


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read every row of a JSONL file that rlcs wrote.

    A last line that has no line end and does not parse was torn by a crash and is dropped; any other bad
    line raises DataError with its number.
    """
    rows = []
    for number, line in jsonl_lines(path):
        try:
            rows.append(parse_object(line))
        except ValueError as error:
            if line.endswith(b"\n"):
                fix = "correct or delete this line"
                raise DataError(str(error), where=f"{path}:{number}", fix=fix) from error
    return rows


# ---------------------------------------------------------------------------------- finished stages

DONE = "done.json"
"""The marker of a finished stage of a run; a stage that has one is not run again."""


def is_done(folder: Path) -> bool:
    """Whether the stage in this folder has finished."""
    return (folder / DONE).is_file()


def mark_done(folder: Path, *, reads: Iterable[str] = (), **facts: object) -> None:
    """Write the marker of a finished stage, with facts about it (seconds, counts).

    Of the files that later stages read, `reads` (names of files and folders in the folder), it keeps the
    checksums: `verify_done` compares them.
    """
    roots = [folder / name for name in reads]
    paths = [path for root in roots for path in (sorted(root.rglob("*")) if root.is_dir() else [root])]
    sums = {str(path.relative_to(folder)): asdict(file_sum(path)) for path in paths if path.is_file()}
    write_json(folder / DONE, {**facts, "files": sums})


def verify_done(folder: Path, seen: dict[Path, object]) -> None:
    """Check that the files that a finished stage left for later ones are as it wrote them.

    What was `seen` to be, and has not been written since, is not read again: weights may be large. Raises
    CheckpointError naming the first file that is not, DataError for a marker that cannot be read.
    """
    where = folder / DONE
    try:
        marker = read_json(where)
        expected = {folder / name: _sum_of(entry) for name, entry in marker.get("files", {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"not a marker of a stage: {error}", where=str(where), fix="delete it") from error
    for path, wanted in expected.items():
        stamp = _stamp(path)
        if stamp is not None and seen.get(path) == (stamp, wanted):
            continue
        if reason := _difference(path, wanted):
            raise CheckpointError(
                f"{reason} of when the stage in {folder} was finished",
                where=str(path),
                fix=f"restore it, or remove {folder} and what was made from it since: the same command "
                "makes them again",
            )
        seen[path] = (stamp, wanted)


def _stamp(path: Path) -> object:
    """What changes when a file is written again; None where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


# ---------------------------------------------------------------------------------- manifests


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSum:
    """The size and the SHA-256 checksum of a file."""

    size: int
    sha256: str


class HashingWriter:
    """A new file whose checksum is taken while it is written; a context manager that syncs it to disk."""

    def __init__(self, path: Path) -> None:
        """Create the file, and its folder. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> Self:
        """Return the open file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Flush to disk and close."""
        with self._file:
            os.fsync(self._file.fileno())

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`. Raises OSError."""
        left = memoryview(data)
        while left:
            part = left[:_WRITTEN_AT_ONCE]
            written = self._file.write(part)
            self._digest.update(part[:written])
            left = left[written:]
            self._size += written

    @property
    def sum(self) -> FileSum:
        """The checksum of what was written so far."""
        return FileSum(size=self._size, sha256=self._digest.hexdigest())


def file_sum(path: Path) -> FileSum:
    """Read a file for its checksum."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileSum(size=file.tell(), sha256=digest)


def _sum_of(entry: Mapping[str, Any]) -> FileSum:
    return FileSum(size=int(entry["size"]), sha256=str(entry["sha256"]))


def _difference(path: Path, expected: FileSum) -> str | None:
    """How a file differs from what was written; None where it does not."""
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        return "the file is missing"
    if size != expected.size:
        return f"the file has {size:,} bytes instead of {expected.size:,}"
    return None if file_sum(path) == expected else "the content does not match its checksum"


def write_manifest(folder: Path, sums: Mapping[str, FileSum]) -> None:
    """Record the files of `folder`, by their names in it, in `manifest.json`, which is written last.

    The files must be on disk; their folders are synced here.
    """
    for path in {(folder / name).parent for name in sums}:
        fsync(path)
    write_json(folder / MANIFEST, {"files": {name: asdict(sums[name]) for name in sorted(sums)}})


def verify_manifest(folder: Path, *, only: Callable[[str], bool] = lambda name: True) -> Collection[str]:
    """Check that every file named in the manifest exists, whole and unchanged; returns their names.

    A file is left alone where `only` is false for its name. Raises CheckpointError naming the first that does
    not pass.
    """
    where = folder / MANIFEST
    try:
        files = read_json(where)["files"]
        wanted = [(confined(folder, name), _sum_of(e)) for name, e in files.items() if only(name)]
        if not files:
            raise ValueError("it lists no files")
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the manifest cannot be used: {getattr(error, 'what', error)}",
            where=str(where),
            fix="the folder is incomplete; go on from another checkpoint",
        ) from error
    for path, expected in wanted:
        if reason := _difference(path, expected):
            raise CheckpointError(reason, where=str(path), fix="it is damaged; go on from another checkpoint")
    return frozenset(files)


# ---------------------------------------------------------------------------------- paths


def confined(root: Path, path: str | Path) -> Path:
    """Resolve `path` (relative to `root`, or absolute inside it) to a real path below `root`. Opens no file.

    Raises DataError for a path that leaves `root` through `..`, a symbolic link or an absolute
    name, and for URLs, Windows paths and empty names.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise DataError("the path is empty or holds a NUL", where=repr(text), fix="name a file")
    if "\\" in text:
        raise DataError("the path has backslashes", where=text, fix="write it with / and relative")
    if "://" in text or text.startswith("data:"):
        raise DataError("this is a URL, not a path", where=text[:80], fix="download it beside the data file")
    try:
        base = Path(os.path.realpath(root))
        target = Path(os.path.realpath(base / text))
    except (OSError, ValueError) as error:
        raise DataError(
            f"this path cannot be used: {error}", where=repr(text), fix="rename the file"
        ) from error
    if not target.is_relative_to(base):
        raise DataError(f"the path leaves {base}", where=text, fix="move the file into that folder")
    return target
