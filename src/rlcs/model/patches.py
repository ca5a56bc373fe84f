"""How pixels become what a vision tower takes: the protocol, flat patches (Qwen-VL) and tiles (InternVL).

Pixels are kept as 8-bit values, a quarter of what the tower takes: fp32, normalised; in Qwen-VL an eighth,
where patches are repeated for the frames of a video. Letters in shapes: N patches, T tiles, C channels, P
patch side, S tile side, H and W pixels.
"""

from math import isqrt
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional
from transformers.image_utils import pil_torch_interpolation_mapping
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from rlcs.errors import ImageError, ModelError

Grid = tuple[int, int, int]
"""Frames (or tiles), height and width of an image in patches."""
PROBE = (75, 58)
"""Width and height of the image by which a processor is compared with our arithmetic."""
_TILED_PROBE = (116, 58)
"""The same for tiles: it has two of them, and a thumbnail."""


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

    def black(self, compact: Tensor, chosen: Tensor, size: tuple[int, int]) -> Tensor:
        """The 8-bit patches of an image of this height and width with the `chosen` ones (N,) black."""
        ...

    def picture(self, compact: Tensor, grid: Grid) -> Image.Image:
        """All pixels that the model sees, for people: tiles side by side."""
        ...

    def resized(self, compact: Tensor, grid: Grid) -> Image.Image | None:
        """The image of which the processor makes these patches again; None where there is no such image."""
        ...


class Normalised:
    """Makes fp32 of 8-bit values, normalised in the order of transformers' image processors."""

    def __init__(self, processor: Any) -> None:
        """`processor` is an image processor of transformers."""
        scale = 1.0 / processor.rescale_factor
        self._mean, self._std = (
            (torch.tensor(of_channels) * scale)[:, None]
            for of_channels in (processor.image_mean, processor.image_std)
        )
        self.channels = len(self._mean)

    def __call__(self, values: Tensor) -> Tensor:
        """The same of values (..., C, n), on their device."""
        mean, std = self._mean.to(values.device), self._std.to(values.device)
        return values.to(torch.float32).sub_(mean).div_(std)


class FlatPatches:
    """Patches of Qwen-VL models: an image is resized to whole image tokens within bounds on its pixels."""

    def __init__(self, processor: Any) -> None:
        """`processor` is an image processor of transformers. Raises ModelError where ours differs."""
        self.merge_size = int(processor.merge_size)
        self._side = int(processor.patch_size)
        self._frames = int(processor.temporal_patch_size)
        self._bounds = int(processor.size["shortest_edge"]), int(processor.size["longest_edge"])
        self._interpolation = pil_torch_interpolation_mapping[processor.resample]
        self._normalised = Normalised(processor)
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
        return height * width * self._normalised.channels * self._side**2

    def cut(self, pixels: Any, grid: Grid) -> Tensor:
        """To patches (N, C x P x P)."""
        size = [side * self._side for side in grid[1:]]
        # Not made contiguous: torchvision resizes pixels whose channels come last many times faster.
        planes = torch.from_numpy(pixels).permute(2, 0, 1)
        planes = functional.resize(planes, size, interpolation=self._interpolation, antialias=True)
        return _patches_of(planes, self._side, self.merge_size)

    def expanded(self, compact: Tensor, grid: Grid) -> Tensor:
        """To patches (N, C x frames x P x P): fp32, normalised in the processor's order."""
        values = self._normalised(compact.unflatten(1, (self._normalised.channels, -1)))
        return values.unsqueeze(2).expand(-1, -1, self._frames, -1).flatten(1)

    def black(self, compact: Tensor, chosen: Tensor, size: tuple[int, int]) -> Tensor:
        """See `ImageProcessing`."""
        return compact.masked_fill(chosen[:, None], 0)

    def picture(self, compact: Tensor, grid: Grid) -> Image.Image:
        """See `ImageProcessing`."""
        height, width = (side * self._side for side in grid[1:])
        return Image.fromarray(_image_of(compact, height, width, self._side, self.merge_size).numpy())

    def resized(self, compact: Tensor, grid: Grid) -> Image.Image | None:
        """None for a few extreme shapes, which would be resized a second time."""
        height, width = (side * self._side for side in grid[1:])
        try:
            if self.grid(height, width, where="") != grid:
                return None
        except ImageError:
            return None
        return self.picture(compact, grid)

    def _compare(self, processor: Any) -> None:
        """Raise ModelError unless our patches of a small image are those of the processor."""
        pixels = probe(*PROBE)
        expected = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
        grid = self.grid(*pixels.shape[:2], where="")
        same_grid = expected["image_grid_thw"].tolist() == [list(grid)]
        if not same_grid or not torch.equal(
            self.expanded(self.cut(pixels, grid), grid), expected["pixel_values"]
        ):
            raise other_patches(processor)


