"""Turns image references into patches, the same for every stage: bounded decode, resize, patches.

SFT, rollouts, RL, evaluation and serving all get their patches here, so that the model never sees
an image at another size than it was trained on.
"""

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from rlcs.data.images import open_image
from rlcs.errors import ImageError
from rlcs.records import ImageRef


class ImagePipeline:
    """Processed patches of images, with the most recently used ones kept in memory; for any thread."""

    def __init__(self, image_processor: Any, *, decode_limit: int, cache_bytes: int = 1 << 29) -> None:
        """`image_processor` is of transformers, with the pixel bounds of the recipe set on it."""
        self._processor = image_processor
        self._decode_limit = decode_limit
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[str, tuple[Tensor, tuple[int, int, int]]] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    @property
    def merge_size(self) -> int:
        """Patches along each side of one image token."""
        return int(self._processor.merge_size)

    def patches(self, ref: ImageRef) -> Tensor:
        """Patches (patches, patch size) of one image. Raises ImageError."""
        return self._load(ref)[0]

    def grid(self, ref: ImageRef) -> tuple[int, int, int]:
        """Frames, height and width of one image in patches. Raises ImageError."""
        return self._load(ref)[1]

    def by_size(self) -> "ImagePipeline":
        """A pipeline that counts the patches of images by their size, without decoding them."""
        return _ImageSizes(self._processor, decode_limit=self._decode_limit)

    def _load(self, ref: ImageRef) -> tuple[Tensor, tuple[int, int, int]]:
        with self._lock:
            if ref.sha256 in self._cache:
                self._cache.move_to_end(ref.sha256)
                return self._cache[ref.sha256]
        image = open_image(ref, limit=self._decode_limit)
        try:
            features = self._processor(images=[image], return_tensors="pt")
        except ValueError as error:
            raise ImageError(
                f"the image processor refuses it: {error}",
                where=ref.path or f"image {ref.sha256[:12]}",
                fix="crop it: its longer side may be at most 200 times the shorter one",
            ) from error
        patches = features["pixel_values"].to(torch.float32)
        frames, height, width = features["image_grid_thw"][0].tolist()
        entry = (patches, (int(frames), int(height), int(width)))
        with self._lock:
            if ref.sha256 not in self._cache:  # another thread may have been faster
                self._used += patches.nbytes
            self._cache[ref.sha256] = entry
            while self._used > self._cache_bytes and len(self._cache) > 1:
                _, (dropped, _) = self._cache.popitem(last=False)
                self._used -= dropped.nbytes
        return entry


class _ImageSizes(ImagePipeline):
    def grid(self, ref: ImageRef) -> tuple[int, int, int]:
        """All patches of one image in one row: only their number is known. Raises ImageError."""
        try:
            return 1, 1, int(self._processor.get_number_of_image_patches(ref.height, ref.width))
        except ValueError as error:
            raise ImageError(f"the image processor refuses it: {error}", where=ref.path or "") from error
