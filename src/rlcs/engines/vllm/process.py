"""Runs `vllm serve` as a process that ends with this one, and reads its log."""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from rlcs.errors import ModelError

_GRACE_S = 10.0
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
        """End it and its children."""
        if not at_once and self.runs:
            self._popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


def _dying_with_parent() -> Callable[[], None] | None:
    """Make a function to run in the child before vLLM: Linux then sends it SIGTERM when this process ends."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_DIE_WITH_PARENT, signal.SIGTERM)
