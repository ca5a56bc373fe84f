"""Sizes of vision towers: tokens of images, whole or in tiles, and the work on them."""

import pytest

from rlcs.plan.skeleton import published
from rlcs.plan.towers import tower_of
from rlcs.plan.work import vision


def tower(name):
    return tower_of(published(name))


@pytest.mark.parametrize(
    ("name", "side"),
    [("Qwen/Qwen2.5-VL-7B-Instruct", 28), ("Qwen/Qwen3.5-9B", 32)],
)
def test_an_image_is_cut_into_squares(name, side):
    assert tower(name).side == side
    assert tower(name).tokens(20 * side * 30 * side + 5) == 600 and tower(name).whole(7) == 7


def test_an_image_of_several_tiles_has_a_small_copy():
    intern = tower("OpenGVLab/InternVL3_5-8B-HF")
    assert intern.side == 28 and intern.tile == 256
    tiles = {100 * 100: 1, 448 * 448: 1, 2 * 448 * 448: 1, 3 * 448 * 448: 3, 1_204_224: 6}
    assert {pixels: intern.tokens(pixels) // 256 for pixels in tiles} == tiles, "with the copy"
    assert [intern.whole(tokens) for tokens in (1, 256, 257)] == [256, 256, 512]


def test_an_image_is_enlarged_to_a_budget_of_tokens():
    gemma = tower("google/gemma-4-31B-it")
    assert [gemma.tokens(tokens * 48 * 48) for tokens in (10, 70, 300, 560, 5000)] == [70, 70, 280, 560, 1120]
    assert gemma.whole(5) == 1120, "and no more than the largest there is"


def test_tiles_do_not_see_each_other():
    intern, patches = tower("OpenGVLab/InternVL3_5-8B-HF"), 1024
    assert vision(intern, 3 * patches) == 3 * vision(intern, patches)
    assert vision(tower("Qwen/Qwen3.5-9B"), 3 * patches) > 3 * vision(tower("Qwen/Qwen3.5-9B"), patches)


def test_features_are_what_the_mergers_get():
    assert tower("Qwen/Qwen3-VL-8B-Instruct").features == 4 * 4 * 1152, "four mergers of four patches"
    assert tower("Qwen/Qwen3.5-9B").features == 4 * 1152
