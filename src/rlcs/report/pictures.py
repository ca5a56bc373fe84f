"""Held-out images as data URIs small enough for a page with dozens of them."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlcs.errors import RlcsError
from rlcs.storage import image_from_path, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

TOTAL_BYTES = 1_500_000
"""All embedded images of a page together, before base64."""
_DECODE_LIMIT = 50_000_000


def embed(root: Path, images: Sequence[str], *, most_bytes: int) -> list[str]:
    """Data URIs of the images under `root`, each at most `most_bytes`; unreadable ones are left out.

    Every image is decoded and encoded anew, so nothing but pixels reaches the page.
    """
    found = []
    for name in images:
        try:
            ref = image_from_path(name, root=root, limit=_DECODE_LIMIT)
            found.append(_encode(open_image(ref, limit=_DECODE_LIMIT), most_bytes))
        except (RlcsError, OSError, ValueError):
            continue  # the page says so where the image would be
    return found


def _encode(image: "Image", most_bytes: int) -> str:
    """PNG where that is small (drawings), JPEG of shrinking size where it is not (photographs)."""
    kind, data = "png", b""
    for side in (480, 360, 240, 160, 96):
        small = image.copy()
        small.thumbnail((side, side))
        for kind in ("png", "jpeg"):
            page = io.BytesIO()
            small.save(page, format=kind, optimize=True, quality=80)
            data = page.getvalue()
            if len(data) <= most_bytes:
                return _uri(kind, data)
    return _uri(kind, data)


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
