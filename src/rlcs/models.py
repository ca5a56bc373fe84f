"""Load, prepare and save a vision-language model.

The built-in model and a hub model take the same path. What a family needs is in `FAMILIES`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from rlcs import attention
from rlcs.chat import Chat
from rlcs.errors import ModelError
from rlcs.images import ImagePipeline
from rlcs.recipe.schema import Model as ModelSettings
from rlcs.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Where the parts of a model live: a pattern on parameter names for each part."""

    vision_tower: str
    merger: str
    language_model: str


FAMILIES = {
    "qwen2_5_vl": Family(
        vision_tower=r"^model\.visual\.(?!merger\.)",
        merger=r"^model\.visual\.merger\.",
        language_model=r"^(model\.language_model\.|lm_head\.)",
    )
}
"""Model types that rlcs trains, by the `model_type` of their configuration."""


@dataclass(frozen=True, kw_only=True)
class Vlm:
    """A model with its processor, ready for packs."""

    model: PreTrainedModel
    processor: Any
    family: Family
    attention: str
    device: torch.device

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters by name; tied weights once."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve(name: str) -> str:
    """The folder or hub id behind a model name; `builtin` is the tiny model in the package."""
    if name == "builtin":
        return str(resources.files("rlcs") / "builtin_model")
    return name


def load(settings: ModelSettings, *, device: torch.device | None = None) -> Vlm:
    """Load a model from a folder, the hub or the package. Raises ModelError."""
    device = device or default_device()
    source = resolve(settings.name)
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    try:
        config = AutoConfig.from_pretrained(source, **options)
        family = _family(config.model_type, settings.name)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=getattr(torch, dtype), **options)
        processor = AutoProcessor.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load the model: {str(error).splitlines()[0]}",
            where=f"model.name={settings.name}",
            fix="give a folder in Hugging Face format, a hub id, or `builtin`",
        ) from error
    attention.install(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Vlm(
        model=model.to(device),
        processor=processor,
        family=family,
        attention=settings.attention,
        device=device,
    )


def _family(model_type: str, name: str) -> Family:
    if model_type not in FAMILIES:
        raise ModelError(
            f"models of type {model_type!r} are not supported",
            where=f"model.name={name}",
            fix=f"supported: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[model_type]


def freeze(vlm: Vlm, parts: Sequence[str]) -> None:
    """Freeze the named parts (`vision_tower`, `merger`, `language_model`) and unfreeze all others."""
    patterns = [re.compile(getattr(vlm.family, part)) for part in parts]
    for name, parameter in vlm.model.named_parameters():
        parameter.requires_grad_(not any(pattern.search(name) for pattern in patterns))


def make_chat(vlm: Vlm, recipe: Recipe, *, rl: bool = False) -> Chat:
    """The chat format and image path of a model under a recipe; `rl`: with the image bounds of RL.

    The pixel bounds are written onto the processor too, so that a saved model carries them.
    """
    smallest = (recipe.images.rl_min_pixels if rl else None) or recipe.images.min_pixels
    bounds = {"shortest_edge": smallest, "longest_edge": recipe.images.max_pixels}
    vlm.processor.image_processor.size = bounds
    images = ImagePipeline(vlm.processor.image_processor, decode_limit=recipe.images.decode_limit)
    return Chat(
        vlm.processor.tokenizer, images, system=recipe.prompt.system, max_tokens=recipe.prompt.max_tokens
    )


def save(vlm: Vlm, folder: Path) -> None:
    """Write a Hugging Face folder: weights (safetensors), configuration, processor."""
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
