"""Images as data URIs small enough for a page with dozens of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlcs.data.images import DECODE_LIMIT, data_uri, encode, image_from_path, open_image
from rlcs.errors import RlcsError

if TYPE_CHECKING:
    from PIL.Image import Image

TOTAL_BYTES = 1_500_000
"""All embedded images of a page together, before base64."""


_BOX = (288, 240)
"""The largest size on a page; small images are enlarged up to half of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A data URI with the size in which it is shown, so that nothing moves when it appears."""

    uri: str
    width: int
    height: int


def embed(root: Path, images: Sequence[str], *, most_bytes: int) -> list[Picture]:
    """The images under `root`, each of at most `most_bytes`; unreadable ones are left out.

    Every image is decoded and encoded again, so that only its pixels are on the page.
    """
    found = []
    for name in images:
        try:
            ref = image_from_path(name, root=root, limit=DECODE_LIMIT)
            image = open_image(ref)
            scale = min(box / side for box, side in zip(_BOX, image.size, strict=True))
            scale = min(scale, max(1.0, _BOX[0] / 2 / image.width))
            width, height = (max(1, round(scale * side)) for side in image.size)
            uri = data_uri(_fitting(image, most_bytes))
            found.append(Picture(uri=uri, width=width, height=height))
        except (RlcsError, OSError, ValueError):
            continue  # the page has a note in its place
    return found


def _fitting(image: "Image", most_bytes: int) -> bytes:
    """PNG where that is small (drawings), JPEG of shrinking size where it is not (photographs)."""
    data = b""
    for side in (480, 360, 240, 160, 96):
        small = image.copy()
        small.thumbnail((side, side))
        for kind in ("PNG", "JPEG"):
            data = encode(small, kind, optimize=True, quality=80)
            if len(data) <= most_bytes:
                return data
    return data
