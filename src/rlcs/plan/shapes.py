"""Sizes of a model without loading it: from its configuration, and its parameters on the meta device."""

import re
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, Qwen2_5_VLConfig

from rlcs.data.hub import cache_where_unreachable
from rlcs.errors import ModelError
from rlcs.model.families import FAMILIES
from rlcs.model.source import find_source, origin_of
from rlcs.recipe.schema import Model
from rlcs.recipe.section import Part
from rlcs.storage import read_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Tower:
    """The sizes of a vision tower of any family.

    `pixels` are the numbers in a patch; `merge`^2 patches become a token, `side` pixels wide. Families with
    `windowed` blocks (of `window` patches) have gated MLPs and norms that compute in fp32; in others every
    block attends to the whole image. `mlp_keeps` is the number of intermediate tensors that an MLP keeps
    for its backward pass. There are several `mergers` where outputs of early blocks enter the language model.
    """

    depth: int
    hidden: int
    intermediate: int
    heads: int
    output: int
    pixels: int
    merge: int
    side: int
    windowed: int
    window: int
    mlp_keeps: int
    mergers: int


def tower_of(vision: Any) -> Tower:
    """The tower of a `vision_config` of Qwen2-VL, Qwen2.5-VL or Qwen3-VL."""
    full = getattr(vision, "fullatt_block_indexes", None)  # Qwen2.5-VL alone has windows
    hidden = getattr(vision, "embed_dim", vision.hidden_size)  # in Qwen2-VL hidden_size is the output's
    ungated = 3 if vision.hidden_act == "quick_gelu" else 2
    return Tower(
        depth=vision.depth,
        hidden=hidden,
        intermediate=getattr(vision, "intermediate_size", None) or int(hidden * vision.mlp_ratio),
        heads=vision.num_heads,
        output=getattr(vision, "out_hidden_size", vision.hidden_size),
        pixels=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        merge=vision.spatial_merge_size,
        side=vision.patch_size * vision.spatial_merge_size,
        windowed=0 if full is None else vision.depth - len(full),
        window=0 if full is None else (vision.window_size // vision.patch_size) ** 2,
        mlp_keeps=ungated if full is None else 4,
        mergers=1 + len(getattr(vision, "deepstack_visual_indexes", ())),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A linear layer that can have an adapter: any but the head."""

    name: str
    part: Part
    inputs: int
    outputs: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The language model's configuration, the tower, and parameters by part; tied weights count once."""

    name: str
    text: Any
    vision: Tower
    parameters: Mapping[Part, int]
    largest_layer: int
    """Parameters of the largest layer or vision block, which a sharded model gathers at once."""
    outside_layers: int
    """Parameters that are in no layer: embedding, head, last norm, merger."""
    linears: tuple[Linear, ...]
    normed_heads: bool
    """Whether queries and keys are normalised."""

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return sum(self.parameters.values())

    @property
    def decoding_weights(self) -> int:
        """Weights that the next token is computed with: of the layers and the head, not the embedding."""
        layers = sum(x.inputs * x.outputs for x in self.linears if x.part == "language_model")
        return layers + int(self.text.vocab_size * self.text.hidden_size)


def published(name: str) -> Qwen2_5_VLConfig | None:
    """The configuration of a published model as on the hub, known without network; None for others."""
    values = _published().get(name)
    return None if values is None else Qwen2_5_VLConfig(**values)


def _published() -> dict[str, dict[str, Any]]:
    known: dict[str, dict[str, Any]] = read_json(Path(__file__).with_name("published.json"))
    return known


def sizes_of(settings: Model) -> Sizes:
    """The sizes of a recipe's model: published name, folder, hub id or `builtin`. Raises ModelError."""
    config = published(settings.name) or _configuration(settings)
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"models of type {config.model_type!r} cannot be planned",
            where=f"model.name={settings.name}",
            fix=f"the planner knows the layers of {', '.join(sorted(FAMILIES))}",
        )
    return measure(settings.name, config)


def _configuration(settings: Model) -> Any:
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        source = find_source(settings.name)
        if source.checkpoint is not None:  # its sizes are those of the model that it goes back to
            origin = origin_of(settings.name)
            if (config := published(origin)) is not None:
                return config
            source = find_source(origin)
        with cache_where_unreachable(source.weights):
            return AutoConfig.from_pretrained(source.weights, **options)
    except (ModelError, OSError, ValueError) as error:
        raise ModelError(
            f"the model's configuration cannot be found: {str(error).splitlines()[0]}",
            where=f"model.name={settings.name}",
            fix="give a folder with its config.json, or go online; "
            f"known without network: builtin, {', '.join(_published())}",
        ) from error


def skeleton(config: Any) -> PreTrainedModel:
    """The model on the meta device, where tensors have shapes and no memory; with transformers' attention.

    The configuration may be that of a loaded model, whose attention transformers would look for on the hub.
    """
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(deepcopy(config), attn_implementation="sdpa")


def measure(name: str, config: Any) -> Sizes:
    """Count the parameters of a configuration's model, by part and by layer."""
    model = skeleton(config)
    family = FAMILIES[config.model_type]
    patterns = {part: re.compile(getattr(family, part)) for part in get_args(Part)}
    counts: Counter[Part] = Counter(dict.fromkeys(patterns, 0))

    def part_of(key: str) -> Part:
        return next(part for part, pattern in patterns.items() if pattern.search(key))

    for key, parameter in model.named_parameters():
        counts[part_of(key)] += parameter.numel()
    kinds = set(model._no_split_modules or ())
    layers = [_count(module) for module in model.modules() if type(module).__name__ in kinds]
    linears = tuple(
        Linear(name=key, part=part_of(f"{key}."), inputs=module.in_features, outputs=module.out_features)
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    )
    return Sizes(
        name=name,
        text=config.get_text_config(),
        vision=tower_of(config.vision_config),
        parameters=dict(counts),
        largest_layer=max(layers),
        outside_layers=counts.total() - sum(layers),
        linears=linears,
        normed_heads=any(key.endswith(".q_norm.weight") for key, _ in model.named_parameters()),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
