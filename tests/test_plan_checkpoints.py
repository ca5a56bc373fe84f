"""How long training stands still for checkpoints: by arithmetic over rates, and as a run reports it."""

import pytest

from rlcs.plan.checkpoints import stall
from rlcs.plan.measured import Rates

SIZE = 94.5e9
"""A checkpoint of Qwen2.5-VL-7B with a frozen vision tower: fp32 weights and AdamW's two averages."""


@pytest.mark.parametrize("save_every", [1, 5, 50])
@pytest.mark.parametrize("ranks", [4, 8])
def test_training_of_7b_stands_still_for_less_than_a_twentieth(ranks, save_every):
    """Even where every step of 135 s is saved, with the guessed rates."""
    found = stall(SIZE, ranks=ranks, save_every=save_every, step_s=135)
    assert found.wait_s == 0 and found.write_s < 60
    assert found.copy_s == pytest.approx(SIZE / ranks / 10e9)
    assert found.share < 0.05 / 2 and found.guessed == ("to_host", "disk_write")


def test_a_slow_disk_shows():
    """A network disk that gives each of 8 processes 60 MB a second: 197 s for 11.8 GB."""
    rates = Rates(device="x", to_host=20e9, disk_write=60e6)
    slow = stall(SIZE, ranks=8, save_every=1, step_s=135, rates=rates)
    assert slow.wait_s == pytest.approx(SIZE / 8 / 60e6 - 135)
    assert slow.share == pytest.approx((slow.wait_s + slow.copy_s) / (135 + slow.wait_s + slow.copy_s))
    assert slow.share > 0.3 and slow.guessed == ()
    often = stall(SIZE, ranks=8, save_every=2, step_s=135, rates=rates)
    assert often.wait_s == 0 and often.share < 0.01
