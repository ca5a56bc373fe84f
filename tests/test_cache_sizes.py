"""What decoding keeps of a token and of a row, by hand for each kind of layer."""

import pytest

from rlcs.engines.cache_sizes import cache_sizes
from rlcs.plan.skeleton import published


def sizes(name):
    return cache_sizes(published(name).get_text_config())


@pytest.mark.parametrize(
    ("name", "layers", "heads", "size"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", 28, 4, 128),
        ("Qwen/Qwen3-VL-8B-Instruct", 36, 8, 128),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", 48, 4, 128),
        ("OpenGVLab/InternVL3_5-8B-HF", 36, 8, 128),
    ],
)
def test_attention_keeps_keys_and_values_of_every_token(name, layers, heads, size):
    kept = sizes(name)
    assert kept.token_bytes(2) == 2 * 2 * layers * heads * size
    assert (kept.row_bytes(2), kept.seen_bytes(5000, 2)) == (0, 5000 * kept.token_bytes(2))


def test_gated_delta_nets_keep_a_state_of_each_row():
    kept = sizes("Qwen/Qwen3.5-9B")
    assert kept.token_bytes(2) == 2 * 2 * 8 * 4 * 256, "8 of 32 layers have keys and values"
    state, inputs = 32 * 128 * 128, 3 * (2 * 16 * 128 + 32 * 128)
    assert kept.row_bytes(2) == 24 * (4 * state + 2 * inputs), "the state is float32 in any format"


def test_layers_with_a_window_are_seen_no_further_back():
    kept = sizes("google/gemma-4-31B-it")
    sliding, full = 50 * 2 * 16 * 256, 10 * 2 * 4 * 512
    assert kept.token_bytes(2) == 2 * (sliding + full), "all are kept"
    assert kept.seen_bytes(1000, 2) == 1000 * kept.token_bytes(2)
    assert kept.seen_bytes(5000, 2) == 2 * (1024 * sliding + 5000 * full)


def test_layers_that_share_keys_and_values_keep_none():
    """Of 35 layers the last 20 use those of the 14th and 15th."""
    assert sizes("google/gemma-4-E2B-it").token_bytes(2) == 2 * 2 * (12 * 256 + 3 * 512)
