"""What decoding keeps of tokens and rows, from a language model's configuration: keys, values, states."""

from dataclasses import dataclass
from typing import Any

FP32 = 4


def head_size(text: Any) -> int:
    """The width of an attention head of a language model's configuration, which Qwen3-VL sets explicitly."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSizes:
    """The numbers that decoding keeps, by what they grow with.

    `token`: keys and values of each token, in the layers that see all tokens; `windowed`: those in layers
    that see the last `window` alone. `state` and `inputs` are constant in a row: recurrent states, which are
    float32, and the last inputs of short convolutions.
    """

    token: int
    windowed: int
    window: int
    state: int
    inputs: int

    def token_bytes(self, element: int) -> int:
        """Bytes of one token's keys and values in all layers, `element` bytes a number."""
        return (self.token + self.windowed) * element

    def row_bytes(self, element: int) -> int:
        """Bytes of a row that do not depend on its length."""
        return self.state * FP32 + self.inputs * element

    def seen_bytes(self, tokens: float, element: int) -> float:
        """Bytes of the keys and values that are still seen after so many tokens."""
        return (self.token * tokens + self.windowed * min(tokens, self.window)) * element


def cache_sizes(text: Any) -> CacheSizes:
    """The numbers that decoding with a language model of this configuration keeps."""
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    modes = getattr(text, "kv_sharing_modes", None) or [None] * len(kinds)
    numbers = {"token": 0, "windowed": 0, "state": 0, "inputs": 0}
    for index, (kind, mode) in enumerate(zip(kinds, modes, strict=True)):
        if kind == "linear_attention":
            values = text.linear_num_value_heads * text.linear_value_head_dim
            numbers["state"] += values * text.linear_key_head_dim
            wide = 2 * text.linear_num_key_heads * text.linear_key_head_dim + values
            numbers["inputs"] += wide * (text.linear_conv_kernel_dim - 1)
        elif mode != "reuse":  # layers that reuse keys and values of an earlier one keep none
            layer = text.per_layer_config[index]
            width = 2 * layer.num_key_value_heads * head_size(layer)
            numbers["windowed" if kind == "sliding_attention" else "token"] += width
    return CacheSizes(window=getattr(text, "sliding_window", None) or 0, **numbers)
