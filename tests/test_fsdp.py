"""FSDP's units: published models on the meta device over eight pretended ranks, what lies where, replicas."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group
from torch.testing._internal.distributed.fake_pg import FakeStore

import distributed_worker
import pretend_gpu
import warm
from fake_model import FakeSteps, FakeTree
from rlcs.distributed import ALONE, World, join_world
from rlcs.errors import UserError
from rlcs.model.checkpoints import complete
from rlcs.model.fsdp import mesh_of, wrap
from rlcs.model.policy import score
from rlcs.plan.skeleton import published, skeleton
from rlcs.recipe.execution import Lora, Parallel
from rlcs.recipe.loading import load_recipe
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
    done = warm.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for memory, found in zip(("cuda", "cpu"), json.loads(done.stdout), strict=True):
        assert found["weights"] == found["optimizer"] == found["resumed"] == [memory]
        assert found["buffers"] == found["forward"] == found["gathered"] == ["cuda"]


# --- gathers ----------------------------------------------------------------------------------------


@pytest.fixture
def gathers(eight_ranks, monkeypatch):
    """Takes a step of 3B with four layers and three blocks; returns its gathers and ends of backward passes.

    Both as events ("gather" or "backward", unit), units numbered in the order of the forward pass: the root,
    three blocks, four layers.
    """
    config = published(HUB.format("3B"))
    config.text_config.num_hidden_layers, config.vision_config.depth = 4, 3
    config.text_config.layer_types = config.text_config.layer_types[:4]
    steps = FakeSteps(monkeypatch)

    def step(
        *,
        frozen: tuple[str, ...] = (),
        checkpointing: bool = True,
        lora: int = 0,
        grad: bool = True,
        **parallel: Any,
    ) -> list[tuple[str, int]]:
        whole = steps.model(
            config, dtype="float32", checkpointing=checkpointing, lora=Lora(rank=lora), frozen=frozen, ranks=8
        )
        events: list[tuple[str, int]] = []
        with steps.mode, monkeypatch.context() as patch:
            vlm, _ = steps.spread(whole, eight_ranks, Parallel(**parallel), reference=False)
            groups = [unit._get_fsdp_state()._fsdp_param_groups[0] for unit in vlm.fsdp_root.units]
            pack = steps.pack([FakeTree(text=50, grid=(8, 8), answers=(30, 30))], 1176)
            score(vlm, pack).logprobs.sum().backward()  # in the first pass FSDP learns the order

            def gather(params, *args):
                events.append(
                    ("gather", next(i for i, group in enumerate(groups) if group.fsdp_params is params))
                )
                return original(params, *args)

            def end(group):
                events.append(("backward", groups.index(group)))
                return after(group)

            original, after = param_group.foreach_all_gather, param_group.FSDPParamGroup.post_backward
            patch.setattr(param_group, "foreach_all_gather", gather)
            patch.setattr(param_group.FSDPParamGroup, "post_backward", end)
            with torch.set_grad_enabled(grad):
                logprobs = score(vlm, pack).logprobs
                if grad:
                    logprobs.sum().backward()
        return events

    return step


BLOCKS, LAYERS = (1, 2, 3), (4, 5, 6, 7)


def gathered(events: list[tuple[str, int]]) -> list[int]:
    return [unit for kind, unit in events if kind == "gather"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_unit_is_gathered_once_a_pass(gathers, checkpointing):
    """In the backward pass too, in reverse, but for the root, which stays; each ahead of its use."""
    forward = [0, *BLOCKS, *LAYERS]
    backward = [7, 6, 5, 4, 3, 2, 1]
    events = gathers(checkpointing=checkpointing)
    assert gathered(events) == forward + backward
    for unit in (6, 5, 4, 3, 2, 1):
        last = len(events) - 1 - events[::-1].index(("gather", unit))
        assert last < events.index(("backward", unit + 1)), "fetched while the one after it is at work"
    assert gathered(gathers(checkpointing=checkpointing, grad=False)) == forward
    assert gathered(gathers(checkpointing=checkpointing, reshard_after_forward=False)) == forward


@pytest.mark.parametrize("lora", [0, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_tower_has_no_backward_pass(gathers, checkpointing, lora):
    """FSDP prefetches the block before the first layer all the same, and drops it."""
    events = gathers(frozen=("vision_tower", "merger"), checkpointing=checkpointing, lora=lora)
    assert gathered(events) == [0, *BLOCKS, *LAYERS, *reversed(LAYERS), BLOCKS[-1]]


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
    saved = complete(replicated / "whole" / "sft" / "checkpoints")
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


def test_a_copy_belongs_to_neighbouring_ranks(eight_ranks):
    """Those of a node, so that layers are gathered over its fast links."""
    assert mesh_of(World(size=8, shards=4), "cpu").mesh.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert mesh_of(World(size=8), "cpu").mesh.tolist() == [*range(8)]


def test_groups_that_do_not_divide_the_ranks_are_refused(monkeypatch):
    for name, value in environment(0, 8, free_port()).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match="8 ranks cannot be divided into groups of 3"),
        join_world(timeout_s=9, shard_size=3),
    ):
        pass
    assert World(size=8).writers == 8 and World(size=8, shards=4).writers == 4
