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
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from rlcs.data.files import RawRow
from rlcs.data.row_index import ROWS, EncodedRows, Head, RowIndex, RowIndexWriter
from rlcs.data.rows import RowReader
from rlcs.data.scan import Watch, scan
from rlcs.data.scanner import ScanTask
from rlcs.data.sources import Role, Table
from rlcs.errors import DataError
from rlcs.recipe.schema import Data
from rlcs.storage import MANIFEST

UNUSED_DAYS = 30
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
        return Path(own).expanduser() / "rows"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "rlcs" / "rows"


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
        self._about = [
            code_sum(*_READ_BY), table.source, table.fingerprint, table.columns, table.folders, table.roots,
            settings.model_dump(mode="json", exclude=_CHOOSE), role, decode_limit,
        ]  # fmt: skip
        self._key = self._key_now()

    def _key_now(self) -> str:
        files = [
            [str(path.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]
            for path in self._task.table.files
            for facts in [path.stat()]
        ]
        text = json.dumps([self._about, files], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def find(self) -> RowIndex | None:
        """The index, if there is one and the images are as they were."""
        folder = cache_folder() / self._key
        if not folder.is_dir():
            return None
        with suppress(OSError, ValueError):
            index = RowIndex(folder)
            if index.has_its_images():
                return index
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def write(self, rows: Iterable[RawRow], watch: Watch) -> RowIndex:
        """Read all rows of the table into an index, unless another process did so meanwhile.

        Raises OSError or RunFolderError where it cannot be written, and DataError where the table cannot be
        used as a whole or has changed meanwhile.
        """
        root = cache_folder()
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root / f"{self._key}.lock"):
            if index := self.find():
                return index
            _remove_unused(root)
            folder = root / f".building-{self._key}-{os.getpid()}"
            try:
                self._write(folder, rows, watch)
                with suppress(OSError):  # another machine has written it
                    folder.rename(root / self._key)
                return RowIndex(root / self._key)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _write(self, folder: Path, rows: Iterable[RawRow], watch: Watch) -> None:
        task = replace(self._task, table=replace(self._task.table, rows=rows))
        writer = RowIndexWriter(folder, with_responses=self._task.role == "cold_start")
        try:
            scanner = scan(task, writer, watch)
            if self._key_now() != self._key:
                raise DataError(
                    "the data has changed while it was read",
                    where=self._task.table.source,
                    fix="start again when nothing writes it any more",
                )
        except BaseException:
            writer.close()
            raise
        head = Head(
            source=self._task.table.source,
            rows=len(writer.columns["id"]),
            bad=tuple(scanner.bad),
            notes=scanner.notes_of_reading,
            counts=scanner.counts,
        )
        writer.close(head)


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


def _remove_unused(root: Path) -> None:
    """Remove what no process has open and none used for long, and what killed processes left."""
    for left in root.glob(".building-*"):
        with suppress(OSError), (left / ROWS).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for manifest in root.glob(f"*/{MANIFEST}"):
        with suppress(OSError), manifest.open("rb") as file:
            if manifest.stat().st_mtime < oldest:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(manifest.parent, ignore_errors=True)
                _LOG.info("removed the unused index of %s", manifest.parent.name)
