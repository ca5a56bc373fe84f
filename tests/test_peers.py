"""The watch over the other ranks: real processes, which wait in native code and are deaf to signals."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from rlcs.distributed.peers import Meeting, Patience, Peers
from rlcs.distributed.torchrun import outside_torchrun

RANK = """
import ctypes, sys
from rlcs.distributed.peers import Meeting, Patience, Peers
from rlcs.signals import StopFlag

rank, port, then = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
peers = Peers(rank, patience=Patience(dead=0.5, failed=0.5))
if rank == 0:
    print(peers.watch("127.0.0.1", "secret").port, flush=True)
else:
    peers.join(Meeting(host="127.0.0.1", port=port, secret="secret"))
    print("joined", flush=True)
with StopFlag():
    sys.stdin.readline()
    if then == "wait":  # a mutex that this thread holds already: no signal and no exception ends this wait
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(mutex)
        print("waits", flush=True)
        libc.pthread_mutex_lock(mutex)
    peers.leave(failed=then == "fail")
"""
LIMIT_S = 60


@contextmanager
def ranks(*then: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks that are connected, and what each does: `wait` natively, `end` in order, `fail`."""
    found: list[subprocess.Popen[str]] = []
    port = 0
    try:
        for rank, what in enumerate(then):
            process = subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), str(port), what],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            found.append(process)
            assert process.stdout is not None
            line = process.stdout.readline()
            port = port or int(line)
        for process, what in zip(found, then, strict=True):
            if what == "wait":
                go(process)
                assert process.stdout is not None and process.stdout.readline() == "waits\n"
        yield found
    finally:
        for process in found:
            process.kill()
            process.communicate()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize("dead", [0, 1], ids=["rank 0 dies", "rank 1 dies"])
def test_a_killed_rank_ends_the_others_while_they_wait_in_native_code(dead: int) -> None:
    with ranks("wait", "wait", "wait") as group:
        for process in group:
            process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert all(process.poll() is None for process in group), "the signal alone only sets a flag"
        group[dead].kill()
        started = time.monotonic()
        for rank in {0, 1, 2} - {dead}:
            _, error = group[rank].communicate(timeout=LIMIT_S)
            assert group[rank].returncode == 1
            assert f"rank {rank} ends, as rank {dead} has ended" in error and "last checkpoint" in error
        assert time.monotonic() - started < 15


def test_a_rank_that_fails_ends_the_others() -> None:
    with ranks("wait", "fail", "wait") as group:
        go(group[1])
        for rank in (0, 2):
            _, error = group[rank].communicate(timeout=LIMIT_S)
            assert group[rank].returncode == 1 and "as rank 1 has ended" in error


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_ends_in_order_disturbs_nobody(first: int) -> None:
    with ranks("end", "end") as group:
        go(group[first])
        assert group[first].wait(LIMIT_S) == 0
        time.sleep(2.5)
        other = group[1 - first]
        assert other.poll() is None
        go(other)
        assert other.communicate(timeout=LIMIT_S)[1] == "" and other.returncode == 0


def test_strangers_are_sent_away() -> None:
    peers = Peers(0, patience=Patience(dead=0.1, failed=0.1))
    meeting = peers.watch("127.0.0.1", "secret")
    try:
        for word in (b"guess 1\n", b"\n", b"secret\n", b"x" * 500):
            with socket.create_connection(("127.0.0.1", meeting.port), timeout=10) as stranger:
                stranger.sendall(word)
                with suppress(ConnectionResetError):
                    assert stranger.recv(1) == b""
        time.sleep(1.5)  # had one counted as a rank, its end would have ended this process
    finally:
        peers.leave(failed=False)


def test_without_a_way_to_rank_0_a_rank_goes_on_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    peers = Peers(1)
    peers.join(Meeting(host="127.0.0.1", port=port, secret="secret"))
    peers.leave(failed=False)
    assert "rank 1 cannot reach rank 0" in caplog.text and "parallel.timeout_s" in caplog.text


def test_ranks_stop_in_order_when_torchrun_is_killed() -> None:
    """Their parent is gone; each gets the signal that torchrun would have sent."""
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], '0', '0', 'end'],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\ntime.sleep(600)\n"
    )
    child = RANK.replace("sys.stdin.readline()", "import time\n    while not stop.is_set: time.sleep(0.1)")
    child = child.replace("with StopFlag():", "with StopFlag() as stop:")
    parent = subprocess.Popen([sys.executable, "-c", code, child], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(1.0)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + LIMIT_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "it goes on without anybody"
        time.sleep(0.2)


def test_programs_that_a_rank_starts_take_themselves_for_no_rank() -> None:
    rank = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    rank |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    kept = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert outside_torchrun(rank | kept) == kept
    assert outside_torchrun(rank | kept | {"OMP_NUM_THREADS": "4"}) == kept | {"OMP_NUM_THREADS": "4"}
    alone = {"RANK": "3", "OMP_NUM_THREADS": "1"}
    assert outside_torchrun(alone) == alone, "without torchrun these are somebody else's"
