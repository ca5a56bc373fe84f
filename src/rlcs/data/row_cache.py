"""Where the rows of large sources lie once they were read and checked, so that the next start finds them.

That is `$RLCS_CACHE`, else `rlcs` in `$XDG_CACHE_HOME` or in `~/.cache`. An index belongs to the source as it
is, file by file, to the settings by which it was read, and to the code that read it: a change of any makes
another. One that no run has open and none used for UNUSED_DAYS is removed when the next one is written.
"""

import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlcs.data.files import RawRow
from rlcs.data.row_index import ROWS, EncodedRows, RowIndex, RowIndexWriter, stamp_of
from rlcs.data.rows import RowReader
from rlcs.data.scan import Watch, scan
from rlcs.data.scanner import ScanTask
from rlcs.data.sources import Role, Table
from rlcs.errors import DataError
from rlcs.recipe.schema import Data
from rlcs.storage import MANIFEST, read_json

UNUSED_DAYS = 30
_DAY_S = 24 * 3600
_BUILDING, _LOCK = ".building-", ".lock"
_LOG = logging.getLogger("rlcs")
_READ_BY = ("rlcs.data", "rlcs.grading", "rlcs.records")
"""Packages that decide what is read of a row."""
_CHOOSE = {
    "cold_start", "max_demonstrations", "rl", "rl_pass_rate", "rl_blind", "test", "max_bad_share", "overlap",
}  # fmt: skip
"""Settings that choose among rows after they were read."""


def cache_folder() -> Path:
    """The folder of all indices, which may not be there."""
    if own := os.environ.get("RLCS_CACHE"):
        return Path(own).expanduser().absolute() / "rows"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache).absolute() if cache else Path.home() / ".cache") / "rlcs" / "rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexTask(ScanTask[EncodedRows]):
    """To write all rows into an index. Images that are embedded in rows go there too."""

    def reader(self) -> RowReader:
        """See `ScanTask`."""
        reader = RowReader(self.table, self.settings, role=self.role, limit=self.decode_limit, decode=False)
        reader.images.hold_few()
        return reader

    def sink(self) -> EncodedRows:
        """See `ScanTask`."""
        return EncodedRows(with_responses=self.role == "cold_start")


class RowCache:
    """The place of the index of one source, read in one way."""

    def __init__(self, table: Table, settings: Data, *, role: Role, decode_limit: int) -> None:
        """Name the index by the table's files as they are now. Raises OSError."""
        self._task = IndexTask(table=table, settings=settings, role=role, decode_limit=decode_limit)
        folders = [str(folder.resolve()) for folder in (*table.folders, *table.roots)]
        self._about = [
            code_sum(*_READ_BY), _versions(), table.source, table.fingerprint, table.columns, folders,
            settings.model_dump(mode="json", exclude=_CHOOSE), role, decode_limit,
        ]  # fmt: skip
        self._place = _sum([[str(path.resolve()) for path in table.files], table.source, role])
        self._key = self._key_now()

    def _key_now(self) -> str:
        return _sum([self._about, [[path, stamp_of(str(path.resolve()))] for path in self._task.table.files]])

    def find(self) -> RowIndex | None:
        """The newest index, if there is one that is whole and whose images are as they were."""
        for folder in sorted(cache_folder().glob(f"{self._key}.*"), key=_number, reverse=True):
            with suppress(OSError, ValueError, DataError):
                index = RowIndex(folder)
                if index.has_its_images():
                    return index
        return None

    def write(self, rows: Iterable[RawRow], watch: Watch) -> RowIndex:
        """Read all rows of the table into an index, unless another process did so meanwhile.

        One that is out of date stays as long as others have it open. Raises OSError or RunFolderError where
        the index cannot be written, and DataError where the table cannot be used as a whole or has changed
        meanwhile.
        """
        root = cache_folder()
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root / f"{self._key}{_LOCK}"):
            if index := self.find():
                return index
            _remove_unused(root, self._place)
            earlier = max(map(_number, root.glob(f"{self._key}.*")), default=0)
            building = root / f"{_BUILDING}{self._key}-{os.getpid()}"
            try:
                self._write(building, rows, watch)
                finished = building.rename(root / f"{self._key}.{earlier + 1}")
                return RowIndex(finished)
            finally:
                shutil.rmtree(building, ignore_errors=True)

    def _write(self, folder: Path, rows: Iterable[RawRow], watch: Watch) -> None:
        source = self._task.table.source
        writer = RowIndexWriter(folder, with_responses=self._task.role == "cold_start")
        try:
            scanner = scan(replace(self._task, table=replace(self._task.table, rows=rows)), writer, watch)
            if self._key_now() != self._key:
                fix = "start again when nothing writes it any more"
                raise DataError("the data has changed while it was read", where=source, fix=fix)
            writer.finish(scanner, source=source, place=self._place)
        finally:
            writer.close()


def _number(folder: Path) -> int:
    """The number of an index among those with the same key; the lock has none."""
    return int(folder.suffix[1:]) if folder.suffix[1:].isdecimal() else 0


def _sum(facts: object) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _versions() -> list[str]:
    """Versions of the libraries that read rows and images."""
    found = []
    for name in ("pillow", "pillow-heif", "pyarrow", "datasets"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return found


def code_sum(*packages: str) -> str:
    """A checksum of the code of some packages of rlcs."""
    total = hashlib.sha256()
    for package in packages:
        for path in sorted(Path(str(resources.files(package))).rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock of this file, and hold it."""
    with path.open("wb") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_unused(root: Path, place: str) -> None:
    """Remove what no process has open and none used for long, and what killed processes left.

    Another index of the same source, used in the same way, is one of earlier rows or of other settings.
    """
    now = time.time()
    for folder in (*root.glob(f"{_BUILDING}*"), *root.glob("*.[0-9]*")):
        with suppress(OSError, ValueError, DataError):
            manifest = folder / MANIFEST
            if not manifest.exists():
                if (folder / ROWS).exists():
                    _remove(folder)
                elif now - folder.stat().st_mtime > _DAY_S:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            days = (now - manifest.stat().st_mtime) / _DAY_S
            if days > UNUSED_DAYS or (days > 1 and read_json(manifest).get("place") == place):
                _remove(folder)
    for lock in root.glob(f"*{_LOCK}"):
        with suppress(OSError):
            if now - lock.stat().st_mtime > UNUSED_DAYS * _DAY_S:
                lock.unlink()


def _remove(folder: Path) -> None:
    """Remove an index, unless a process has it open. Raises OSError then."""
    with (folder / ROWS).open("rb") as rows:
        fcntl.flock(rows, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Under a name that no start takes for a whole index.
        removing = folder.rename(folder.parent / f"{_BUILDING}{secrets.token_hex(6)}")
        shutil.rmtree(removing, ignore_errors=True)
        _LOG.info("removed the unused index %s", folder.name)
