"""How pixels become the patches of a vision tower: its protocol, and the flat patches of Qwen-VL models.

Patches are kept as 8-bit values of one frame, an eighth of what the tower takes: fp32, normalised, and
repeated for the frames of a video. Letters in shapes: N patches, C channels, P patch side, H and W pixels.
"""

from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional
from transformers.image_utils import pil_torch_interpolation_mapping
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from rlcs.errors import ImageError, ModelError

Grid = tuple[int, int, int]
"""Frames (or tiles), height and width of an image in patches."""


class ImageProcessing(Protocol):
    """Grids and patches of images, as the processor of a family makes them."""

    @property
    def merge_size(self) -> int:
        """Patches along a side of what becomes one image token."""
        ...

    def grid(self, height: int, width: int, *, where: str) -> Grid:
        """The grid of an image of this size. Raises ImageError for a shape that the model cannot take."""
        ...

    def compact_bytes(self, grid: Grid) -> int:
        """What the 8-bit patches of a grid take."""
        ...

    def cut(self, pixels: Any, grid: Grid) -> Tensor:
        """Resize 8-bit pixels (H, W, C) to a grid and cut them into 8-bit patches."""
        ...

    def expanded(self, compact: Tensor, grid: Grid) -> Tensor:
        """What the vision tower takes for 8-bit patches of a grid, on their device."""
        ...

    def resized(self, compact: Tensor, grid: Grid) -> Image.Image | None:
        """The image of which the processor makes these patches again; None where there is no such image."""
        ...


class FlatPatches:
    """Patches of Qwen-VL models: an image is resized to whole image tokens within bounds on its pixels."""

    def __init__(self, processor: Any) -> None:
        """`processor` is an image processor of transformers. Raises ModelError where ours differs."""
        self.merge_size = int(processor.merge_size)
        self._side = int(processor.patch_size)
        self._frames = int(processor.temporal_patch_size)
        self._bounds = int(processor.size["shortest_edge"]), int(processor.size["longest_edge"])
        self._interpolation = pil_torch_interpolation_mapping[processor.resample]
        scale = 1.0 / processor.rescale_factor
        self._mean, self._std = (
            (torch.tensor(of_channels) * scale)[:, None]
            for of_channels in (processor.image_mean, processor.image_std)
        )
        self._compare(processor)

    def grid(self, height: int, width: int, *, where: str) -> Grid:
        """See `ImageProcessing`."""
        low, high = self._bounds
        try:
            size = smart_resize(height, width, self._side * self.merge_size, low, high)
        except ValueError as error:
            raise ImageError(
                f"the image processor refuses it: {error}",
                where=where,
                fix="crop it: its longer side may be at most 200 times the shorter one",
            ) from error
        return 1, int(size[0]) // self._side, int(size[1]) // self._side

    def compact_bytes(self, grid: Grid) -> int:
        """See `ImageProcessing`."""
        _, height, width = grid
        return height * width * len(self._mean) * self._side**2

    def cut(self, pixels: Any, grid: Grid) -> Tensor:
        """To patches (N, C x P x P)."""
        size = [side * self._side for side in grid[1:]]
        # Not made contiguous: torchvision resizes pixels whose channels come last many times faster.
        planes = torch.from_numpy(pixels).permute(2, 0, 1)
        planes = functional.resize(planes, size, interpolation=self._interpolation, antialias=True)
        return _patches_of(planes, self._side, self.merge_size)

    def expanded(self, compact: Tensor, grid: Grid) -> Tensor:
        """To patches (N, C x frames x P x P): fp32, normalised in the processor's order."""
        device = compact.device
        values: Tensor = compact.unflatten(1, (len(self._mean), -1)).to(torch.float32)
        values = values.sub_(self._mean.to(device)).div_(self._std.to(device))
        return values.unsqueeze(2).expand(-1, -1, self._frames, -1).flatten(1)

    def resized(self, compact: Tensor, grid: Grid) -> Image.Image | None:
        """None for a few extreme shapes, which would be resized a second time."""
        height, width = (side * self._side for side in grid[1:])
        try:
            if self.grid(height, width, where="") != grid:
                return None
        except ImageError:
            return None
        return Image.fromarray(_image_of(compact, height, width, self._side, self.merge_size).numpy())

    def _compare(self, processor: Any) -> None:
        """Raise ModelError unless our patches of a small image are those of the processor."""
        pixels = probe()
        expected = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
        grid = self.grid(*pixels.shape[:2], where="")
        same_grid = expected["image_grid_thw"].tolist() == [list(grid)]
        if not same_grid or not torch.equal(
            self.expanded(self.cut(pixels, grid), grid), expected["pixel_values"]
        ):
            raise other_patches(processor)


def probe() -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """The pixels (H, W, C) of the image by which a processor is compared with our arithmetic."""
    width, height = 75, 58
    return (np.arange(3 * width * height) * 7 % 256).astype(np.uint8).reshape(height, width, 3)


def other_patches(processor: Any) -> ModelError:
    """The error for an image processor of which we would not make the same patches."""
    return ModelError(
        f"the model's image processor ({type(processor).__name__}) computes other patches than rlcs",
        where="image processor",
        fix="use the one that the model was published with",
    )


def _patches_of(pixels: Tensor, side: int, merge: int) -> Tensor:
    """Cut pixels (C, H, W) into patches (N, C x P x P), those of one image token next to each other."""
    blocks: Tensor = pixels.unflatten(2, (-1, merge, side)).unflatten(1, (-1, merge, side))
    return blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, len(pixels) * side**2)


def _image_of(patches: Tensor, height: int, width: int, side: int, merge: int) -> Tensor:
    """The pixels (H, W, C) that `_patches_of` cut."""
    rows, columns = height // side // merge, width // side // merge
    blocks = patches.reshape(rows, columns, merge, merge, -1, side, side)
    return blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(height, width, -1)
