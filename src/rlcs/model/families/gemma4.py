"""Gemma 4, dense and with experts: layers with windows, images that see themselves, keys shared by layers.

Images are resized to as many image tokens as fit into a budget, of which the model knows five. Audio and
video are no inputs here; the audio tower that small models have stays as it is.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional
from transformers import PreTrainedModel
from transformers.image_utils import pil_torch_interpolation_mapping
from transformers.models.gemma4.image_processing_gemma4 import get_aspect_ratio_preserving_size

from rlcs.errors import ModelError
from rlcs.model import attention
from rlcs.model.chat_format import ChatFormat
from rlcs.model.families.family import Family
from rlcs.model.patches import PROBE, Grid, other_patches, probe

log = logging.getLogger("rlcs")

BUDGETS = (70, 140, 280, 560, 1120)
"""The numbers of tokens of an image that the models were trained with, at most; 280 is the usual one."""


class Gemma4(Family):
    """Gemma 4."""

    model_type = "gemma4"
    vision_tower = r"^model\.vision_tower\."
    merger = r"^model\.embed_vision\."
    language_model = r"^(model\.language_model\.|lm_head\.)"
    unused = r"^model\.(audio_tower|embed_audio)\."
    positions = "line"
    vllm_marks_images = True
    chat_format = ChatFormat(
        opening=("<bos>",),
        turn_start="<|turn>",
        turn_end="<turn|>",
        roles={"system": "system\n", "user": "user\n", "assistant": "model\n"},
        image_start="<|image>",
        image="<|image|>",
        image_end="<image|>",
        never_sampled=("<|audio>", "<|audio|>", "<audio|>", "<|video|>"),
        strips=True,
    )

    def complete(self, config: Any, written: Mapping[str, Any], where: str) -> None:
        """See `Family`."""
        if config.vision_config is None or config.text_config.use_bidirectional_attention == "all":
            raise ModelError(
                "this Gemma 4 has no vision tower, or writes no answers: all its tokens see each other",
                where=where,
                fix="choose E2B, E4B, 26B-A4B or 31B as they were published",
            )

    def install(self, model: PreTrainedModel) -> None:
        """See `Family`; in the tower images are rows of a batch, padded to the longest."""
        attention.install(model, vision="sdpa")

    def image_processing(self, processor: Any, *, min_pixels: int, max_pixels: int) -> "BudgetPatches":
        """See `Family`: the largest budget whose area is at most `max_pixels`, or the smallest there is.

        Images are always enlarged to it, so that `min_pixels` has no effect.
        """
        images = processor.image_processor
        area = _token_area(images)
        fitting = [budget for budget in BUDGETS if budget * area <= max_pixels]
        if not fitting:
            least = BUDGETS[0] * area
            log.warning("images.max_pixels is %d; this model's images have at least %d", max_pixels, least)
        images.max_soft_tokens = processor.image_seq_length = fitting[-1] if fitting else BUDGETS[0]
        return BudgetPatches(images)

    def pixel_bounds(self, processor: Any) -> tuple[int, int]:
        """See `Family`; any lower bound is without effect."""
        images = processor.image_processor
        return 1, images.max_soft_tokens * _token_area(images)

    def note_bounds(self, config: Any, processor: Any) -> None:
        """See `Family`."""
        config.vision_config.default_output_length = processor.image_processor.max_soft_tokens

    def vision_inputs(self, patches: Sequence[Tensor], grids: Tensor) -> dict[str, Any]:
        """Patches (images, longest, P x P x C) with the column and row of each; -1 where there is none."""
        positions = []
        for _, height, width in grids.tolist():
            rows, columns = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
            positions.append(torch.stack([columns, rows], dim=1))
        pad = nn.utils.rnn.pad_sequence
        places = pad(positions, batch_first=True, padding_value=-1).to(grids.device)
        return {"pixel_values": pad(list(patches), batch_first=True), "image_position_ids": places}

    def mergers(self, model: PreTrainedModel) -> list[nn.Module]:
        """The projection of what the tower has pooled."""
        base: Any = model.base_model
        return [base.embed_vision]

    def tower_width(self, model: PreTrainedModel) -> int:
        """See `Family`: the tower pools several patches to one token."""
        vision: Any = model.config.vision_config
        return -(-int(vision.hidden_size) // int(vision.pooling_kernel_size) ** 2)


def _token_area(processor: Any) -> int:
    """Pixels that become one image token."""
    return int(processor.patch_size * processor.pooling_kernel_size) ** 2


class BudgetPatches:
    """Patches of images that are resized to as many image tokens as a budget holds."""

    def __init__(self, processor: Any) -> None:
        """`processor` is the image processor of transformers. Raises ModelError where ours differs."""
        self.merge_size = int(processor.pooling_kernel_size)
        self._side = int(processor.patch_size)
        self._most = int(processor.max_soft_tokens) * self.merge_size**2
        self._interpolation = pil_torch_interpolation_mapping[processor.resample]
        self._factor = float(processor.rescale_factor)
        pixels = probe(*PROBE)
        expected = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
        grid = self.grid(*pixels.shape[:2], where="")
        made = self.expanded(self.cut(pixels, grid), grid)
        if not torch.equal(made, expected["pixel_values"][0, : len(made)]) or (
            int(expected["num_soft_tokens_per_image"][0]) * self.merge_size**2 != len(made)
        ):
            raise other_patches(processor)

    def grid(self, height: int, width: int, *, where: str) -> Grid:
        """See `ImageProcessing`; there is one for every shape."""
        size = get_aspect_ratio_preserving_size(height, width, self._side, self._most, self.merge_size)
        return 1, size[0] // self._side, size[1] // self._side

    def compact_bytes(self, grid: Grid) -> int:
        """See `ImageProcessing`."""
        _, height, width = grid
        return height * width * 3 * self._side**2

    def cut(self, pixels: Any, grid: Grid) -> Tensor:
        """To patches (N, P x P x C), row by row."""
        height, width = (side * self._side for side in grid[1:])
        planes = torch.from_numpy(pixels).permute(2, 0, 1)
        if planes.shape[1:] != (height, width):
            planes = functional.resize(
                planes, [height, width], interpolation=self._interpolation, antialias=True
            )
        blocks: Tensor = planes.unflatten(2, (-1, self._side)).unflatten(1, (-1, self._side))
        return blocks.permute(1, 3, 2, 4, 0).reshape(grid[1] * grid[2], -1)

    def expanded(self, compact: Tensor, grid: Grid) -> Tensor:
        """The same between 0 and 1, in fp32: the model itself centres them."""
        return compact.to(torch.float32) * self._factor

    def black(self, compact: Tensor, chosen: Tensor, size: tuple[int, int]) -> Tensor:
        """See `ImageProcessing`."""
        return compact.masked_fill(chosen[:, None], 0)

    def picture(self, compact: Tensor, grid: Grid) -> Image.Image:
        """See `ImageProcessing`."""
        _, height, width = grid
        blocks = compact.reshape(height, width, self._side, self._side, -1)
        pixels = blocks.permute(0, 2, 1, 3, 4).reshape(height * self._side, width * self._side, -1)
        return Image.fromarray(pixels.numpy())

    def resized(self, compact: Tensor, grid: Grid) -> Image.Image | None:
        """None for a few extreme shapes, which would be resized a second time."""
        _, height, width = grid
        same = self.grid(height * self._side, width * self._side, where="") == grid
        return self.picture(compact, grid) if same else None
