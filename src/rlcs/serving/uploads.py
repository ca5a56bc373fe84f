"""Reads the bodies of requests, before these hold a place; limits their rate, time, number and bytes.

A body that arrives too slowly is given up. Beyond the number of bodies that may be on their way the oldest is
given up, beyond their bytes the largest: who sends an ordinary request at an ordinary rate never is.
"""

import asyncio
from contextlib import suppress

from starlette.requests import Request

from rlcs.serving.protocol import ApiError

GRACE_S = 10.0
"""Seconds that every body has, whatever its rate."""
LEAST_BYTES_PER_S = 16_384
LONGEST_S = 120.0
MAX_UPLOADS = 256
_MAX_BODIES = 4
"""Most bytes of all bodies on their way, in largest bodies."""


class Uploads:
    """The bodies that are on their way."""

    def __init__(self, *, max_bytes: int) -> None:
        """Refuse bodies of more than `max_bytes`."""
        self._max_bytes = max_bytes
        self._sizes: dict[asyncio.Timeout, int] = {}  # from the oldest to the newest

    async def read(self, request: Request) -> bytes:
        """The whole body. Raises ApiError, ClientDisconnect."""
        began, body = asyncio.get_running_loop().time(), bytearray()
        try:
            async with asyncio.timeout(GRACE_S) as limit:
                self._sizes[limit] = 0
                try:
                    async for chunk in request.stream():
                        body += chunk
                        if len(body) > self._max_bytes:
                            raise ApiError(413, f"the request is larger than {self._max_bytes:,} bytes")
                        if limit in self._sizes:
                            self._sizes[limit] = len(body)
                            earned = min(GRACE_S + len(body) / LEAST_BYTES_PER_S, LONGEST_S)
                            limit.reschedule(began + earned)
                        self._give_up_one()
                finally:
                    self._sizes.pop(limit, None)
        except TimeoutError as error:
            raise ApiError(408, "the body of the request came too slowly", code="timeout") from error
        return bytes(body)

    def _give_up_one(self) -> None:
        """End the oldest or the largest of the bodies if there are too many, or too much of them."""
        if len(self._sizes) > MAX_UPLOADS:
            limit = next(iter(self._sizes))
        elif sum(self._sizes.values()) > _MAX_BODIES * self._max_bytes:
            limit = max(self._sizes, key=self._sizes.__getitem__)
        else:
            return
        del self._sizes[limit]
        with suppress(RuntimeError):  # it is ending already
            limit.reschedule(0)
