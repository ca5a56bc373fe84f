"""The planner's bytes against measured ones: every allocation of real training steps on a CPU.

Peaks are the allocator's own (torch's profiler), so they do not depend on the machine or on what else
runs there; they are taken above what stands before the step (weights and optimiser state).
"""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

import family_models
from conftest import make_problem
from rlcs.model import loading
from rlcs.model.packing import pack
from rlcs.plan.memory import Load, Passing, activations, update_peak
from rlcs.plan.skeleton import measure
from rlcs.recipe.execution import Lora
from rlcs.recipe.schema import Model
from rlcs.recipe.stages import Grpo, Optimizer
from rlcs.records.trees import Branch, Tree
from rlcs.train.learning import make_objective
from rlcs.train.losses import sft_loss
from rlcs.train.trainer import Batch, Trainer
from tools import tiny_model

WITHIN = 0.10
SHAPES = {
    "14M, wide": {"hidden": 384, "layers": 6, "vision_hidden": 192, "vision_layers": 4},
    "48M, mostly tower": {"hidden": 256, "layers": 3, "vision_hidden": 640, "vision_layers": 7},
    "30M, deep": {"hidden": 448, "layers": 12, "vision_hidden": 128, "vision_layers": 2},
}
FAMILIES = {
    "qwen2_vl": {
        "text": {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
        },
        "vision": {"depth": 6, "embed_dim": 256, "hidden_size": 384},
    },
    "qwen3_vl": {
        "text": {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
        },
        "vision": {"depth": 6, "hidden_size": 256, "intermediate_size": 1024, "out_hidden_size": 384},
    },
    "qwen3_5": {
        "text": {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_attention_heads": 12,
            "linear_num_value_heads": 12,
            "linear_num_key_heads": 4,
            "linear_value_head_dim": 48,
        },
        "vision": {"depth": 6, "hidden_size": 256, "intermediate_size": 1024, "out_hidden_size": 384},
    },
}
TOWER = {"depth": 6, "hidden_size": 256, "intermediate_size": 1024, "out_hidden_size": 384}
WIDE = {"hidden_size": 384, "num_attention_heads": 12}
FAMILIES |= {
    "qwen3_vl_moe": {"text": WIDE | {"moe_intermediate_size": 256}, "vision": TOWER},
    "qwen3_5_moe": {
        "text": WIDE | {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
        "vision": TOWER,
    },
    "gemma4": {
        "text": WIDE | {"intermediate_size": 1024},
        "vision": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 64},
    },
    "internvl": {
        "text": WIDE | {"intermediate_size": 1024, "num_hidden_layers": 6},
        "vision": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6},
    },
}
CASES = [
    # shape, objective, gradient checkpointing, frozen parts, packs
    ("14M, wide", "sft", False, (), 1),
    ("14M, wide", "grpo", True, ("vision_tower",), 2),
    ("48M, mostly tower", "grpo", False, (), 2),
    ("48M, mostly tower", "sft", True, (), 1),
    ("30M, deep", "sft", False, ("vision_tower",), 2),
    ("30M, deep", "grpo", True, (), 1),
    ("qwen2_vl", "sft", False, (), 1),
    ("qwen2_vl", "grpo", True, (), 2),
    ("qwen3_vl", "sft", False, (), 1),
    ("qwen3_vl", "grpo", True, (), 2),
    ("qwen3_5", "sft", False, ("vision_tower",), 2),
    ("qwen3_5", "grpo", True, (), 2),
    ("qwen3_vl_moe", "sft", False, (), 1),
    ("qwen3_5_moe", "grpo", True, (), 2),
    ("internvl", "sft", False, (), 2),
    ("gemma4", "sft", False, (), 1),
    ("gemma4", "grpo", True, (), 2),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    processor = tiny_model.build_processor(tiny_model.corpus(50))
    made = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        made[name] = tmp_path_factory.mktemp(f"shape-{index}")
        tiny_model.build_model(processor, **shape).save_pretrained(made[name])
        processor.save_pretrained(made[name])
    for family, parts in FAMILIES.items():
        made[family] = family_models.build(family, tmp_path_factory.mktemp(family), **parts)
    return made


def batch_of(chat, *, branches):
    generator = torch.Generator().manual_seed(0)
    trees = []
    for name, side in (("a", 168), ("b", 112)):
        ids = [tuple(torch.randint(20, 200, (50,), generator=generator).tolist()) for _ in range(branches)]
        weights = [(1.0 if index % 2 else -1.0,) * 50 for index in range(branches)]
        members = tuple(
            Branch(ids=i, weights=w, logprobs=(-1.0,) * 50) for i, w in zip(ids, weights, strict=True)
        )
        trees.append(Tree(prompt=chat.prompt(make_problem(name, sizes=((side, side),))), branches=members))
    return Batch(pack=pack(trees, chat.patches))


def likelihood(batch, scores):
    return sft_loss(scores.logprobs, batch.pack.weights, batch.pack.sequence, "token")


def measured_peak(step):
    """Bytes at the worst moment of `step()` above those before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("shape", "kind", "checkpointing", "frozen", "packs"), CASES)
def test_planned_peaks_are_measured_ones(folders, shape, kind, checkpointing, frozen, packs):
    vlm = loading.load(Model(name=str(folders[shape]), gradient_checkpointing=checkpointing))
    loading.freeze(vlm, frozen)
    batch = batch_of(loading.make_chat(vlm), branches=1 if kind == "sft" else 4)
    objective = likelihood if kind == "sft" else make_objective(Grpo())
    trainer = Trainer(vlm, Optimizer(), steps=9, max_bad_steps=1)
    trainer.step([batch], objective, average="token")  # from here on the optimiser has its state
    trainer.optimizer.zero_grad(set_to_none=True)
    measured = measured_peak(lambda: trainer.step([batch] * packs, objective, average="token"))

    assert batch.pack.grids is not None
    sizes = measure(shape, AutoConfig.from_pretrained(folders[shape]))
    patches = int(batch.pack.grids.prod(dim=1).sum())
    load = Load(tokens=batch.pack.num_tokens, targets=batch.pack.num_targets, patches=patches)
    trains = [part for part in sizes.parameters if part not in frozen]
    held = activations(sizes, load, Passing(element=4, checkpointing=checkpointing, trains=trains))
    gradients = 4 * sum(sizes.parameters[part] for part in trains)
    planned = update_peak(gradients, held, packs=packs)
    print(f"{shape} {sizes.total:,} {kind}: measured {measured:,}, planned {planned:,}")  # noqa: T201
    assert 10e6 < sizes.total < 60e6
    assert planned == pytest.approx(measured, rel=WITHIN)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_peaks_of_adapters_are_measured_ones(folders, dtype, checkpointing):
    settings = Model(name=str(folders["14M, wide"]), gradient_checkpointing=checkpointing, dtype=dtype)
    vlm = loading.prepare(loading.load(settings), Lora(rank=4, alpha=8), (), seed=1)
    batch = batch_of(loading.make_chat(vlm), branches=4)
    trainer = Trainer(vlm, Optimizer(), steps=9, max_bad_steps=1)
    objective = make_objective(Grpo())
    trainer.step([batch_of(loading.make_chat(vlm), branches=1)], objective, average="token")
    trainer.optimizer.zero_grad(set_to_none=True)
    measured = measured_peak(lambda: trainer.step([batch], objective, average="token"))
    sizes = measure("14M, wide", AutoConfig.from_pretrained(folders["14M, wide"]))
    patches = int(batch.pack.grids.prod(dim=1).sum())
    load = Load(tokens=batch.pack.num_tokens, targets=batch.pack.num_targets, patches=patches)
    how = Passing(
        element=4 if dtype == "float32" else 2,
        checkpointing=checkpointing,
        trains=["language_model"],
        adapters=True,
    )
    gradients = 4 * sum(p.numel() for _, p in vlm.parameters())
    planned = update_peak(gradients, activations(sizes, load, how), packs=1)
    print(f"adapters, {dtype}: measured {measured:,}, planned {planned:,}")  # noqa: T201
    assert planned == pytest.approx(measured, rel=WITHIN)
