"""Mixtures of experts: what they add to the loss, which of them train, and choices that are replayed."""

from dataclasses import replace

import pytest
import torch
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

import family_models
from rlcs.errors import ModelError, RecipeError, UserError
from rlcs.model import loading
from rlcs.model.experts import Routing, load_balance
from rlcs.model.layout import layout_of
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.publish import quantise
from rlcs.recipe.execution import Lora
from rlcs.recipe.schema import Model
from rlcs.recipe.stages import Grpo
from rlcs.records.trees import Branch
from rlcs.train import learning, sft
from rlcs.train.losses import sft_loss
from rlcs.train.trainer import Batch
from test_policy import CASES, assert_same_gradients, gradients, make_trees, padded_logprobs

FAMILIES = ("qwen3_vl_moe", "qwen3_5_moe")
FORKED = "answers that fork"


@pytest.fixture(scope="module", params=FAMILIES)
def random_model_folder(request, tmp_path_factory):
    return family_models.build(request.param, tmp_path_factory.mktemp(request.param))


def balanced(vlm, weight=0.5):
    return replace(vlm, router_loss=weight)


@pytest.mark.parametrize("case", ["one branch", "one tree"])
def test_the_router_loss_is_that_of_the_models_own_code(vlm, chat, case, monkeypatch):
    """Of the padded, repeated batch, gradients included; the prompt counts once for each answer.

    Without delta nets' own, as their kernel rounds more than the tolerance.
    """
    vlm.model.config.text_config.output_router_logits = True
    trees, losses = make_trees(chat, CASES[case]), []
    packed = pack(trees, chat.patches)
    scores = score(balanced(vlm), packed)
    ours = gradients(vlm, scores.router_loss.mean() - scores.logprobs.sum())
    forward = vlm.model.forward

    def stock(**inputs):
        output = forward(**inputs)
        losses.append(output.aux_loss)
        return output

    monkeypatch.setattr(vlm.model, "forward", stock)
    plain, _ = padded_logprobs(vlm, chat, trees)
    torch.testing.assert_close(scores.router_loss, 0.5 * losses[0].expand(len(plain)))
    theirs = gradients(vlm, 0.5 * losses[0] - plain.sum())
    ours, theirs = ({n: g for n, g in found.items() if "linear_attn" not in n} for found in (ours, theirs))
    assert_same_gradients(ours, theirs)


def test_each_tree_has_its_own_router_loss_however_trees_are_packed(vlm, chat):
    trees = make_trees(chat, CASES["many trees of mixed sizes"])
    whole = score(balanced(vlm), pack(trees, chat.patches)).router_loss
    parts = [score(balanced(vlm), pack([tree], chat.patches)).router_loss for tree in trees]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert all(len(part.unique()) == 1 for part in parts) and len(whole.unique()) == len(trees)


def test_a_fork_counts_once_for_each_answer_that_ends_behind_it(vlm, chat):
    """The stock loss of the rows that end in answers which nothing follows."""
    tree = make_trees(chat, CASES[FORKED])[1]
    [forked] = set(score(balanced(vlm, 1.0), pack([tree], chat.patches)).router_loss.tolist())
    ids = tree.branches[0].ids + tree.branches[1].ids
    plain = replace(tree, branches=(Branch(ids=ids, weights=(1.0,) * len(ids)),))
    [alone] = set(score(balanced(vlm, 1.0), pack([plain], chat.patches)).router_loss.tolist())
    assert forked == pytest.approx(alone, rel=1e-5)


def test_gradient_checkpointing_keeps_the_router_loss(vlm, chat):
    packed = pack(make_trees(chat, CASES["one tree"]), chat.patches)
    vlm.model.train()
    plain = gradients(vlm, score(balanced(vlm), packed).router_loss.sum())
    assert "model.language_model.layers.0.mlp.gate.weight" in plain
    loading.checkpoint_activations(vlm.model)
    assert_same_gradients(gradients(vlm, score(balanced(vlm), packed).router_loss.sum()), plain)


