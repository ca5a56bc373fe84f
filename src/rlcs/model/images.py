"""Turns image references into patches, the same for every stage: bounded decode, resize, patches.

SFT, rollouts, RL, evaluation and serving all get their patches here, so that the model never sees
an image at another size than it was trained on. How many patches an image has follows from its width and
height; its file is read where its pixels are used, or ahead of that in worker threads (`prepare`).

Patches are kept as 8-bit values of one frame, an eighth of what the vision tower takes: fp32, normalised,
and repeated for the frames of a video. Letters in shapes: N patches, C channels, P patch side.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional
from transformers.image_utils import pil_torch_interpolation_mapping
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from rlcs.data.images import open_image
from rlcs.errors import ImageError, ModelError
from rlcs.records import ImageRef

Grid = tuple[int, int, int]
"""Frames, height and width of an image in patches."""
CPU = torch.device("cpu")
_PROBE = (75, 58)
"""Width and height of the image by which a processor is compared with our arithmetic."""


class ImagePipeline:
    """Patches of images, with the most recently used ones kept in memory; for any thread."""

    def __init__(
        self, image_processor: Any, *, decode_limit: int, cache_bytes: int = 1 << 31, workers: int = 4
    ) -> None:
        """`image_processor` is of transformers, with the pixel bounds of the recipe set on it.

        `workers` threads decode what `prepare` names; they end when nothing is left to do. Raises ModelError
        for a processor that computes other patches than we do.
        """
        self.merge_size = int(image_processor.merge_size)
        self.patch_size = int(image_processor.patch_size)
        self._frames = int(image_processor.temporal_patch_size)
        self._bounds = int(image_processor.size["shortest_edge"]), int(image_processor.size["longest_edge"])
        self._interpolation = pil_torch_interpolation_mapping[image_processor.resample]
        scale = 1.0 / image_processor.rescale_factor
        self._mean, self._std = (
            (torch.tensor(of_channels) * scale)[:, None]
            for of_channels in (image_processor.image_mean, image_processor.image_std)
        )
        self._decode_limit = decode_limit
        self._cache_bytes, self._workers = cache_bytes, workers
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._used = 0
        self._changed = threading.Condition()  # guards all that follows and the cache
        self._waiting: OrderedDict[str, ImageRef] = OrderedDict()
        self._decoding: set[str] = set()
        self._readable: set[str] = set()
        self._threads = 0
        self._compare(image_processor)

    # --- sizes, without reading a file --------------------------------------------------------------

    def grid(self, ref: ImageRef) -> Grid:
        """Frames, height and width of one image in patches, by its size alone. Raises ImageError."""
        height, width = self._resized(ref.height, ref.width, where=ref.path or f"image {ref.sha256[:12]}")
        return 1, height // self.patch_size, width // self.patch_size

    def _resized(self, height: int, width: int, *, where: str) -> tuple[int, int]:
        low, high = self._bounds
        try:
            size = smart_resize(height, width, self.patch_size * self.merge_size, low, high)
        except ValueError as error:
            raise ImageError(
                f"the image processor refuses it: {error}",
                where=where,
                fix="crop it: its longer side may be at most 200 times the shorter one",
            ) from error
        return int(size[0]), int(size[1])

    def _bytes(self, ref: ImageRef) -> int:
        """What the patches of an image take in the cache."""
        _, height, width = self.grid(ref)
        return height * width * len(self._mean) * self.patch_size**2

    # --- pixels -------------------------------------------------------------------------------------

    def patches(self, ref: ImageRef, device: torch.device = CPU) -> Tensor:
        """Patches (N, frames x C x P x P) of one image on a device, as its processor makes them, bit by bit.

        Raises ImageError, also for a file that has changed since its size was read.
        """
        return self._expanded(self._compact(ref).to(device))

    def _expanded(self, compact: Tensor) -> Tensor:
        """What the vision tower takes: fp32, normalised in the processor's order, repeated for its frames."""
        device = compact.device
        values: Tensor = compact.unflatten(1, (len(self._mean), -1)).to(torch.float32)
        values = values.sub_(self._mean.to(device)).div_(self._std.to(device))
        return values.unsqueeze(2).expand(-1, -1, self._frames, -1).flatten(1)

    def resized(self, ref: ImageRef) -> Image.Image:
        """The image as the model sees it, for a program with a processor of its own, which keeps it as it is.

        A few extreme shapes would be resized a second time: they are returned whole. Raises ImageError.
        """
        height, width = (side * self.patch_size for side in self.grid(ref)[1:])
        try:
            same = self._resized(height, width, where="") == (height, width)
        except ImageError:
            same = False
        if not same:
            return open_image(ref, limit=self._decode_limit)
        pixels = _image_of(self._compact(ref), height, width, self.patch_size, self.merge_size)
        return Image.fromarray(pixels.numpy())

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
        """The 8-bit patches (N, C x P x P) of one frame of an image. Raises ImageError."""
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
        return self._cut(np.array(open_image(ref, limit=self._decode_limit)), grid)

    def _cut(self, pixels: Any, grid: Grid) -> Tensor:
        """Resize 8-bit pixels (H, W, C) to a grid and cut them into patches."""
        size = [side * self.patch_size for side in grid[1:]]
        # Not made contiguous: torchvision resizes pixels whose channels come last many times faster.
        planes = torch.from_numpy(pixels).permute(2, 0, 1)
        planes = functional.resize(planes, size, interpolation=self._interpolation, antialias=True)
        return _patches_of(planes, self.patch_size, self.merge_size)

    def _compare(self, processor: Any) -> None:
        """Raise ModelError unless our patches of a small image are those of the processor."""
        width, height = _PROBE
        pixels = (np.arange(3 * width * height) * 7 % 256).astype(np.uint8).reshape(height, width, 3)
        expected = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
        grid = self.grid(ImageRef(sha256="0" * 64, width=width, height=height))
        same_grid = expected["image_grid_thw"].tolist() == [list(grid)]
        if not same_grid or not torch.equal(
            self._expanded(self._cut(pixels, grid)), expected["pixel_values"]
        ):
            raise ModelError(
                f"the model's image processor ({type(processor).__name__}) computes other patches than rlcs",
                where="image processor",
                fix="use the one that the model was published with; rlcs supports those of Qwen-VL models",
            )


def _work(pipeline: "weakref.ref[ImagePipeline]") -> None:
    """Decode waiting images; ends with the last of them, with the pipeline, or with the main thread."""
    while (images := pipeline()) is not None and (ref := images._next_waiting()) is not None:
        with suppress(Exception):  # whoever uses the image meets the error
            images._compact(ref)
        del images


def _patches_of(pixels: Tensor, side: int, merge: int) -> Tensor:
    """Cut pixels (C, H, W) into patches (N, C x P x P), those of one image token next to each other."""
    blocks: Tensor = pixels.unflatten(2, (-1, merge, side)).unflatten(1, (-1, merge, side))
    return blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, len(pixels) * side**2)


def _image_of(patches: Tensor, height: int, width: int, side: int, merge: int) -> Tensor:
    """The pixels (H, W, C) that `_patches_of` cut."""
    rows, columns = height // side // merge, width // side // merge
    blocks = patches.reshape(rows, columns, merge, merge, -1, side, side)
    return blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(height, width, -1)
