"""Sizes of a model without loading it: from its configuration, and its parameters on the meta device."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from rlcs.data.hub import cache_where_unreachable
from rlcs.engines.cache_sizes import CacheSizes, cache_sizes
from rlcs.errors import ModelError
from rlcs.model.families import FAMILIES
from rlcs.model.source import find_source, origin_of
from rlcs.plan.layers import Layer, layers_of
from rlcs.plan.towers import Tower, tower_of
from rlcs.recipe.schema import Model
from rlcs.recipe.section import Part
from rlcs.storage import read_json


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
    unused: int
    """Parameters that are in no part: of a tower for audio, which is loaded and not used."""
    largest_layer: int
    """Parameters of the largest layer or vision block, which a sharded model gathers at once."""
    outside_layers: int
    """Parameters that are in no layer: embedding, head, last norm, merger."""
    linears: tuple[Linear, ...]
    layers: Counter[Layer]
    """The layers of the language model; equal ones are counted."""
    between: int
    """Weights of the language model's linear layers that are in no layer and not the head."""
    keeps_features: bool
    """Whether what a frozen tower makes of an image can be kept between passes."""

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return sum(self.parameters.values()) + self.unused

    @property
    def decoding_weights(self) -> int:
        """Weights that compute every next token: of layers and head, without embedding and experts."""
        return self.between + self.head + sum(n * layer.weights for layer, n in self.layers.items())

    @property
    def head(self) -> int:
        """Weights of the head, which may be those of the embedding."""
        return int(self.text.vocab_size * self.text.hidden_size)

    @property
    def active(self) -> float:
        """Parameters that a token of a mixture of experts is computed with; all of them in other models."""
        return self.total - sum(
            n * layer.experts * (1 - layer.chosen / layer.routed)
            for layer, n in self.layers.items()
            if layer.routed
        )

    def frozen_numbers(self, frozen: Collection[str]) -> int:
        """The weights of the language model that `experts` or `router` freeze."""
        numbers = {"experts": 0, "router": 0}
        for layer, count in self.layers.items():
            numbers["experts"] += count * layer.experts
            numbers["router"] += count * layer.routed * self.text.hidden_size
        return sum(number for part, number in numbers.items() if part in frozen)

    @property
    def cache(self) -> CacheSizes:
        """What decoding keeps of tokens and rows."""
        return cache_sizes(self.text)


def published(name: str) -> PreTrainedConfig | None:
    """The configuration of a published model as on the hub, known without network; None for others."""
    values = _published().get(name)
    return None if values is None else AutoConfig.for_model(**values)


def _published() -> dict[str, dict[str, Any]]:
    """Configurations by hub id; docs/how-to/plan.md says which figures were checked, and against what."""
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
    """The model on the meta device, where tensors have shapes and no memory; attention that all parts have.

    The configuration may be that of a loaded model, whose attention transformers would look for on the hub.
    """
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(deepcopy(config), attn_implementation="eager")


def measure(name: str, config: Any) -> Sizes:
    """Count the parameters of a configuration's model, by part and by layer."""
    model = skeleton(config)
    family = FAMILIES[config.model_type]
    patterns = {part: re.compile(getattr(family, part)) for part in get_args(Part)}
    counts: Counter[Part | None] = Counter(dict.fromkeys(patterns, 0))

    def part_of(key: str) -> Part | None:
        return next((part for part, pattern in patterns.items() if pattern.search(key)), None)

    for key, parameter in model.named_parameters():
        counts[part_of(key)] += parameter.numel()
    kinds = set(model._no_split_modules or ())
    layers = [_count(module) for module in model.modules() if type(module).__name__ in kinds]
    linears = tuple(
        Linear(name=key, part=part, inputs=module.in_features, outputs=module.out_features)
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
        if (part := part_of(f"{key}.")) is not None
    )
    text = config.get_text_config()
    stack = model.base_model.language_model.layers
    inside = {id(module) for layer in stack for module in layer.modules()}
    return Sizes(
        name=name,
        text=text,
        vision=tower_of(config),
        parameters={part: counts[part] for part in patterns},
        unused=counts[None],
        largest_layer=max(layers),
        outside_layers=counts.total() - sum(layers),
        linears=linears,
        layers=layers_of(stack, text),
        between=sum(
            module.weight.numel()
            for module in model.base_model.language_model.modules()
            if isinstance(module, nn.Linear) and id(module) not in inside
        ),
        keeps_features=bool(family.mergers(model)),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
