"""How a pool and a worker talk: over a socket that is not there while the worker decides.

A worker connects, says what it has decided, gets the next question and disconnects; only then does it call
code that may write to, read from or close every open handle. A message begins with the secret that came with
the question which it answers, so that nothing else is taken for one, nor a second answer to it.
"""

import contextlib
import secrets
import shutil
import sys
import tempfile
from json import dumps, loads  # by name, as user code may replace what stands in the modules
from pathlib import Path
from socket import AF_UNIX, socket
from typing import Any

VARIABLE = "RLCS_GRADER"
"""Environment variable with address and secret for a worker, which removes it."""
_LONGEST_REPLY = 4 << 20


class Channel:
    """The pool's end, for one worker. Nothing here waits: `sockets` is what to wait for."""

    def __init__(self) -> None:
        """Open a socket; `address` and `secret` are for the worker."""
        self.secret = secrets.token_hex(16)
        self._folder: str | None = None
        if sys.platform == "linux":
            self.address = f"\0rlcs-{secrets.token_hex(16)}"  # in no folder, so that none can be too long
        else:
            self._folder = tempfile.mkdtemp(prefix="rlcs-")
            self.address = str(Path(self._folder) / "socket")
        self._listener = socket(AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen()
        self._listener.setblocking(False)
        self._connection: socket | None = None
        self._received, self._rest = b"", b""
        self._is_waiting = False

    @property
    def sockets(self) -> list[tuple[socket, bool]]:
        """Each socket that something may happen on, and whether it is waited for to write."""
        if self._connection is None:
            return [(self._listener, False)]
        return [] if self._is_waiting else [(self._connection, bool(self._rest))]

    def receive(self) -> list[Any]:
        """What the worker has said, if that is complete: one value; and go on with writing."""
        with contextlib.suppress(BlockingIOError):
            if self._rest:
                self._write()
            while not self._rest and not self._is_waiting:
                if self._connection is None:
                    self._connection, _ = self._listener.accept()
                    self._connection.setblocking(False)
                if (found := self._read(self._connection)) is not None:
                    return found
        return []

    def _read(self, connection: socket) -> list[Any] | None:
        """Read once: [the value] when that is complete; a stranger is disconnected."""
        try:
            chunk = connection.recv(1 << 16)
        except ConnectionError:
            chunk = b""
        self._received += chunk
        if chunk and not chunk.endswith(b"\n") and len(self._received) < _LONGEST_REPLY:
            return None
        secret, _, text = self._received.partition(b" ")
        self._received = b""
        if secrets.compare_digest(secret, self.secret.encode()):
            with contextlib.suppress(ValueError):
                self._is_waiting = True
                return [loads(text)]
        self._disconnect()
        return None

    def send(self, question: Any) -> None:
        """Answer the worker, which waits, with a question and the secret for its answer."""
        self.secret = secrets.token_hex(16)
        self._rest, self._is_waiting = dumps([self.secret, question]).encode(), False
        with contextlib.suppress(BlockingIOError):
            self._write()

    def _write(self) -> None:
        assert self._connection is not None, "a question answers a worker that waits"
        try:
            while self._rest:
                self._rest = self._rest[self._connection.send(self._rest) :]
        except ConnectionError:  # it died, which its pool sees
            self._rest = b""
        self._disconnect()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection, self._is_waiting = None, False

    def close(self) -> None:
        """Close all; the worker, where it waits, ends."""
        self._disconnect()
        self._listener.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def exchange(address: str, secret: str, value: Any) -> tuple[str, Any] | None:
    """The worker's end: say what was decided, wait for a question and its secret; None: there are no more."""
    with socket(AF_UNIX) as connection:
        connection.settimeout(None)
        connection.connect(address)
        connection.sendall(f"{secret} {dumps(value)}\n".encode())
        text = b""
        while chunk := connection.recv(1 << 16):
            text += chunk
    return tuple(loads(text)) if text else None
