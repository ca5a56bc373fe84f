"""Makes the web server of every page and API of rlcs: uvicorn with time limits on idle connections."""

import asyncio
import contextlib
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlcs.errors import UserError

IDLE_S = 15.0
"""Longest time that a connection may stay without a complete request head."""
MAX_CONNECTIONS = 1000
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
        http=_IdleLimitProtocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=int(IDLE_S),
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return uvicorn.Server(config)


def run_until_stopped(app: ASGIApp, sock: socket.socket) -> None:
    """Serve on a listening socket until SIGINT or SIGTERM."""
    with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn after it has shut down
        make_server(app).run(sockets=[sock])


class _IdleLimitProtocol(H11Protocol):
    """Closes connections without a complete request head in time, even if bytes keep arriving."""

    _idle_timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle_timer = self.loop.call_later(IDLE_S, self._close_if_idle, None)

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()  # which begins the next request if that has arrived already
        self._idle_timer.cancel()  # it refers to a request, which could not be freed
        self._idle_timer = self.loop.call_later(IDLE_S, self._close_if_idle, answered)

    def _close_if_idle(self, last: Any) -> None:
        if self.cycle is last and not self.transport.is_closing():
            self.transport.close()
