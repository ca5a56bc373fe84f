"""Turns image references into patches, the same for every stage: bounded decode, resize, patches.

SFT, rollouts, RL, evaluation and serving all get their patches here, so that the model never sees
an image at another size than it was trained on. How many patches an image has follows from its width and
height; its file is read where its pixels are used, or ahead of that in worker threads (`prepare`). What a
family's patches are says its `ImageProcessing` (see `patches`).
"""

import hashlib
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlcs.data.images import OpenImage, open_image
from rlcs.errors import ImageError
from rlcs.model.patches import Grid, ImageProcessing
from rlcs.records import ImageRef

CPU = torch.device("cpu")


class ImagePipeline:
    """Patches of images, with the most recently used ones kept in memory; for any thread."""

    def __init__(
        self,
        processing: ImageProcessing,
        *,
        decode_limit: int,
        cache_bytes: int = 1 << 31,
        workers: int = 4,
        decode: OpenImage = open_image,
    ) -> None:
        """`workers` threads `decode` what `prepare` names; they end when nothing is left to do."""
        self._processing = processing
        self._open_image = decode
        self.merge_size = processing.merge_size
        self._decode_limit = decode_limit
        self._cache_bytes, self._workers = cache_bytes, workers
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._used = 0
        self._changed = threading.Condition()  # guards all that follows and the cache
        self._waiting: OrderedDict[str, ImageRef] = OrderedDict()
        self._decoding: set[str] = set()
        self._readable: set[str] = set()
        self._threads = 0

    # --- sizes, without reading a file --------------------------------------------------------------

    def grid(self, ref: ImageRef) -> Grid:
        """Frames, height and width of one image in patches, by its size alone. Raises ImageError."""
        return self._processing.grid(ref.height, ref.width, where=ref.path or f"image {ref.sha256[:12]}")

    def _bytes(self, ref: ImageRef) -> int:
        """What the patches of an image take in the cache."""
        return self._processing.compact_bytes(self.grid(ref))

    # --- pixels -------------------------------------------------------------------------------------

    def patches(self, ref: ImageRef, device: torch.device = CPU) -> Tensor:
        """The patches of one image on a device, as its processor makes them, bit by bit.

        Raises ImageError, also for a file that has changed since its size was read.
        """
        return self._processing.expanded(self._compact(ref).to(device), self.grid(ref))

    def masked_patches(self, ref: ImageRef, device: torch.device = CPU, *, share: float, seed: int) -> Tensor:
        """The same with a share of the patches black, each with that chance; `seed` and image decide which.

        Raises ImageError.
        """
        compact, grid = self._compact(ref), self.grid(ref)
        key = hashlib.sha256(f"{seed}|{ref.sha256}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        chosen = torch.rand(math.prod(grid), generator=generator) < share
        black = self._processing.black(compact, chosen, (ref.height, ref.width))
        return self._processing.expanded(black.to(device), grid)

    def resized(self, ref: ImageRef) -> Image.Image:
        """The image as the model sees it, for a program with a processor of its own, which keeps it as it is.

        Where there is no such image it is returned whole. Raises ImageError.
        """
        resized = self._processing.resized(self._compact(ref), self.grid(ref))
        return self._open_image(ref, limit=self._decode_limit) if resized is None else resized

    def picture(self, ref: ImageRef) -> Image.Image:
        """All pixels of an image that the model sees, for people. Raises ImageError."""
        return self._processing.picture(self._compact(ref), self.grid(ref))

    def require_readable(self, ref: ImageRef) -> None:
        """Decode an image unless that was done before. Raises ImageError if it is damaged."""
        if ref.sha256 not in self._readable:
            self._compact(ref)

    def prepare(self, refs: Iterable[ImageRef]) -> None:
        """Begin to decode images that are used soon, in this order, and return at once.

        No more than half of the cache is filled ahead. An error is raised where the image is used.
        """
        with self._changed:
            space = self._cache_bytes // 2 - sum(map(self._bytes, self._waiting.values()))
            for ref in refs if self._workers else ():
                if ref.sha256 in self._cache or ref.sha256 in self._waiting or ref.sha256 in self._decoding:
                    continue
                with suppress(ImageError):
                    space -= self._bytes(ref)
                    if space < 0:
                        break
                    self._waiting[ref.sha256] = ref
            started = max(0, min(self._workers - self._threads, len(self._waiting)))
            self._threads += started
        for _ in range(started):
            threading.Thread(target=_work, args=(weakref.ref(self),), name="rlcs-images").start()

    def _next_waiting(self) -> ImageRef | None:
        """The next image for a worker; None: it must end, as nothing is left to do or the process ends."""
        with self._changed:
            if self._waiting and threading.main_thread().is_alive():
                return self._waiting.popitem(last=False)[1]
            self._threads -= 1
            return None

    def _compact(self, ref: ImageRef) -> Tensor:
        """The 8-bit patches of an image. Raises ImageError."""
        key = ref.sha256
        with self._changed:
            self._waiting.pop(key, None)  # what is needed now is not left to a worker
            self._changed.wait_for(lambda: key not in self._decoding)
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            self._decoding.add(key)
        try:
            compact = self._decoded(ref)
            with self._changed:
                self._readable.add(key)
                self._cache[key] = compact
                self._used += compact.nbytes
                while self._used > self._cache_bytes and len(self._cache) > 1:
                    self._used -= self._cache.popitem(last=False)[1].nbytes
            return compact
        finally:
            with self._changed:
                self._decoding.discard(key)
                self._changed.notify_all()

    def _decoded(self, ref: ImageRef) -> Tensor:
        grid = self.grid(ref)  # of the size on which the prompt was built
        return self._processing.cut(np.array(self._open_image(ref, limit=self._decode_limit)), grid)


def _work(pipeline: "weakref.ref[ImagePipeline]") -> None:
    """Decode waiting images; ends with the last of them, with the pipeline, or with the main thread."""
    while (images := pipeline()) is not None and (ref := images._next_waiting()) is not None:
        with suppress(Exception):  # whoever uses the image meets the error
            images._compact(ref)
        del images
