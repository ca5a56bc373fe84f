"""Runs a grader and leaves nothing of it behind: `python -I -S guard.py PROGRAM WORDS...`.

The program runs in a session of its own. When it ends, or when the guard's standard input does (its parent
asks for that, or has died, by whatever signal), all descendants of the program are killed, and the guard ends
as the program did. On Linux that are all: also those in sessions of their own, and those whose parent has
ended, for they become children of the guard. Elsewhere it is the program's process group.

It imports nothing of the project, so that it starts at once and stays small.
"""

import ctypes
import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path

_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36  # prctl's PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER
_IS_LINUX = sys.platform == "linux"


def main() -> None:
    """Run the program to its end or that of the standard input."""
    libc = ctypes.CDLL(None)
    if _IS_LINUX:
        libc.prctl(_ADOPT_ORPHANS, 1)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake)
    program = os.fork()
    if not program:
        _become(sys.argv[1:], libc)
    status = None
    while status is None:
        ready, _, _ = select.select([0, ended], [], [])
        if 0 in ready:
            break
        os.read(ended, 4096)
        status = _reap(program)
    _kill_all(program)
    if status is not None and os.WIFSIGNALED(status):
        with suppress(OSError):
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(0 if status is None else os.WEXITSTATUS(status))


def _become(words: list[str], libc: ctypes.CDLL) -> None:
    """Replace this process, a child of the guard, by the program."""
    os.setsid()
    if _IS_LINUX:
        libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        with suppress(OSError):  # without memory the kernel is to end this process, not the training
            Path("/proc/self/oom_score_adj").write_text("1000")
    for handle in range(3):  # what it prints must not fill a pipe or mix with our output
        os.dup2(os.open(os.devnull, os.O_RDWR), handle)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.execv(words[0], words)  # noqa: S606


def _reap(program: int) -> int | None:
    """Take note of all children that ended; the status of the program if it is among them."""
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == program:
                return status
            if not pid:
                return None
    return None


def _kill_all(program: int) -> None:
    """Kill the program's group, and children until there are none: those of a killed one become our own."""
    with suppress(OSError):
        os.killpg(program, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            for pid in _children():
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)


def _children() -> list[int]:
    """The children of this process, where /proc tells."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat") if _IS_LINUX else ():
        with suppress(OSError):
            fields = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                found.append(int(entry.parent.name))
    return found


if __name__ == "__main__":
    main()
