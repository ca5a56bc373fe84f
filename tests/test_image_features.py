"""A frozen vision tower runs once a step: logprobs and gradients to the bit, and how often it ran."""

import math
import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import family_models
from conftest import make_problem
from rlcs.model import loading
from rlcs.model.image_features import affordable_patches, kept_patches
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.recipe.execution import Lora
from rlcs.recipe.schema import Model
from rlcs.recipe.stages import Grpo
from rlcs.records.trees import Branch, Tree
from rlcs.train import grpo
from rlcs.train.clock import Clock
from rlcs.train.context import GrpoContext
from rlcs.train.learning import Learner
from rlcs.train.trainer import Trainer
from test_policy import gradients
from test_train import group_of

FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl", "gemma4")
ALL = ("vision_tower", "merger")
SIZES = ((224, 168), (56, 84))
"""The first has several windows of attention, which Qwen2.5-VL computes in another order."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory, random_model_folder):
    if request.param == "qwen2_5_vl":
        return random_model_folder
    return family_models.build(request.param, tmp_path_factory.mktemp(request.param))


def prepared(folder, frozen=(), lora=None):
    vlm = loading.load(Model(name=str(folder)), device=torch.device("cpu"))
    vlm = loading.prepare(vlm, lora or Lora(rank=0), frozen, seed=0)
    return vlm, loading.make_chat(vlm)


def trees_of(chat):
    branches = tuple(Branch(ids=tuple(range(30 + i, 40 + i)), weights=(1.0,) * 10) for i in range(3))
    prompts = [chat.prompt(make_problem("a", sizes=SIZES)), chat.prompt(make_problem("b", sizes=()))]
    return [Tree(prompt=prompt, branches=branches) for prompt in prompts]


@contextmanager
def tower_runs(*models):
    """Counts how often the towers of models run, and with how many patches in all."""
    runs = []
    kinds = torch.nn.Conv2d | torch.nn.Conv3d | torch.nn.Linear
    hooks = [
        next(
            module
            for name, module in vlm.model.named_modules()
            if isinstance(module, kinds) and re.search(vlm.family.vision_tower, name)
        ).register_forward_hook(lambda m, x, y: runs.append(len(y)))
        for vlm in models
    ]
    yield runs
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("frozen", "lora"),
    [(("vision_tower",), None), (ALL, None), ((), Lora(rank=4, alpha=8, parts=("language_model",)))],
    ids=["tower", "tower and merger", "adapters"],
)
def test_kept_features_change_no_bit_of_logprobs_and_gradients(folder, frozen, lora):
    vlm, chat = prepared(folder, frozen, lora)
    trees = trees_of(chat)
    plain, kept = pack(trees, chat.patches), pack(trees, chat.patches, keeps_features=True)
    expected = score(vlm, plain)
    wanted = gradients(vlm, expected.logprobs.sum())
    with tower_runs(vlm) as runs:
        with torch.no_grad():
            assert torch.equal(score(vlm, kept).logprobs, expected.logprobs)
        for _ in range(2):
            scores = score(vlm, kept)
            assert torch.equal(scores.logprobs, expected.logprobs)
            assert torch.equal(scores.entropy, expected.entropy)
            got = gradients(vlm, scores.logprobs.sum())
            assert got.keys() == wanted.keys()
            assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert len(runs) == 1
    merger = vlm.family.merger
    assert any(re.search(merger, name) for name in wanted) == (frozen == ("vision_tower",))


def test_a_tower_that_trains_runs_in_every_pass(folder):
    vlm, chat = prepared(folder, ("language_model",))
    kept = pack(trees_of(chat), chat.patches, keeps_features=True)
    with tower_runs(vlm) as runs:
        for _ in range(2):
            found = gradients(vlm, score(vlm, kept).logprobs.sum())
            assert any(re.search(vlm.family.vision_tower, name) for name in found)
    assert len(runs) == 2 and not kept.kept
    assert affordable_patches(vlm, 1 << 30) == 0


def test_other_weights_and_other_formats_are_other_features(folder):
    vlm, chat = prepared(folder, ALL)
    other, _ = prepared(folder, ALL)
    kept = pack(trees_of(chat), chat.patches, keeps_features=True)
    copy = grpo.frozen_copy(vlm)
    coarse = replace(copy, model=grpo.frozen_copy(vlm).model.to(torch.bfloat16))
    with tower_runs(vlm, other, copy, coarse) as runs, torch.no_grad():
        for model, expected in ((vlm, 1), (copy, 1), (other, 2), (coarse, 3), (vlm, 3)):
            score(model, kept)
            assert len(runs) == expected


def learnt(folder, *, feature_bytes, pack_tokens=1):
    """One rollout step in two optimiser steps with old and reference logprobs; the weights, and the runs."""
    settings = Grpo(
        prompts_per_step=4, group_size=3, max_new_tokens=8, optimizer_steps=2, old_logprobs="policy",
        pack_tokens=pack_tokens, kl={"kind": "k3", "coefficient": 0.01}, optimizer={"lr": 1e-3},
    )  # fmt: skip
    vlm, chat = prepared(folder, ("vision_tower",))
    reference = grpo.frozen_copy(vlm)
    context = GrpoContext(
        vlm=vlm, reference=reference, chat=chat, engine=None, grader=None, feature_bytes=feature_bytes
    )
    groups = [group_of(chat, name, [1.0, 0.0, 1.0], settings) for name in "abcd"]
    trainer = Trainer(vlm, settings.optimizer, steps=2, max_bad_steps=1)
    with tower_runs(vlm, reference) as runs:
        learner = Learner(trainer, context, settings, Clock())
        learner.add(list(enumerate(groups)))
        learner.finish()
    return {name: p.detach().clone() for name, p in vlm.model.named_parameters()}, runs


def test_the_tower_runs_once_for_each_image_of_a_step(folder):
    plain, every_pass = learnt(folder, feature_bytes=0)
    once, runs = learnt(folder, feature_bytes=1 << 30)
    assert (len(every_pass), len(runs)) == (10, 4)  # reference and update; old too in the second of two steps
    assert all(torch.equal(once[name], weight) for name, weight in plain.items())


def test_no_more_than_the_bound_is_kept(folder):
    vlm, chat = prepared(folder, ("vision_tower",))
    [grid] = chat.prompt(make_problem("a")).grids
    patches = math.prod(grid)
    a_patch = next(n for n in range(1, 1 << 20) if affordable_patches(vlm, n) == 1)
    kept = pack([Tree(prompt=chat.prompt(make_problem("a")), branches=())], chat.patches, keeps_features=True)
    score(vlm, kept)
    [(*_, inputs)] = kept.kept.values()
    assert sum(tensor.nbytes for tensor in inputs) == a_patch * patches
    assert kept_patches([kept, pack(trees_of(chat), chat.patches)]) == patches
    three = 3 * a_patch * patches
    _, runs = learnt(folder, feature_bytes=three)
    assert len(runs) == 3 * 1 + 1 * 3
    _, runs = learnt(folder, feature_bytes=three - 1)
    assert len(runs) == 2 * 1 + 2 * 3
