"""The process of `decoder`: `python -m rlcs.data.decoder_process`.

Protocol: it writes `ready`, then reads requests until its input ends. A request is a line of JSON (`limit` in
pixels, `where`, `bytes`, and for pixels the `ref`) and the encoded image; a reply is a line of JSON (`width`,
`height`, `bytes`, or the parts of an ImageError) and the pixels in RGB.
"""

import json
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

from rlcs.data.images import measured, open_image, pixels_in_header
from rlcs.errors import ImageError
from rlcs.records import ImageRef

_HEADER_S = 5.0
"""CPU seconds for a header, and for all that does not depend on the number of pixels."""
_SECONDS_PER_PIXEL = 5e-7
"""Ten times what the slowest format takes."""
_MEMORY_BYTES = 1 << 30
"""Address space without any pixels: of the interpreter, its libraries and their threads."""
_BYTES_PER_PIXEL = 40
"""Some copies of the pixels, with transparency, and what a decoder needs beside them."""


def main() -> None:
    """Answer requests until the input ends."""
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    replies.write(b"ready\n")
    replies.flush()
    for line in requests:
        job = json.loads(line)
        _allow(pixels=0, size=job["bytes"])
        data = requests.read(job["bytes"])
        try:
            reply, pixels = _decoded(data, **job)
        except ImageError as error:
            reply, pixels = {"what": error.what, "where": error.where, "fix": error.fix}, b""
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(reply).encode() + b"\n" + pixels)
        replies.flush()


def _decoded(
    data: bytes, *, limit: int, where: str, ref: dict[str, Any] | None = None, **_: Any
) -> tuple[dict[str, Any], bytes]:
    """The reply to a request, and pixels if it wants them. Raises ImageError."""
    _allow(pixels=pixels_in_header(data, limit=limit, where=where), size=len(data))
    if ref is None:
        width, height = measured(data, limit=limit, where=where)
        return {"width": width, "height": height}, b""
    try:
        image = open_image(ImageRef(**ref, data=data), limit=limit)
        pixels = image.tobytes()
    except MemoryError:
        raise ImageError("it needs too much memory", where=where, fix="replace the image") from None
    return {"width": image.width, "height": image.height, "bytes": len(pixels)}, pixels


def _allow(*, pixels: int, size: int) -> None:
    """Set the limits for an image of so many pixels and bytes; past the one of time the kernel ends it."""
    memory = _MEMORY_BYTES + 4 * size + _BYTES_PER_PIXEL * pixels
    with suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.setitimer(signal.ITIMER_PROF, _HEADER_S + _SECONDS_PER_PIXEL * pixels)


if __name__ == "__main__":
    main()
