"""Makes the web server of every page and API of rlcs: uvicorn with time limits on idle connections."""

import asyncio
import contextlib
import json
import resource
import socket
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlcs.errors import UserError

IDLE_S = 15.0
"""Longest time that a connection may stay without a complete request head."""
TAKEN_S = 30.0
"""Longest time in which a client must take the 64 KiB that wait for it."""
MAX_CONNECTIONS = 1000
_MAX_SMALL_PIECES, _MEAN_PIECE_BYTES = 10_000, 64
_OTHER_FILES = 200
"""Open files beside the connections."""
SHUTDOWN_S = 30


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises UserError when the address is taken or not allowed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        fix = "choose another --port (0: any free one)"
        raise UserError(f"cannot listen: {error.strerror}", where=f"{host}:{port}", fix=fix) from error


def make_server(app: ASGIApp) -> uvicorn.Server:
    """Make a server to `run(sockets=[...])` until SIGINT or SIGTERM; requests under way get half a minute."""
    config = uvicorn.Config(
        app,
        http=_LimitedProtocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=_allow_connections(),
        timeout_keep_alive=int(IDLE_S),
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return uvicorn.Server(config)


def _allow_connections() -> int:
    """Raise the process's limit of open files if it must be; the number of connections that it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(soft - _OTHER_FILES, soft // 2)
    return MAX_CONNECTIONS


def run_until_stopped(app: ASGIApp, sock: socket.socket) -> None:
    """Serve on a listening socket until SIGINT or SIGTERM."""
    with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn after it has shut down
        make_server(app).run(sockets=[sock])


class _Connection(h11.Connection):
    """Refuses bodies in very small pieces, each of which takes as long to read as a large one."""

    _pieces = _bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._pieces = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._pieces, self._bytes = self._pieces + 1, self._bytes + len(event.data)
            if self._pieces > _MAX_SMALL_PIECES + self._bytes // _MEAN_PIECE_BYTES:
                raise h11.RemoteProtocolError("the body comes in too small pieces")
        return event


class _LimitedProtocol(H11Protocol):
    """HTTP with limits on what a connection may cost.

    One without a complete request head in time is closed, even if bytes keep arriving, and so is one whose
    client does not take what is sent. Where there are too many connections, those which have been without
    a request for longest are closed, so that an ordinary request is always answered.
    """

    _waits_since: float
    _idle_timer: asyncio.TimerHandle
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn = _Connection(h11.SERVER)
        self._most, self.limit_concurrency = self.config.limit_concurrency, None  # which would answer 503
        self._wait_for_request(None)
        if len(self.connections) > (self._most or MAX_CONNECTIONS):
            limited = (each for each in self.connections if isinstance(each, _LimitedProtocol))
            waiting = sorted(
                (each for each in limited if each.is_waiting), key=lambda each: each._waits_since
            )
            for each in waiting[: len(waiting) // 16 + 1]:
                each.transport.abort()

    @property
    def is_waiting(self) -> bool:
        """Whether it has no request under way."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not self.transport.is_closing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle_timer.cancel()
        self._cancel_write_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()  # which begins the next request if that has arrived already
        self._idle_timer.cancel()  # it refers to a request, which could not be freed
        self._wait_for_request(answered)

    def _wait_for_request(self, last: Any) -> None:
        self._waits_since = self.loop.time()
        self._idle_timer = self.loop.call_later(IDLE_S, self._close_if_idle, last)

    def _close_if_idle(self, last: Any) -> None:
        if self.cycle is last:
            self.transport.abort()  # a plain close would wait for a client that takes nothing

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(TAKEN_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_write_timer()

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # it is answered already
            return
        what = {"message": msg, "type": "invalid_request_error", "param": None, "code": None}
        headers = [("content-type", "application/json"), ("connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason="Bad Request"),
            h11.Data(data=json.dumps({"error": what}).encode()),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
