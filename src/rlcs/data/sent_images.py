"""Images as they are sent to servers: what the student sees, upright, in RGB and within the recipe's pixels.

An image within the bounds whose file any server reads (upright PNG or JPEG, 8 bits, no transparency) is sent
as it is. Others are decoded like the student's, shrunk if they are too large, and encoded: without loss where
that is small. Small images are not enlarged: the server's own processor does that.
"""

import threading
from collections import OrderedDict

from rlcs.data.images import (
    OpenImage,
    data_uri,
    encode,
    encoded_image,
    image_kind,
    is_plain,
    open_image,
)
from rlcs.records import ImageRef

FACTOR = 28
"""A shrunk image's sides are multiples of so many pixels, as Qwen2.5-VL's own processor makes them, so that
it does not resize a second time."""
LOSSLESS_BYTES = 1_500_000
"""Largest PNG that is made; what would be larger is a photograph, and becomes a JPEG of quality 95."""
_CACHE_BYTES = 128_000_000


class SentImages:
    """The `data:` URLs of images, with the most recently used ones kept in memory; for any thread."""

    def __init__(self, *, max_pixels: int, decode: OpenImage = open_image) -> None:
        """Shrink images with more than `max_pixels`, which are opened by `decode`."""
        self._max_pixels = max_pixels
        self._open_image = decode
        self._cache: OrderedDict[str, str] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def url(self, ref: ImageRef) -> str:
        """The image as a `data:` URL. Raises ImageError."""
        with self._lock:  # so that the samples of one problem encode its image once
            if (url := self._cache.get(ref.sha256)) is not None:
                self._cache.move_to_end(ref.sha256)
                return url
            url = data_uri(sent_image(ref, max_pixels=self._max_pixels, decode=self._open_image))
            self._cache[ref.sha256] = url
            self._used += len(url)
            while self._used > _CACHE_BYTES and len(self._cache) > 1:
                self._used -= len(self._cache.popitem(last=False)[1])
            return url


def sent_image(ref: ImageRef, *, max_pixels: int, decode: OpenImage = open_image) -> bytes:
    """A PNG or JPEG of the image as the student sees it. Raises ImageError."""
    data = encoded_image(ref)
    is_large = ref.width * ref.height > max_pixels
    if not is_large and is_plain(data):
        return data
    image = decode(ref)
    if is_large:
        from PIL.Image import Resampling

        image = image.resize(shrunk(*image.size, max_pixels), Resampling.BICUBIC)
    was_jpeg = image_kind(data) == "jpeg"
    if not was_jpeg and len(png := encode(image)) <= LOSSLESS_BYTES:
        return png
    return encode(image, "JPEG", quality=95, subsampling=0)


def shrunk(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Width and height within `max_pixels`, in the same proportion; sides above FACTOR in multiples of it."""
    scale = (max_pixels / (width * height)) ** 0.5
    wide, high = (max(1, int(side * scale)) for side in (width, height))
    return wide - (wide % FACTOR if wide > FACTOR else 0), high - (high % FACTOR if high > FACTOR else 0)
