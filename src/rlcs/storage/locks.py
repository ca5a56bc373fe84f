"""The lock of a folder that one process at a time writes into: a run, an evaluation, a distillation.

The kernel's lock on the file `lock` in the folder: free by itself however the process ends, and never held by
a child, to which such a lock does not pass. The file says who holds it. Readers need no lock.

Some network file systems keep locks from other machines. So the holder refreshes the file's time, and a lock
that names another machine is free when it was not refreshed for STALE_S: a start on another machine after a
kill waits that long. A machine that sleeps longer while such a file system hides its lock loses it.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile

import psutil

from rlcs.errors import RunFolderError
from rlcs.records import from_row_or_none
from rlcs.redaction import shown
from rlcs.storage import cannot_write

LOCK = "lock"
"""The file whose lock is held; its content says by whom."""
BEAT_S = 15.0
"""Seconds after which the holder refreshes the file's time."""
STALE_S = 120.0
"""Seconds without a refresh after which a lock of another machine is free."""
_MOST_BYTES = 1 << 16
_LEFT_FOLDER = re.compile(r"step-\d{6,}\.tmp-(\d{1,9})|\.preflight-\w{8}")
"""Folders that are being written: a checkpoint or the model of one, and that of a trial before a run."""
_LEFT_FILE = re.compile(r"\.tmp-(\d{1,9})-[0-9a-f]{12}")
"""A file that `storage.atomic_write` is writing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """The process that writes into a folder; `started` is its start in seconds since 1970."""

    host: str
    pid: int
    started: float
    command: str

    @property
    def runs(self) -> bool:
        """Whether this machine has the process; its number may have gone to another one."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1
        except psutil.Error:
            return False

    def __str__(self) -> str:
        """Who it is, since when, and its command."""
        since = datetime.fromtimestamp(self.started, UTC).astimezone().isoformat(" ", "seconds")
        return f"process {self.pid} on {self.host}, started {since} ({self.command})"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made, until the context or the process ends.

    What killed processes left half written in it is removed. Raises RunFolderError, which names the holder,
    while another process holds it (two would write into the same files), and where it cannot be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _take(path)
    except OSError as error:
        raise cannot_write(path, 0, error) from error
    ended, owner = threading.Event(), os.getpid()
    threading.Thread(target=_refresh, args=(file, ended), name="rlcs-lock", daemon=True).start()
    try:
        remove_leftovers(folder)
        yield
    finally:
        ended.set()
        if os.getpid() == owner:  # a fork that returns here holds nothing
            path.unlink(missing_ok=True)
        os.close(file)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders, at any depth, unless another process that lives is writing them.

    Such are a model that a server makes of a checkpoint, and a report.
    """
    for parent, folders, files in os.walk(folder):
        for name in [name for name in folders if _is_left(_LEFT_FOLDER.fullmatch(name))]:
            folders.remove(name)
            shutil.rmtree(Path(parent, name), ignore_errors=True)
        for name in files:
            if _is_left(_LEFT_FILE.fullmatch(name)):
                Path(parent, name).unlink(missing_ok=True)


def _is_left(match: re.Match[str] | None) -> bool:
    """Whether the process of a temporary name has ended; a name without one is of an earlier run."""
    pid = int(match[1] or 0) if match else 0
    return match is not None and (pid in (0, os.getpid()) or not psutil.pid_exists(pid))


def _take(path: Path) -> int:
    """Open the lock file and lock it, with this process as its holder. Raises RunFolderError, OSError."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            alone = _lock(file)
            _require_free(path, file, alone=alone)
            if _is_same(path, file):  # else the holder ended, and removed it, between the two calls
                process = psutil.Process()
                own = Holder(
                    host=socket.gethostname(),
                    pid=process.pid,
                    started=process.create_time(),
                    command=shown(shlex.join(["rlcs", *sys.argv[1:]])),
                )
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(asdict(own)).encode("utf-8", "backslashreplace") + b"\n", 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int) -> bool | None:
    """Whether this process has the kernel's lock now; None where the file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _require_free(path: Path, file: int, *, alone: bool | None) -> None:
    """Raise RunFolderError if another process holds the lock; waits whether another machine refreshes it."""
    holder = _read(file)
    if alone is False:
        raise _refusal(path, holder)
    if holder is None:
        return
    if holder.host == socket.gethostname():
        if alone is None and holder.runs:
            raise _refusal(path, holder)
        return
    first, age = _times(path)
    while age < STALE_S:
        time.sleep(min(1.0, STALE_S - age))
        last, age = _times(path)
        if first < last:
            raise _refusal(path, holder)


def _read(file: int) -> Holder | None:
    """Who is written in an open lock file; None where a kill left it empty or torn.

    The file is not opened anew: the kernel frees a lock when its process closes any descriptor of the file.
    """
    try:
        row = json.loads(os.pread(file, _MOST_BYTES, 0))
    except ValueError:
        return None
    return from_row_or_none(Holder, row) if isinstance(row, dict) else None


def _times(path: Path) -> tuple[float, float]:
    """The time of the lock file, and its age in seconds; both by the clock of the file system."""
    with TemporaryFile(dir=path.parent, prefix=".tmp-") as fresh:
        now = os.fstat(fresh.fileno()).st_mtime
    try:
        changed = path.stat().st_mtime
    except FileNotFoundError:  # its holder ended
        return 0.0, STALE_S
    return changed, now - changed


def _is_same(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _refresh(file: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        try:
            os.utime(file)
        except OSError:  # a server that is away for a moment: the next time counts
            continue


def _refusal(path: Path, holder: Holder | None) -> RunFolderError:
    folder = path.parent
    stop = f"stop it (`kill {holder.pid}` on {holder.host})" if holder else "stop it"
    return RunFolderError(
        f"{holder or 'another process'} writes into this folder",
        where=str(folder),
        fix=f"wait for it (`rlcs report {folder} --live` follows a run), {stop}, or choose another --out",
    )
