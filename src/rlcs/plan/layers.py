"""The layers of a language model as its modules have them: their mixers, and the weights that compute."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rlcs.engines.cache_sizes import head_size

ROUTERS = ("mlp.gate.weight", "mlp.router.weight")
"""Weights that choose experts and are no linear layer's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Softmax attention.

    `queries` are the numbers of a token's queries in all heads, `keys` those of its keys (there are as many
    values), which a layer that is not `own` takes from an earlier one. A `window` of 0 is none.
    `doubled`: the projection of queries makes a gate too. `norms` counts those of queries, keys and values.
    """

    heads: int
    queries: int
    keys: int
    window: int
    own: bool
    doubled: bool
    norms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaNet:
    """A gated delta net: numbers of a token's keys (and queries) before they are repeated, and of values."""

    heads: int
    keys: int
    values: int
    key_size: int
    kernel: int

    @property
    def state(self) -> int:
        """The numbers of a recurrent state."""
        return self.values * self.key_size


Mixer = Attention | DeltaNet


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer of a language model.

    `weights` compute every token; of the `experts`' weights a token needs the share `chosen` / `routed`, the
    number of experts that are chosen for it of those that there are. `dense` is the width of the MLP (or of
    the shared expert), `expert` that of one expert. `norms` have the hidden width, and `fed` tensors of that
    width are inputs of linear layers; `side` is the width of per-layer inputs. `exact` norms multiply by
    their weights in fp32; `router_norm`: the router has one of its own.
    """

    mixer: Mixer
    weights: int
    experts: int
    routed: int
    chosen: int
    dense: int
    expert: int
    norms: int
    fed: int
    side: int
    exact: bool
    router_norm: bool

    @property
    def active(self) -> float:
        """The weights that compute one token."""
        return self.weights + (self.experts * self.chosen / self.routed if self.routed else 0)

    @property
    def intermediate(self) -> int:
        """The intermediate numbers of a token: of the MLP and of all its experts."""
        return self.dense + self.chosen * self.expert


def layers_of(modules: Iterable[nn.Module], text: Any) -> Counter[Layer]:
    """The layers of a language model, equal ones counted; `text` is its configuration."""
    found: list[Layer] = []
    for index, module in enumerate(modules):
        layer = _layer(module, text, index)
        if isinstance(layer.mixer, Attention) and not layer.mixer.own:
            source = next(x.mixer for x in reversed(found) if _shares(x.mixer, layer.mixer))
            layer = replace(layer, mixer=replace(layer.mixer, keys=source.keys))
        found.append(layer)
    return Counter(found)


def _shares(mixer: Mixer, other: Attention) -> bool:
    return isinstance(mixer, Attention) and mixer.own and mixer.window == other.window


def _layer(module: nn.Module, text: Any, index: int) -> Layer:
    hidden = text.hidden_size
    experts: Any = next((m for m in module.modules() if hasattr(m, "gate_up_proj")), None)
    routed, stacked = 0, 0
    if experts is not None:
        routed, stacked = len(experts.down_proj), experts.gate_up_proj.numel() + experts.down_proj.numel()
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    router = [p for name, p in module.named_parameters() if name in ROUTERS and len(p) == routed]
    gates = (getattr(m, "gate_proj", None) for m in module.modules())
    dense = next((gate.out_features for gate in gates if isinstance(gate, nn.Linear)), 0)
    norms = sum(p.shape == (hidden,) for name, p in module.named_parameters() if name.endswith(".weight"))
    side = getattr(module, "hidden_size_per_layer_input", 0) or 0
    mixer = getattr(module, "linear_attn", None)
    return Layer(
        mixer=_attention(module.self_attn, text, index) if mixer is None else _delta_net(mixer),
        weights=sum(m.weight.numel() for m in linear) + sum(p.numel() for p in router),
        experts=stacked,
        routed=routed,
        chosen=(getattr(text, "num_experts_per_tok", None) or text.top_k_experts) if routed else 0,
        dense=dense,
        expert=stacked // (3 * routed * hidden) if routed else 0,
        norms=norms,
        fed=2 + bool(side) + (routed > 0 and dense > 0),
        side=side,
        router_norm=hasattr(module, "router"),
        exact=any(_multiplies_in_fp32(m) for m in module.modules()),
    )


def _multiplies_in_fp32(module: nn.Module) -> bool:
    """Norms of transformers that multiply before they round again name their smallest number `eps`."""
    return type(module).__name__.endswith("RMSNorm") and not hasattr(module, "variance_epsilon")


def _attention(module: Any, text: Any, index: int) -> Attention:
    layer = text.per_layer_config[index]
    queries = text.num_attention_heads * head_size(layer)
    key = getattr(module, "k_proj", None)
    norms = (getattr(module, name, None) for name in ("q_norm", "k_norm", "v_norm"))
    windowed = (getattr(text, "layer_types", None) or ["full_attention"] * (index + 1))[index]
    return Attention(
        heads=text.num_attention_heads,
        queries=queries,
        keys=0 if key is None else key.out_features,
        window=text.sliding_window if windowed == "sliding_attention" else 0,
        own=key is not None,
        doubled=module.q_proj.out_features == 2 * queries,
        norms=sum(norm is not None for norm in norms),
    )


def _delta_net(module: Any) -> DeltaNet:
    return DeltaNet(
        heads=module.num_v_heads,
        keys=module.key_dim,
        values=module.value_dim,
        key_size=module.head_k_dim,
        kernel=module.conv_kernel_size,
    )
