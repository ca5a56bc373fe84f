"""FSDP's units: published models on the meta device over eight pretended ranks, what lies where, replicas."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore

import distributed_worker
import pretend_gpu
from rlcs.distributed import ALONE, World, join_world
from rlcs.errors import UserError
from rlcs.model.fsdp import wrap
from rlcs.plan.shapes import published, skeleton
from rlcs.recipe.execution import Parallel
from rlcs.recipe.loading import load_recipe
from rlcs.train import checkpoint
from test_distributed import JOBS, assert_same, environment, free_port, run_on
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


# --- replicas ---------------------------------------------------------------------------------------


REPLICATED = ("sft", "paper")
"""Jobs that four ranks do as two copies of the model in two shards each."""


def jobs_of(model: Path, root: Path, **more: object) -> list[dict]:
    return [{"model": str(model), "folder": str(root / name), **JOBS[name], **more} for name in REPLICATED]


@pytest.fixture(scope="module")
def replicated(random_model_folder, tmp_path_factory) -> Path:
    """Each job by 2 x 2 ranks; once more, stopped after a step; and once more, stopped and continued."""
    root = tmp_path_factory.mktemp("replicated")
    parallel = {"shard_size": 2}
    whole = jobs_of(random_model_folder, root / "whole", parallel=parallel)
    resumed = jobs_of(random_model_folder, root / "resumed", parallel=parallel)
    stopped = [
        job | {"stop_at": 1}
        for job in resumed + jobs_of(random_model_folder, root / "stopped", parallel=parallel)
    ]
    run_on(4, whole + stopped + resumed, root / "jobs.json")
    return root


@pytest.fixture(scope="module")
def by_one(random_model_folder, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("by-one")
    for job in jobs_of(random_model_folder, root):
        Path(job["folder"]).mkdir()
        distributed_worker.train(job, ALONE)
    return root


@pytest.mark.parametrize("name", REPLICATED)
def test_two_copies_in_two_shards_compute_what_one_rank_computes(replicated, by_one, name):
    """Losses, gradient norms and weights, in every step; with and without a stop and a resume."""
    for folder in ("whole", "resumed"):
        assert_same(by_one / name, replicated / folder / name)
    assert "after step 1 of" in (replicated / "resumed" / name / "stopped-3").read_text()


def test_rows_that_two_ranks_hold_are_saved_once(replicated):
    saved = checkpoint.complete(replicated / "whole" / "sft" / "checkpoints")
    for folder in saved.values():
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert files == [
            "model-1.safetensors",
            "model.safetensors",
            "optimizer-1.safetensors",
            "optimizer.safetensors",
        ]
    final = replicated / "whole" / "sft" / "final" / "model.safetensors"
    size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    assert size == pytest.approx(final.stat().st_size, rel=0.05)


@pytest.mark.parametrize("ranks", [1, 4])
def test_saved_by_two_by_two_ranks_and_continued_by_others(
    replicated, by_one, random_model_folder, tmp_path, ranks
):
    shutil.copytree(replicated / "stopped", tmp_path, dirs_exist_ok=True)
    jobs = jobs_of(random_model_folder, tmp_path)
    if ranks == 1:
        for job in jobs:
            distributed_worker.train(job, ALONE)
    else:
        run_on(ranks, jobs, tmp_path / "jobs.json")
    for name in REPLICATED:
        assert "after step 1 of" in (tmp_path / name / "stopped-3").read_text()
        assert_same(by_one / name, tmp_path / name)


def test_groups_that_do_not_divide_the_ranks_are_refused(monkeypatch):
    for name, value in environment(0, 8, free_port()).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match="8 ranks cannot be divided into groups of 3"),
        join_world(timeout_s=9, shard_size=3),
    ):
        pass
    assert World(size=8).writers == 8 and World(size=8, shards=4).writers == 4
