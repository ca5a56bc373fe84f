"""The planner's layers against real ones: what every kind of layer keeps for its backward pass.

Layers are small and of transformers' own code, with SDPA; gated delta nets follow the paths of a pack as they
do in training.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForImageTextToText

from rlcs.model import attention
from rlcs.model.families import FAMILIES
from rlcs.model.layout import layout_of
from rlcs.plan.layers import Attention, DeltaNet
from rlcs.plan.memory import Passing, language_layer
from rlcs.plan.skeleton import layers_of, published
from rlcs.plan.work import between_tokens

TOKENS = 256
WITHIN = 0.03
SMALL = {
    "vocab_size": 300,
    "hidden_size": 256,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
DENSE = SMALL | {"intermediate_size": 640, "num_hidden_layers": 1}
EXPERTS = SMALL | {
    "moe_intermediate_size": 96,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 1,
}
DELTA = {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 48,
}
TOWER = {"depth": 0, "num_hidden_layers": 0, "hidden_size": 8, "num_heads": 2, "num_attention_heads": 2}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
GEMMA = DENSE | {"global_head_dim": 128, "sliding_window": 128, "hidden_size_per_layer_input": 32}
GEMMA |= {"vocab_size_per_layer_input": 300}
SHARED = GEMMA | {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2}
GEMMA_EXPERTS = GEMMA | {
    "num_hidden_layers": 2,
    "layer_types": [SLIDING, FULL],
    "hidden_size_per_layer_input": 0,
    "num_global_key_value_heads": 1,
    "num_experts": 16,
    "top_k_experts": 4,
    "moe_intermediate_size": 96,
}
CASES = [
    # a published model, what is smaller here, and which of its layers
    (
        "Qwen/Qwen2.5-VL-7B-Instruct",
        {
            **DENSE,
            "head_dim": None,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "layer_types": [FULL],
        },
        0,
    ),
    ("Qwen/Qwen3-VL-8B-Instruct", DENSE, 0),
    ("Qwen/Qwen3-VL-30B-A3B-Instruct", EXPERTS, 0),
    ("Qwen/Qwen3.5-9B", DENSE | {"layer_types": [FULL]}, 0),
    ("Qwen/Qwen3.5-9B", DENSE | DELTA | {"layer_types": [LINEAR]}, 0),
    ("Qwen/Qwen3.5-35B-A3B", EXPERTS | {"shared_expert_intermediate_size": 80, "layer_types": [FULL]}, 0),
    ("Qwen/Qwen3.5-35B-A3B", EXPERTS | DELTA | {"layer_types": [LINEAR]}, 0),
    *[("google/gemma-4-E2B-it", SHARED, index) for index in range(4)],
    ("google/gemma-4-26B-A4B-it", GEMMA_EXPERTS, 0),
    ("google/gemma-4-26B-A4B-it", GEMMA_EXPERTS, 1),
    ("OpenGVLab/InternVL3_5-8B-HF", DENSE, 0),
]


def small_model(name, smaller, dtype):
    values = published(name).to_dict()
    text = values["text_config"]
    for key in ("per_layer_config", "layer_types", "max_window_layers"):
        text.pop(key, None)
    config = AutoConfig.for_model(**values | {"text_config": text | smaller, "audio_config": None})
    for key, value in TOWER.items():
        setattr(config.vision_config, key, value)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype=dtype)


def kept_bytes(call, weights):
    """Bytes of the tensors that a call keeps for its backward pass, without weights."""
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # which must not be freed while others are made
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "smaller", "index"), CASES)
def test_a_layer_keeps_what_is_planned(name, smaller, index, dtype):
    model = small_model(name, smaller, dtype)
    stack, text = model.base_model.language_model, model.config.get_text_config()
    states = torch.randn(1, TOKENS, text.hidden_size, dtype=dtype, requires_grad=True)
    rows = (3, 1, -1) if "mrope_section" in str(text.rope_parameters) else (1, -1)
    positions = torch.arange(TOKENS).expand(*rows)
    gemma = text.model_type == "gemma4_text"
    options = {"shared_kv_states": {}} if gemma else {}
    if getattr(text, "hidden_size_per_layer_input", 0):
        options["per_layer_input"] = torch.randn(1, TOKENS, text.hidden_size_per_layer_input, dtype=dtype)
    layer = (layers_of(stack.layers[: index + 1], text) - layers_of(stack.layers[:index], text)).popitem()[0]
    if isinstance(layer.mixer, DeltaNet):
        FAMILIES["qwen3_5"].install(model)
        options["plan"] = attention.make_plan("auto", layout_of([(TOKENS, [])]), torch.device("cpu"))

    def kept_by(number):
        rotated = stack.rotary_emb(states, positions, *([text.layer_types[number]] if gemma else []))
        earlier = [x for pair in options.get("shared_kv_states", {}).values() for x in pair]
        others = [*rotated, *earlier, *filter(torch.is_tensor, options.values())]
        call = partial(stack.layers[number], attention_mask=None, position_embeddings=rotated, **options)
        return kept_bytes(lambda: call(states), [*model.parameters(), *others]) / TOKENS

    measured = [kept_by(number) for number in range(index + 1)][-1]
    how = Passing(element=dtype.itemsize, checkpointing=False, trains=["language_model"])
    planned = language_layer(layer, text.hidden_size, how)
    print(f"{name} {index}: measured {measured:,.0f}, planned {planned:,}: {planned / measured:.3f}")  # noqa: T201
    assert planned == pytest.approx(measured, rel=WITHIN)


def test_work_between_tokens_of_windows_and_of_delta_nets():
    """A window is seen as far back as it reaches; a delta net does the same for every token."""
    window = Attention(heads=1, queries=3, keys=3, window=4, own=True, doubled=False, norms=0)
    seen = [1, 2, 3, 4, 4, 4, 4, 4]
    assert between_tokens(window, 5, [2, 3]) == 4 * 3 * (sum(seen[:5]) + sum(seen[5:7]) + sum(seen[5:8]))
    assert between_tokens(replace(window, window=0), 5, [3]) == 4 * 3 * sum(range(9))
    net = DeltaNet(heads=2, keys=8, values=12, key_size=8, kernel=4)
    assert between_tokens(net, 5, [2, 3]) == 2 * between_tokens(net, 5, [])
