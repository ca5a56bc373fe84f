"""InternVL3 and InternVL3.5 as transformers has them (arXiv 2504.10479, 2508.18265): images in tiles."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlcs.errors import ModelError
from rlcs.model import attention
from rlcs.model.chat_format import CHATML
from rlcs.model.families.family import Family
from rlcs.model.patches import Tiles

LANGUAGE_MODELS = ("qwen2", "qwen3")
"""The language models that are trained: dense ones that share their tokens and their layers' design."""


class InternVl(Family):
    """InternVL with a dense language model of Qwen2 or Qwen3."""

    model_type = "internvl"
    vision_tower = r"^model\.vision_tower\."
    merger = r"^model\.multi_modal_projector\."
    language_model = r"^(model\.language_model\.|lm_head\.)"
    chat_format = replace(
        CHATML,
        image_start="<img>",
        image="<IMG_CONTEXT>",
        image_end="</img>",
        after_image="\n",
        never_sampled=("<video>", *CHATML.vision),
    )
    positions = "line"
    vllm_marks_images = True

    def complete(self, config: Any, written: Mapping[str, Any], where: str) -> None:
        """See `Family`.

        The published files do not say whether the head is tied; transformers then takes it for tied, which it
        is not, and finds out only where it reads the weights.
        """
        kind = config.text_config.model_type
        if kind not in LANGUAGE_MODELS:
            raise ModelError(
                f"InternVL with a language model of type {kind!r} is not supported",
                where=where,
                fix=f"choose one with {' or '.join(LANGUAGE_MODELS)}: InternVL3 (1B to 78B, except 9B) "
                "or InternVL3.5 (1B, 2B, 4B, 8B, 14B, 38B)",
            )
        if "tie_word_embeddings" not in written:
            config.tie_word_embeddings = config.text_config.tie_word_embeddings

    def install(self, model: PreTrainedModel) -> None:
        """See `Family`; the tower's patches attend to all of their tile, and tiles are rows of a batch."""
        attention.install(model, vision="sdpa")

    def image_processing(self, processor: Any, *, min_pixels: int, max_pixels: int) -> Tiles:
        """See `Family`; the pixels of all tiles count, the thumbnail among them.

        So an image of at most `max_pixels` has as many tokens as in other families: one for 28 x 28 pixels.
        """
        images = processor.image_processor
        tile = images.size["height"] * images.size["width"]
        most = max(1, max_pixels // tile - 1)
        tiles = -(-min_pixels // tile)
        images.min_patches = min(most, 1 if tiles < 2 else max(2, tiles - 1))
        images.max_patches = most
        images.crop_to_patches = True  # the processor asks for it; vLLM reads it here
        return Tiles(processor)

    def pixel_bounds(self, processor: Any) -> tuple[int, int]:
        """See `Family`; an image in several tiles has its thumbnail too."""
        images = processor.image_processor
        tile, least = images.size["height"] * images.size["width"], images.min_patches
        return tile * (least + 1 if least > 1 else 1), tile * (images.max_patches + 1)

    def vision_inputs(self, patches: Sequence[Tensor], grids: Tensor) -> dict[str, Any]:
        """See `Family`."""
        return {"pixel_values": torch.cat(list(patches))}

    def text_inputs(self, ids: Tensor, image_token_id: int) -> dict[str, Any]:
        """None: the model finds images by their token."""
        return {}

    def mergers(self, model: PreTrainedModel) -> list[nn.Module]:
        """See `Family`."""
        base: Any = model.base_model
        return [base.multi_modal_projector]

    def tower_width(self, model: PreTrainedModel) -> int:
        """See `Family`."""
        return int(model.config.vision_config.hidden_size)
