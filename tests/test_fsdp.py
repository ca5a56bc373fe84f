"""FSDP's units: published models on the meta device over eight pretended ranks, and what lies where."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore

import pretend_gpu
from rlcs.model.fsdp import wrap
from rlcs.plan.shapes import published, skeleton
from rlcs.recipe.execution import Parallel
from rlcs.recipe.loading import load_recipe
from test_plan import HUB, PARAMETERS


@pytest.fixture
def eight_ranks() -> Iterator[DeviceMesh]:
    """This process is rank 0; the others are not there, and collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


@pytest.mark.parametrize(("size", "layers"), [("3B", 36), ("7B", 28)])
def test_published_models_are_sharded_over_eight_ranks(eight_ranks, size, layers):
    model = skeleton(published(HUB.format(size)))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    shell = wrap(model, eight_ranks, load_recipe(f"paper-{size.lower()}").recipe.parallel)
    text, tower = model.model.language_model.layers, model.model.visual.blocks
    assert (len(text), len(tower)) == (layers, 32)
    assert set(shell.units) == {shell, *tower, *text} and shell.units[0] is shell
    parameters = dict(model.named_parameters())
    assert {name: parameter.shape for name, parameter in parameters.items()} == shapes
    assert sum(parameter.numel() for parameter in parameters.values()) == PARAMETERS[size]
    own = sum(parameter.to_local().numel() for parameter in parameters.values())
    assert own == pytest.approx(PARAMETERS[size] / 8, rel=1e-3)


def test_every_unit_is_offloaded_or_none(eight_ranks):
    for offloaded in (False, True):
        shell = wrap(skeleton(published(HUB.format("3B"))), eight_ranks, Parallel(cpu_offload=offloaded))
        groups = [group for unit in shell.units for group in unit._get_fsdp_state()._fsdp_param_groups]
        assert len(groups) == 1 + 32 + 36
        assert {isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups} == {offloaded}


def test_offloaded_shards_lie_in_main_memory_and_work_is_done_on_the_gpu():
    choices = [{"cpu_offload": offloaded, "compute_dtype": "bfloat16"} for offloaded in (False, True)]
    command = [sys.executable, "-W", "ignore", pretend_gpu.__file__, json.dumps(choices)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for memory, found in zip(("cuda", "cpu"), json.loads(done.stdout), strict=True):
        assert found["weights"] == found["optimizer"] == found["resumed"] == [memory]
        assert found["buffers"] == found["forward"] == found["gathered"] == ["cuda"]
