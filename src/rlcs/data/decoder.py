"""Decodes images of strangers in a process of its own, which is killed when one takes too much.

The kernel counts the process's CPU time and address space (`decoder_process`), so that a busy machine fails
no image. The process is a new interpreter, starts with the first image and again after a failure.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any

from rlcs.data.images import DECODE_LIMIT, encoded_image
from rlcs.errors import ImageError, RlcsError
from rlcs.records import ImageRef

if TYPE_CHECKING:
    from PIL.Image import Image

PROGRAM = ("-m", "rlcs.data.decoder_process")
PATIENCE_S = 600.0
"""After so long an image is given up whose process gets no CPU time at all: stopped, or starved."""


class ImageDecoder(AbstractContextManager["ImageDecoder"]):
    """Measures and decodes images one after another, like the functions of `images`; for any thread."""

    def __init__(self) -> None:
        """Nothing is started before the first image."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __exit__(self, *error: object) -> None:
        """End the process."""
        with self._lock:
            self._kill()

    def measured(self, data: bytes, *, limit: int, where: str) -> tuple[int, int]:
        """Width and height as `images.measured` finds them. Raises ImageError."""
        reply, _ = self._ask({"limit": limit, "where": where}, data)
        return reply["width"], reply["height"]

    def open_image(self, ref: ImageRef, *, limit: int | None = None) -> "Image":
        """Decode an image as `images.open_image` does. Raises ImageError."""
        from PIL import Image

        data = encoded_image(ref, limit=limit)
        own = {"sha256": ref.sha256, "width": ref.width, "height": ref.height}
        most = limit or max(DECODE_LIMIT, ref.width * ref.height)
        job = {"limit": most, "where": ref.path or f"image {ref.sha256[:12]}", "ref": own}
        reply, pixels = self._ask(job, data)
        return Image.frombytes("RGB", (reply["width"], reply["height"]), pixels)

    def _ask(self, job: Mapping[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Send one image; the reply, and pixels. Raises ImageError, RlcsError."""
        with self._lock:
            process = self._process = self._process or _start()
            assert process.stdin and process.stdout, "Popen opens both pipes"
            timer = threading.Timer(PATIENCE_S, process.kill)
            timer.start()
            try:
                with suppress(BrokenPipeError):  # it died: its output ends too
                    process.stdin.write(json.dumps({**job, "bytes": len(data)}).encode() + b"\n")
                    process.stdin.write(data)
                    process.stdin.flush()
                reply = json.loads(process.stdout.readline() or b"{}")
                pixels = process.stdout.read(reply.get("bytes", 0))
                if not reply or len(pixels) != reply.get("bytes", 0):
                    raise ImageError(_cause(process.wait()), where=job["where"], fix="replace the image")
            except BaseException:  # also Ctrl-C: what it still writes would be taken for another reply
                self._kill()
                raise
            finally:
                timer.cancel()
        if "what" in reply:
            raise ImageError(reply["what"], where=reply["where"], fix=reply["fix"])
        return reply, pixels

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(BrokenPipeError):
                process.communicate()


def _start() -> "subprocess.Popen[bytes]":
    """Start the process. Raises RlcsError if it cannot run."""
    process = subprocess.Popen(
        [sys.executable, "-P", *PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        start_new_session=True,  # Ctrl-C is for the parent, which ends it
    )
    assert process.stdout, "Popen opens the pipe"
    if process.stdout.readline() != b"ready\n":
        raise RlcsError(
            f"the process that decodes images does not start: {_cause(process.wait())}",
            fix=f"see what `python {' '.join(PROGRAM)}` prints",
        )
    return process


def _cause(code: int) -> str:
    """Why the process ended."""
    if code == -signal.SIGPROF:
        return "it takes far longer to decode than an image of its size should"
    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"its decoder died ({cause})"