class Tiles:
    """Tiles of InternVL models: an image is resized to rows and columns of square tiles of one size.

    Of all arrangements within the processor's bounds it takes the one whose shape is nearest to the image's.
    Where there are several tiles, the whole image is one more, the thumbnail. A grid is (T, rows, columns of
    patches in a tile).
    """

    merge_size = 2

    def __init__(self, processor: Any) -> None:
        """`processor` is the family's whole processor. Raises ModelError where our tiles differ from its."""
        images = processor.image_processor
        self._side = int(images.size["height"])
        self._cells = self.merge_size * isqrt(processor.image_seq_length)
        self._bounds = int(images.min_patches), int(images.max_patches)
        self._interpolation = pil_torch_interpolation_mapping[images.resample]
        self._normalised = Normalised(images)
        self._compare(processor)

    def grid(self, height: int, width: int, *, where: str) -> Grid:
        """See `ImageProcessing`."""
        rows, columns = self._arrangement(height, width)
        return rows * columns + (rows * columns > 1), self._cells, self._cells

    def compact_bytes(self, grid: Grid) -> int:
        """See `ImageProcessing`."""
        return grid[0] * self._normalised.channels * self._side**2

    def cut(self, pixels: Any, grid: Grid) -> Tensor:
        """To tiles (T, C, S, S), row by row, the thumbnail last."""
        planes = torch.from_numpy(pixels).permute(2, 0, 1)
        rows, columns = self._arrangement(*planes.shape[1:])
        blocks = self._resize(planes, rows, columns)
        blocks = blocks.unflatten(2, (columns, self._side)).unflatten(1, (rows, self._side))
        tiles = blocks.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1, self._side, self._side)
        return torch.cat([tiles, self._resize(planes, 1, 1)[None]]) if len(tiles) > 1 else tiles

    def expanded(self, compact: Tensor, grid: Grid) -> Tensor:
        """To tiles (T, C, S, S): fp32, normalised in the processor's order."""
        return self._normalised(compact.flatten(2)).view_as(compact)

    def black(self, compact: Tensor, chosen: Tensor, size: tuple[int, int]) -> Tensor:
        """See `ImageProcessing`. The thumbnail is black where the tiles are: it would show what they hide."""
        cells, patch, (rows, columns) = self._cells, self._side // self._cells, self._arrangement(*size)
        of_tiles = chosen.view(-1, cells, cells)
        pixels = of_tiles.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        if len(of_tiles) > 1:
            whole = of_tiles[:-1].view(rows, columns, cells, cells).transpose(1, 2)
            whole = whole.reshape(1, 1, rows * cells, columns * cells).float()
            pixels[-1] = torch.nn.functional.interpolate(whole, size=(self._side, self._side))[0, 0].bool()
        return compact.masked_fill(pixels[:, None], 0)

    def picture(self, compact: Tensor, grid: Grid) -> Image.Image:
        """See `ImageProcessing`."""
        return Image.fromarray(compact.permute(2, 0, 3, 1).flatten(1, 2).numpy())

    def resized(self, compact: Tensor, grid: Grid) -> Image.Image | None:
        """None: tiles and thumbnail come from the image as it is."""
        return None

    def _arrangement(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles."""
        tile = (self._side, self._side)
        columns, rows = get_optimal_tiled_canvas((height, width), tile, *self._bounds)
        return rows, columns

    def _resize(self, planes: Tensor, rows: int, columns: int) -> Tensor:
        size = [rows * self._side, columns * self._side]
        resized: Tensor = functional.resize(planes, size, interpolation=self._interpolation, antialias=True)
        return resized

    def _compare(self, processor: Any) -> None:
        """Raise ModelError unless our tiles of a small image are those of the processor."""
        pixels = probe(*_TILED_PROBE)
        image = Image.fromarray(pixels)
        expected = processor(images=[image], text=processor.image_token, return_tensors="pt")["pixel_values"]
        grid = self.grid(*pixels.shape[:2], where="")
        ours = self.expanded(self.cut(pixels, grid), grid)
        if len(ours) != grid[0] or not torch.equal(ours, expected):
            raise other_patches(processor.image_processor)


def probe(width: int, height: int) -> Any:
    """Pixels (H, W, C) by which a processor is compared with our arithmetic."""
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
