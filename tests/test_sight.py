"""PAPO: its loss and every gradient against a plain computation, masks, and what a step does with it."""

import hashlib
import io
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

import family_models
from conftest import draw, make_problem
from rlcs.data.images import image_from_bytes
from rlcs.model.packing import pack
from rlcs.model.patches import PROBE
from rlcs.recipe.execution import Lora
from rlcs.recipe.stages import Grpo
from rlcs.signals import Stopped
from rlcs.train.clock import Clock
from rlcs.train.context import GrpoContext
from rlcs.train.learning import Learner, make_batches, make_objective
from rlcs.train.losses import kl_estimate, sight_loss
from rlcs.train.sight import pictured, with_sight
from rlcs.train.trainer import Trainer
from test_image_features import prepared, tower_runs
from test_policy import assert_same_gradients, gradients, make_trees, padded_logprobs
from test_train import SMALL, assert_equal_weights, group_of, rows_of, run_grpo, weights_of

CASE = [
    ("a", ((56, 84),), (5, 3, 7)),
    ("b", (), (4, 2)),
    ("c", ((84, 84), (56, 56)), (3, 6), (None, 0)),
]
SIGHT = {"coefficient": 0.3, "entropy_coefficient": 0.05}


class Masked:
    """A chat whose patches are masked by the definition: each is black by a number of image and seed."""

    def __init__(self, chat, *, share: float, seed: int) -> None:
        self.chat, self.share, self.seed, self.image_id = chat, share, seed, chat.image_id

    def patches(self, ref):
        found = self.chat.patches(ref).clone()
        key = hashlib.sha256(f"{self.seed}|{ref.sha256}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        chosen = torch.rand(len(found), generator=generator) < self.share
        black = draw_black(ref)
        found[chosen] = self.chat.patches(black)[chosen]
        return found


def draw_black(ref):
    buffer = io.BytesIO()
    Image.new("RGB", (ref.width, ref.height)).save(buffer, "PNG")
    return image_from_bytes(buffer.getvalue(), limit=10**6, where="black")


def plain_gradients(vlm, chat, trees, settings: Grpo, *, seed: int):
    """The whole loss of the paper from padded rows with stock attention, each answer by itself."""
    seeing, _ = padded_logprobs(vlm, chat, trees)
    blind, _ = padded_logprobs(vlm, Masked(chat, share=settings.sight.mask_share, seed=seed), trees)
    if settings.sight.gradient == "seeing":
        blind = blind.detach()
    rows = [(tree, branch) for tree in trees for branch in tree.branches]
    advantages = torch.tensor([weight for _, branch in rows for weight in branch.weights])
    has_image = torch.tensor([float(bool(t.prompt.images)) for t, b in rows for _ in b.ids])
    # GRPO with one optimiser step: the ratio is 1, and its gradient that of the logprob.
    policy = -(seeing - seeing.detach()).exp() * advantages
    ratio = (blind - seeing).clamp(-20, 20)
    divergence = ratio.exp() - ratio - 1
    assert divergence.max() < 10
    extra = -settings.sight.coefficient * divergence + settings.sight.entropy_coefficient * -(seeing + blind)
    per_token = policy + has_image * extra
    lengths = torch.tensor([len(branch.ids) for _, branch in rows])
    if settings.loss_average == "sequence":
        loss = sum(part.mean() for part in per_token.split(lengths.tolist())) / len(rows)
    else:
        loss = per_token.mean()
    return loss, gradients(vlm, loss)


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("gradient", ["seeing", "both"])
@pytest.mark.parametrize(
    ("pack_tokens", "frozen", "lora"),
    [
        (4096, (), None),
        (1, (), None),
        (30, ("vision_tower",), None),
        (4096, (), Lora(rank=4, alpha=8, parts=("language_model",))),
    ],
    ids=["one pack", "a pack each", "frozen tower", "adapters"],
)
def test_gradients_are_those_of_the_paper_s_formula(
    random_model_folder, gradient, average, pack_tokens, frozen, lora
):
    settings = Grpo(
        sight={**SIGHT, "gradient": gradient}, loss_average=average, pack_tokens=pack_tokens, clip_dual=None
    )
    vlm, chat = prepared(random_model_folder, frozen, lora)
    trees = make_trees(chat, CASE)
    loss, expected = plain_gradients(vlm, chat, trees, settings, seed=7)
    context = GrpoContext(vlm=vlm, reference=None, chat=chat, engine=None, grader=None)
    trainer = Trainer(vlm, settings.optimizer, steps=1, max_bad_steps=1)
    objective = with_sight(make_objective(settings), context, settings, seed=7)
    batches = make_batches(trees, context, settings)
    if frozen:  # what is kept of the images as they are is not what the masked ones give
        batches = [replace(batch, pack=replace(batch.pack, kept={})) for batch in batches]
    for batch in batches:
        trainer.add(batch, objective)
    count = sum(len(tree.branches) for tree in trees) if average == "sequence" else 30
    found = {n: p.grad / count for n, p in vlm.model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, expected, tolerance=1e-4)
    vlm.model.zero_grad()
    result = trainer.step(batches, objective, average=average)
    assert result.loss == pytest.approx(loss.item(), abs=1e-5)
    assert result.values["sight"] > 0


def test_the_loss_is_bounded_and_for_images_alone():
    seeing, masked = torch.tensor([-0.1, -0.1, -0.1]), torch.tensor([-2.0, 30.0, -2.0])
    sums = sight_loss(
        seeing, masked, torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 0, 1]),
        settings=Grpo(sight={"coefficient": 2.0, "entropy_coefficient": 0.5}).sight, average="token",
    )  # fmt: skip
    divergence = kl_estimate(seeing, masked, "k3")
    assert divergence[1] == 10 and sums.sums["sight"] == divergence[:2].sum()
    assert sums.loss == pytest.approx(float(-2 * divergence[:2].sum() - 0.5 * (-0.2 - 2.0 + 30.0)))
    assert sums.tokens == 3, "a token without an image counts in the mean"


