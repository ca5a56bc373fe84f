"""Sizes of a model as a plan needs them, and as a file keeps them."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlcs.engines.cache_sizes import CacheSizes
from rlcs.plan.layers import Attention, DeltaNet, Layer
from rlcs.plan.towers import Tower
from rlcs.recipe.section import Part


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A linear layer that can have an adapter: any but the head. `name` is the last word of its name."""

    name: str
    part: Part
    inputs: int
    outputs: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The language model's widths, the tower, and parameters by part; tied weights count once."""

    name: str
    hidden: int
    vocabulary: int
    cache: CacheSizes
    """What decoding keeps of tokens and rows."""
    vision: Tower
    parameters: Mapping[Part, int]
    unused: int
    """Parameters that are in no part: of a tower for audio, which is loaded and not used."""
    largest_layer: int
    """Parameters of the largest layer or vision block, which a sharded model gathers at once."""
    outside_layers: int
    """Parameters that are in no layer: embedding, head, last norm, merger."""
    linears: Counter[Linear]
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
        return self.vocabulary * self.hidden

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
            numbers["router"] += count * layer.routed * self.hidden
        return sum(number for part, number in numbers.items() if part in frozen)

    def to_json(self) -> dict[str, Any]:
        """All but the name, for a file."""
        plain = {**vars(self), "vision": asdict(self.vision), "cache": asdict(self.cache)}
        plain["linears"] = [[asdict(linear), n] for linear, n in self.linears.items()]
        plain["layers"] = [[asdict(layer), n] for layer, n in self.layers.items()]
        return {key: value for key, value in plain.items() if key != "name"}

    @classmethod
    def from_json(cls, name: str, plain: Mapping[str, Any]) -> "Sizes":
        """The sizes that `to_json` made plain."""
        vision = {**plain["vision"], "budgets": tuple(plain["vision"]["budgets"])}
        read: dict[str, Any] = {"vision": Tower(**vision), "cache": CacheSizes(**plain["cache"])}
        read["linears"] = Counter({Linear(**linear): n for linear, n in plain["linears"]})
        read["layers"] = Counter({_layer(layer): n for layer, n in plain["layers"]})
        return cls(name=name, **{**plain, **read})


def _layer(plain: Mapping[str, Any]) -> Layer:
    kind = DeltaNet if "kernel" in plain["mixer"] else Attention
    return Layer(**{**plain, "mixer": kind(**plain["mixer"])})