def test_both_stages_learn_the_router_loss(vlm, chat):
    packed = pack(make_trees(chat, CASES["many trees of mixed sizes"]), chat.patches)
    for objective in (sft.make_objective("token"), learning.make_objective(Grpo())):
        without, added = (objective(Batch(pack=packed), score(v, packed)) for v in (vlm, balanced(vlm)))
        loss = score(balanced(vlm), packed).router_loss.sum()
        torch.testing.assert_close(added.loss - without.loss, loss, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(added.sums["router_loss"], loss)


def test_tokens_that_are_not_learnt_add_no_router_loss():
    loss = torch.tensor([1.0, 1.0])
    sums = sft_loss(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), "token", loss)
    assert sums.loss == 1.0


def test_the_weight_is_that_of_the_configuration_unless_the_recipe_has_one(random_model_folder, tmp_path):
    name = {"name": str(random_model_folder)}
    assert loading.load(Model(**name), weights=False).router_loss == 0.0
    assert loading.load(Model(**name, router_loss=0.25), weights=False).router_loss == 0.25
    vlm = loading.load(Model(**name))
    vlm.model.config.text_config.output_router_logits = True
    loading.save(vlm, tmp_path / "own")
    assert loading.load(Model(name=str(tmp_path / "own")), weights=False).router_loss == 0.001
    assert loading.load(Model(name=str(tmp_path / "own"), router_loss=0), weights=False).router_loss == 0.0
    with pytest.raises(UserError, match=r"model.router_loss: .* no experts"):
        loading.load(Model(name="builtin", router_loss=0.1), weights=False)


def test_an_even_load_has_the_least_loss():
    even = Routing()
    logits = torch.eye(4).repeat(2, 1) + torch.eye(4).roll(1, 1).repeat(2, 1)
    even.route(0, logits, torch.zeros(8, 2), torch.zeros(8, 2, dtype=torch.long))
    losses, tree = load_balance(even, layout_of([(3, [5]), (0, [])]))
    assert losses[1] == 0.0 and tree.tolist() == [0] * 8
    torch.testing.assert_close(losses[0], load_balancing_loss_func((logits,), 4, 2))
    assert losses[0] == pytest.approx(2.0)


@pytest.mark.parametrize("part", ["experts", "router"])
def test_experts_and_their_router_are_frozen_apart(vlm, part):
    loading.freeze(vlm, [part])
    frozen = {n for n, p in vlm.model.named_parameters() if not p.requires_grad}
    assert frozen and all(".mlp." in name for name in frozen)
    assert any(".experts." in name for name in frozen) == (part == "experts")
    assert any(".gate." in name for name in frozen) == (part == "router")
    assert not any(re_of_dense(name) for name in frozen)


def re_of_dense(name: str) -> bool:
    return "visual" in name or name.endswith(("layers.1.mlp.gate_proj.weight", "attn.o_proj.weight"))


def test_what_a_model_without_experts_cannot_freeze_is_refused():
    with pytest.raises(RecipeError, match=r"freeze: the model has no experts and no router"):
        loading.freeze(loading.load(Model(name="builtin"), weights=False), ["experts", "router"])


def test_adapters_leave_experts_and_router_alone(vlm):
    adapted = loading.prepare(vlm, Lora(rank=2), (), seed=0)
    names = [name for name, _ in adapted.parameters()]
    assert names and not any(
        ".experts." in name or ".gate." in name or "expert_gate" in name for name in names
    )


def test_what_experts_do_not_support_is_refused(vlm, random_model_folder, tmp_path):
    with pytest.raises(RecipeError, match=r"lora.targets: gate_up_proj: experts get no adapters"):
        loading.prepare(vlm, Lora(rank=2, targets=("q_proj", "gate_up_proj")), (), seed=0)
    with pytest.raises(UserError, match=r"lora.four_bit: .*would stay whole"):
        loading.load(Model(name=str(random_model_folder)), weights=False, four_bit=True)
    with pytest.raises(ModelError, match=r"--quantise: .*would stay whole"):
        quantise.save(vlm.model, "int8", tmp_path)
