"""What the families of Qwen-VL models have in common."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlcs.model import patch_projection
from rlcs.model.chat_format import CHATML
from rlcs.model.families.family import Family
from rlcs.model.patches import FlatPatches


class QwenVl(Family):
    """Flat patches with grids, positions by row and column, ChatML."""

    vision_tower = r"^model\.visual\.(?!merger\.)"
    merger = r"^model\.visual\.merger\."
    language_model = r"^(model\.language_model\.|lm_head\.)"
    chat_format = CHATML

    def install(self, model: PreTrainedModel) -> None:
        """See `Family`."""
        super().install(model)
        patch_projection.install(model)

    def image_processing(self, processor: Any, *, min_pixels: int, max_pixels: int) -> FlatPatches:
        """See `Family`."""
        processor.image_processor.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        return FlatPatches(processor.image_processor)

    def pixel_bounds(self, processor: Any) -> tuple[int, int]:
        """See `Family`."""
        size = processor.image_processor.size
        return size["shortest_edge"], size["longest_edge"]

    def vision_inputs(self, patches: Sequence[Tensor], grids: Tensor) -> dict[str, Any]:
        """See `Family`."""
        return {"pixel_values": torch.cat(list(patches)), "image_grid_thw": grids}

    def mergers(self, model: PreTrainedModel) -> list[nn.Module]:
        """One module; in Qwen3-VL one more for each deepstack layer."""
        visual: Any = model.base_model.visual
        return [visual.merger, *getattr(visual, "deepstack_merger_list", ())]

    def tower_width(self, model: PreTrainedModel) -> int:
        """See `Family`."""
        visual: Any = model.base_model.visual
        return int(visual.patch_embed.proj.out_channels)
