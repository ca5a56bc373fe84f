"""Runs `vllm serve` as a process that ends with this one, and reads its log."""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from rlcs.errors import ModelError

_GRACE_S = 10.0
_TRACKER = "multiprocessing.resource_tracker"
"""A process of Python's that removes shared memory from /dev/shm when all who used it have ended."""
_TRACKER_LIMIT_S, _POLL_S = 5.0, 0.02
_LAST_LINES, _LONGEST_LINE = 5, 500
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


class Process:
    """A `vllm serve` in a new session; it ends with this process, even if this one is killed."""

    def __init__(
        self, command: Callable[[int], list[str]], environment: Mapping[str, str], log: Path
    ) -> None:
        """Start it; `command` is for a port. Raises ModelError if there is no such program."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, words = f"http://127.0.0.1:{port}", command(port)
        self._log, self._log_start = log, log.stat().st_size if log.exists() else 0
        try:
            with log.open("ab") as out:
                self._popen = subprocess.Popen(
                    words,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_dying_with_parent(),
                )
        except OSError as error:
            raise ModelError(
                f"vLLM cannot be started: {error.strerror}",
                where=f"rollout.executable={words[0]}",
                fix="install vLLM (>= 0.32) in an environment and name its bin/vllm there",
            ) from error

    @property
    def pid(self) -> int:
        """The id of the process; its children do the work."""
        return self._popen.pid

    @property
    def runs(self) -> bool:
        """Whether the process exists; it may hang."""
        return self._popen.poll() is None

    @property
    def last_errors(self) -> str:
        """The last errors in its part of the log, or else the last lines."""
        lines = self._log.read_bytes()[self._log_start :].decode("utf-8", "replace").splitlines()
        errors = [line[:_LONGEST_LINE] for line in lines if re.search(r"\b[A-Z]\w*Error: ", line)]
        return "\n".join(errors[-_LAST_LINES:] or lines[-_LAST_LINES:])

    def end(self, *, at_once: bool) -> None:
        """End it and its children, at last those that remove the shared memory of the others."""
        if not at_once and self.runs:
            self._popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_GRACE_S)
        for process in self._members(trackers=False):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        end = time.monotonic() + _TRACKER_LIMIT_S
        while any(self._members(trackers=True)) and time.monotonic() < end:
            time.sleep(_POLL_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    def _members(self, *, trackers: bool) -> Iterator[psutil.Process]:
        """What runs in its session: all but the trackers of shared memory, or those alone."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) != self._popen.pid or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if any(_TRACKER in word for word in process.cmdline()) == trackers:
                    yield process


def _dying_with_parent() -> Callable[[], None] | None:
    """Make a function to run in the child before vLLM: Linux then sends it SIGTERM when this process ends."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_DIE_WITH_PARENT, signal.SIGTERM)
