"""Sizes of a model without its weights: from its configuration, and its parameters on the meta device."""

import re
from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from rlcs.data.hub import cache_where_unreachable
from rlcs.engines.cache_sizes import cache_sizes, head_size
from rlcs.errors import ModelError
from rlcs.model.families import FAMILIES
from rlcs.model.source import find_source, origin_of
from rlcs.plan.layers import Attention, DeltaNet, Layer, Mixer
from rlcs.plan.shapes import Linear, Sizes
from rlcs.plan.towers import tower_of
from rlcs.recipe.schema import Model
from rlcs.recipe.section import Part
from rlcs.storage import read_json

PUBLISHED = Path(__file__).with_name("published.json")
"""Configurations by hub id; docs/how-to/plan.md says which figures were checked, and against what."""
ROUTERS = ("mlp.gate.weight", "mlp.router.weight")
"""Weights that choose experts and are no linear layer's."""


def published(name: str) -> PreTrainedConfig | None:
    """The configuration of a published model as on the hub, known without network; None for others."""
    values = read_json(PUBLISHED).get(name)
    return None if values is None else AutoConfig.for_model(**values)


def sizes_from_configuration(settings: Model) -> Sizes:
    """The sizes of a published model, folder, hub id or `builtin`. Raises ModelError."""
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
            f"known without network: builtin, {', '.join(read_json(PUBLISHED))}",
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
    linears = Counter(
        Linear(name=key.rpartition(".")[2], part=part, inputs=module.in_features, outputs=module.out_features)
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
        if (part := part_of(f"{key}.")) is not None
    )
    text = config.get_text_config()
    stack = model.base_model.language_model.layers
    inside = {id(module) for layer in stack for module in layer.modules()}
    return Sizes(
        name=name,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        cache=cache_sizes(text),
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
