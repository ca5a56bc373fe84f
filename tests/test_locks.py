"""The lock of a run folder: who holds it, who is refused, and how it becomes free."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from rlcs.errors import RunFolderError
from rlcs.storage import locks
from rlcs.storage.locks import hold

HOLD = """
import subprocess, sys
from pathlib import Path
from rlcs.storage.locks import hold
with hold(Path(sys.argv[1])):
    {extra}
    print("held", flush=True)
    sys.stdin.read()
"""
FORK = "import os; child = os.fork(); child or os.execvp('sleep', ['sleep', '60']); print(child)"
"""A child by a fork, which keeps the descriptors that do not close in it, and one by a fork alone."""
FORK_ALONE = "import os, time\n    child = os.fork()\n    if not child: time.sleep(60)\n    print(child)"


@contextmanager
def holder(folder, extra="pass"):
    """Another process that holds a folder; it is killed at the end."""
    command = [sys.executable, "-c", HOLD.format(extra=extra), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline() for _ in range(1 + ("child" in extra))]
        assert lines[-1] == "held\n"
        process.child = int(lines[0]) if len(lines) > 1 else None
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.fault("locks", "a second process in one run folder", "refused, with who holds it since when")
def test_a_second_process_is_refused_with_who_holds_the_folder_and_three_ways_out(tmp_path):
    folder = tmp_path / "run"
    with holder(folder) as process:
        with pytest.raises(RunFolderError) as refused, hold(folder):
            pass
        message = str(refused.value)
        for part in (f"process {process.pid} on {socket.gethostname()}, started 20", "(rlcs "):
            assert part in message
        for way in ("wait for it", f"kill {process.pid}", "choose another --out"):
            assert way in message
        assert json.loads((folder / "lock").read_text())["pid"] == process.pid, "the refused changed nothing"


@pytest.mark.fault("locks", "kill -9 of the process that holds a folder", "free at once")
def test_a_killed_process_holds_nothing(tmp_path):
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        assert (tmp_path / "lock").exists()
        with hold(tmp_path):
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


@pytest.mark.fault("locks", "a child process that outlives the killed holder", "the folder is free")
@pytest.mark.parametrize("fork", [FORK, FORK_ALONE], ids=["exec", "fork"])
def test_children_do_not_keep_the_lock(tmp_path, fork):
    with holder(tmp_path, fork) as process:
        try:
            process.kill()
            process.wait()
            os.kill(process.child, 0)  # it lives
            with hold(tmp_path):
                pass
        finally:
            os.kill(process.child, signal.SIGKILL)


def test_folders_within_a_folder_have_locks_of_their_own(tmp_path):
    with hold(tmp_path), hold(tmp_path / "cells" / "one"):
        assert (tmp_path / "lock").exists()
    assert not [*tmp_path.rglob("lock")]


@pytest.mark.fault("locks", "a lock file that a kill left empty or torn", "taken over")
@pytest.mark.parametrize("content", ["", '{"host": "elsew', "[]", '{"host": 1}'])
def test_a_torn_lock_file_is_free(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    with hold(tmp_path):
        pass


def written_by_another_machine(folder, age_s=0.0):
    facts = {"host": "elsewhere", "pid": 1, "started": 0.0, "command": "rlcs run x"}
    (folder / "lock").write_text(json.dumps(facts))
    then = time.time() - age_s
    os.utime(folder / "lock", (then, then))


@pytest.mark.fault("locks", "another machine holds the folder, whose lock is not seen", "refused")
def test_the_heartbeat_of_another_machine_is_respected(tmp_path, monkeypatch):
    written_by_another_machine(tmp_path)
    polls = []

    def refresh(seconds):  # what the other machine does meanwhile
        polls.append(seconds)
        os.utime(tmp_path / "lock")

    monkeypatch.setattr(locks.time, "sleep", refresh)
    with pytest.raises(RunFolderError, match="process 1 on elsewhere"), hold(tmp_path):
        pass
    assert polls == [1.0]


@pytest.mark.fault("locks", "another machine was killed while it held the folder", "free after two minutes")
def test_a_lock_of_another_machine_without_a_heartbeat_is_free(tmp_path, monkeypatch):
    written_by_another_machine(tmp_path, age_s=locks.STALE_S + 1)
    with hold(tmp_path):
        pass
    monkeypatch.setattr(locks, "STALE_S", 0.3)
    written_by_another_machine(tmp_path)
    with hold(tmp_path):
        pass


@pytest.mark.fault("locks", "a file system without locks", "the process in the lock file counts")
def test_without_locks_of_the_file_system_the_process_counts(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(38, "Function not implemented")

    with holder(tmp_path) as process:
        monkeypatch.setattr(locks.fcntl, "lockf", unsupported)
        with pytest.raises(RunFolderError, match=f"process {process.pid}"), hold(tmp_path):
            pass
        process.kill()
        process.wait()
        with hold(tmp_path):
            pass


def test_the_holder_refreshes_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_S", 0.01)
    with hold(tmp_path):
        os.utime(tmp_path / "lock", (0, 0))
        deadline = time.monotonic() + 30
        while (tmp_path / "lock").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.fault("storage", "a run folder that cannot be written", "a sentence before any work")
def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write"), hold(tmp_path / "file" / "run"):
        pass


@pytest.mark.fault("kills", "files that a killed process was writing", "removed at the next start")
def test_what_killed_processes_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    step = "sft/checkpoints/step-000002"
    left = [f".tmp-{dead.pid}-0123456789ab", ".preflight-a1b2c3d4", f"{step}.tmp-{dead.pid}"]
    kept = ["recipe.yaml", f"{step}.tmp-1", "mine.tmp", f"mine.tmp-{dead.pid}", f".tmp-{dead.pid}-mine"]
    for name in (*left[1:], *kept):
        (tmp_path / name / "inside").mkdir(parents=True)
    own = f"eval/.tmp-{os.getpid()}-0123456789ab"  # of an earlier process with this number
    for name in (left[0], ".tmp-1-0123456789ab", own):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    with hold(tmp_path):
        pass
    assert not [name for name in (*left, own) if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in (*kept, ".tmp-1-0123456789ab"))
