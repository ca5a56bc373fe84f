"""Ends this process when another rank has ended, even while the main thread waits in native code.

A rank that dies leaves the others in collectives of nccl, which notice it after many minutes, and which no
signal interrupts. So every rank keeps a connection to rank 0 in a thread. When a process ends, the system
closes its connections at once; when a machine is lost, TCP's keep-alive notices within a minute. A rank that
ends in order says so first. One that hangs is left to the limit on waiting (`parallel.timeout_s`).
"""

import hmac
import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger("rlcs")

ENDED = 1
"""Exit code of a process that ends because another rank is gone."""
_POLL_S = 1.0
_CONNECT_S = 60.0
_DONE, _FAILED, _LOST = b"done", b"failed", b"lost"


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Seconds for the main thread to end by itself, with its own message, after a rank died or failed."""

    dead: float = 20.0
    failed: float = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Where rank 0 listens, and the secret that the other ranks show there."""

    host: str
    port: int
    secret: str


class Peers:
    """The watch of one rank over the others: `leave` ends it."""

    def __init__(self, rank: int, *, patience: Patience | None = None) -> None:
        """Nothing is watched before `watch` or `join`."""
        self._rank, self._patience = rank, patience or Patience()
        self._connections: dict[socket.socket, int] = {}
        self._secret = b""
        self._left = threading.Event()
        self._parent = os.getppid()
        self._selector = selectors.DefaultSelector()

    def watch(self, host: str, secret: str) -> Meeting:
        """On rank 0: listen for the others on the addresses of `host` ("" for all), and watch over them."""
        listener = socket.create_server((host, 0))
        self._secret = secret.encode()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._start()
        return Meeting(host=host, port=listener.getsockname()[1], secret=secret)

    def join(self, meeting: Meeting) -> None:
        """On another rank: connect to rank 0, and watch for its end or its word that a rank has ended."""
        try:
            connection = socket.create_connection((meeting.host, meeting.port), timeout=_CONNECT_S)
            _send(connection, meeting.secret.encode(), str(self._rank).encode())
        except OSError as error:
            log.warning(
                "rank %d cannot reach rank 0 at %s:%d (%s): if a rank dies, this one waits up to "
                "parallel.timeout_s", self._rank, meeting.host, meeting.port, error.strerror or error,
            )  # fmt: skip
            return
        self._add(connection, 0)
        self._start()

    def leave(self, *, failed: bool) -> None:
        """Say that this rank ends, by an error or not; from now on nobody watches over anybody."""
        for connection in list(self._connections):
            try:
                _send(connection, _FAILED if failed else _DONE)
            except OSError:  # that rank is gone already
                continue
        self._left.set()

    # --- in the thread ------------------------------------------------------------------------------

    def _start(self) -> None:
        threading.Thread(target=self._run, name="peers", daemon=True).start()

    def _run(self) -> None:
        while not self._left.is_set():
            for key, _ in self._selector.select(_POLL_S):
                handle: Callable[[socket.socket], None] = key.data
                handle(key.fileobj)  # type: ignore[arg-type]
            if self._parent != os.getppid():  # torchrun was killed: stop in order, as it would have asked
                self._parent = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        try:
            connection.settimeout(_POLL_S)
            secret, rank = _receive(connection)[:2]
            if not hmac.compare_digest(secret, self._secret):
                raise ValueError("a stranger")
            self._add(connection, int(rank))
        except (OSError, ValueError):
            connection.close()

    def _add(self, connection: socket.socket, rank: int) -> None:
        connection.settimeout(_POLL_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":  # a lost machine is noticed after 30 + 3 * 10 seconds
            for option, value in (
                (socket.TCP_KEEPIDLE, 30),
                (socket.TCP_KEEPINTVL, 10),
                (socket.TCP_KEEPCNT, 3),
            ):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._connections[connection] = rank
        self._selector.register(connection, selectors.EVENT_READ, self._read)

    def _read(self, connection: socket.socket) -> None:
        rank = self._connections[connection]
        try:
            words = _receive(connection)
        except OSError:
            words = []
        if words and words[0] == _LOST:
            return self._end(int(words[1]), after=float(words[2]))
        self._selector.unregister(connection)
        connection.close()
        del self._connections[connection]
        if words[:1] != [_DONE]:
            self._end(rank, after=self._patience.failed if words else self._patience.dead)

    def _end(self, rank: int, *, after: float) -> None:
        """Tell the others, give the main thread some time to end by itself, then end this process."""
        if self._left.is_set():
            return
        if self._rank == 0:
            for connection in self._connections:
                try:
                    _send(connection, _LOST, str(rank).encode(), str(after).encode())
                except OSError:  # it ends too
                    continue
        deadline = time.monotonic() + after
        while time.monotonic() < deadline:
            if self._left.wait(_POLL_S):
                return
        sys.stderr.write(
            f"error: rank {self._rank} ends, as rank {rank} has ended\n"
            "  -> its own message says why; the same command continues from the last checkpoint\n"
        )
        sys.stderr.flush()
        os._exit(
            ENDED
        )  # the main thread may wait in native code, where no exception and no signal reaches it


def _send(connection: socket.socket, *words: bytes) -> None:
    connection.sendall(b" ".join(words) + b"\n")


def _receive(connection: socket.socket) -> list[bytes]:
    """The words of one line; none at the end of the connection. Raises OSError."""
    line = b""
    while not line.endswith(b"\n"):
        if not (part := connection.recv(1)) or len(line) > 200:
            return []
        line += part
    return line.split()
