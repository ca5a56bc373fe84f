"""Loading in shards, in real processes: a node needs little more memory than the model has bytes."""

import json
import os
import subprocess
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


SEGMENTS = """
import json, os, torch
from rlcs.model.loading import use_expandable_segments
def expandable():
    use_expandable_segments()
    return torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]
found = [expandable()]
torch.version.cuda, torch.cuda.is_available = "13.0", lambda: True
os.environ["PYTORCH_ALLOC_CONF"] = "max_split_size_mb:512"
found.append(expandable())
del os.environ["PYTORCH_ALLOC_CONF"]
found += [expandable(), any("ALLOC_CONF" in name for name in os.environ)]
print(json.dumps(found))
"""


def test_the_allocator_grows_its_segments_unless_the_user_has_set_it():
    """Not without a GPU, not against the environment; and child processes inherit nothing."""
    clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    command = [sys.executable, "-W", "ignore", "-c", SEGMENTS]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, False, True, False]