def test_target_tokens_know_whether_their_tree_has_an_image(chat):
    trees = make_trees(chat, CASE)
    found = pictured(pack(trees, chat.patches)).tolist()
    assert found == [1.0] * 15 + [0.0] * 6 + [1.0] * 9


# ---------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "gemma4"])
def test_a_share_of_the_patches_is_black_to_every_family(family, random_model_folder, tmp_path):
    folder = random_model_folder if family == "qwen2_5_vl" else family_models.build(family, tmp_path)
    _, chat = prepared(folder)
    ref = draw(616, 448)
    whole, black = chat.patches(ref), chat.patches(draw_black(ref))
    mask = {seed: chat.masked_patches(ref, share=0.6, seed=seed) for seed in (1, 2)}
    dark = (mask[1] == black) & (whole != black)
    assert torch.equal(torch.where(dark, black, whole), mask[1]), "the rest is as it was"
    assert 0.5 < float(dark.float().mean() / (whole != black).float().mean()) < 0.7
    assert torch.equal(mask[1], chat.masked_patches(ref, share=0.6, seed=1))
    assert not torch.equal(mask[1], mask[2]), "another seed, other patches"
    assert not torch.equal(mask[1][: len(mask[1]) // 2], whole[: len(whole) // 2])
    assert torch.equal(chat.patches(ref), whole), "what is kept in memory stays whole"
    assert torch.equal(chat.masked_patches(ref, share=0.0, seed=1), whole)
    assert torch.equal(chat.masked_patches(ref, share=1.0, seed=1), black)


def test_a_thumbnail_shows_nothing_that_its_tiles_hide(tmp_path):
    _, chat = prepared(family_models.build("internvl", tmp_path))
    processing = chat._images._processing
    width, height = 2 * PROBE[0], PROBE[0]
    grid = processing.grid(height, width, where="")
    ref = draw(width, height)
    compact = chat._images._compact(ref)
    assert grid[0] > 2, "tiles and a thumbnail"
    chosen = torch.zeros(math.prod(grid), dtype=torch.bool).view(grid)
    chosen[0] = True  # the first tile: the upper left part of the image
    dark = processing.black(compact, chosen.flatten(), (height, width))
    rows, columns = processing._arrangement(height, width)
    side = compact.shape[-1]
    assert dark[0].max() == 0 and torch.equal(dark[1:-1], compact[1:-1])
    hidden = dark[-1, :, : side // rows, : side // columns]
    assert hidden.max() == 0
    assert torch.equal(dark[-1, :, :, side // columns + 1 :], compact[-1, :, :, side // columns + 1 :])


# ---------------------------------------------------------------------------------------------- steps


def learnt(folder, sight, *, feature_bytes=0, rewards=(1.0, 0.0, 1.0), frozen=("vision_tower",)):
    """One rollout step in two optimiser steps; the weights, the results, and how often towers ran."""
    settings = Grpo(
        prompts_per_step=4, group_size=3, max_new_tokens=8, pack_tokens=1, optimizer_steps=2, sight=sight,
        optimizer={"lr": 1e-3}, old_logprobs="policy",
    )  # fmt: skip
    vlm, chat = prepared(folder, frozen)
    context = GrpoContext(
        vlm=vlm, reference=None, chat=chat, engine=None, grader=None, feature_bytes=feature_bytes
    )
    groups = [group_of(chat, name, list(rewards), settings) for name in "abcd"]
    trainer = Trainer(vlm, settings.optimizer, steps=2, max_bad_steps=1)
    with tower_runs(vlm) as runs:
        learner = Learner(trainer, context, settings, Clock())
        learner.add(list(enumerate(groups)))
        results = learner.finish()
    return weights_of(vlm), results, len(runs)


def test_kept_features_and_masked_images_are_not_mixed(random_model_folder):
    plain, _, runs = learnt(random_model_folder, SIGHT)
    kept, _, fewer = learnt(random_model_folder, SIGHT, feature_bytes=1 << 30)
    # The update and masked images, and without kept features old logprobs of the second of two steps.
    assert (runs, fewer) == (4 + 4 + 2, 4 + 4)
    assert_equal_weights(plain, kept)


def test_without_it_nothing_is_masked_and_with_it_a_group_without_reward_differences_is_learnt_from(
    random_model_folder,
):
    _, off, runs = learnt(random_model_folder, {"coefficient": 0.0, "entropy_coefficient": 9.0})
    assert runs == 4 + 2 and "sight" not in off[0].values
    _, flat, runs = learnt(random_model_folder, {}, rewards=(1.0, 1.0, 1.0))
    assert flat == [] and runs == 0
    _, looked, runs = learnt(random_model_folder, SIGHT, rewards=(1.0, 1.0, 1.0))
    assert runs == 10 and looked[0].grad_norm > 0 and looked[0].values["sight"] > 0


def test_the_divergence_grows(random_model_folder):
    settings = Grpo(
        prompts_per_step=4, group_size=3, optimizer={"lr": 3e-3}, sight={"coefficient": 1.0}, steps=12
    )
    vlm, chat = prepared(random_model_folder)
    context = GrpoContext(vlm=vlm, reference=None, chat=chat, engine=None, grader=None)
    trainer = Trainer(vlm, settings.optimizer, steps=12, max_bad_steps=1)
    groups = [group_of(chat, name, [1.0, 1.0, 1.0], settings) for name in "abcd"]
    found = []
    for _ in range(12):
        learner = Learner(trainer, context, settings, Clock())
        learner.add(list(enumerate(groups)))
        [result] = learner.finish()
        found.append(result.values["sight"])
    assert sum(found[-3:]) > 2 * sum(found[:3])


def test_a_stopped_run_masks_the_same_patches(random_model_folder, tmp_path):
    settings = Grpo(**SMALL | {"sight": SIGHT, "steps": 2, "save_every": 1})
    unbroken = run_grpo(random_model_folder, tmp_path / "a", settings)
    with pytest.raises(Stopped):
        run_grpo(random_model_folder, tmp_path / "b", settings, stop_at=1)
    assert_equal_weights(unbroken, run_grpo(random_model_folder, tmp_path / "b", settings))
    rows = rows_of(tmp_path / "a" / "metrics.jsonl")
    assert rows == rows_of(tmp_path / "b" / "metrics.jsonl") and all(row["sight"] > 0 for row in rows)


def test_a_problem_without_an_image_has_no_such_loss(random_model_folder):
    settings = Grpo(sight=SIGHT)
    vlm, chat = prepared(random_model_folder)
    context = GrpoContext(vlm=vlm, reference=None, chat=chat, engine=None, grader=None)
    trees = make_trees(chat, [("b", (), (4, 2))])
    assert make_problem("b", sizes=()).images == ()
    results = []
    for objective in (
        make_objective(settings),
        with_sight(make_objective(settings), context, settings, seed=1),
    ):
        trainer = Trainer(vlm, settings.optimizer, steps=1, max_bad_steps=1)
        for batch in make_batches(trees, context, settings):
            trainer.add(batch, objective)
        results.append({n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.grad is not None})
        vlm.model.zero_grad()
    assert all(torch.equal(results[1][name], gradient) for name, gradient in results[0].items())
