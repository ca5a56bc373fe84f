"""Loading in shards, in real processes: a node needs little more memory than the model has bytes."""

import sys

import pytest

from bench import loading

SPARE = 40_000_000
"""What allocators and libraries take on first use, whatever the model's size."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_ranks_load_a_model_without_holding_it_twice(tmp_path):
    """338 MB in the published layout; the documentation has the real size's figure, with nothing spared."""
    size = loading.write(tmp_path, 0.24)
    peaks = loading.measure(tmp_path, 2)
    assert 300e6 < size < 400e6
    assert sorted(path.name[:5] for path in tmp_path.glob("*.safetensors")) == ["model"] * 3
    assert size < peaks["memory after loading, above that"]
    assert peaks["memory at most, above that"] < 1.2 * size + SPARE
