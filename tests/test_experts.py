"""Mixtures of experts: what they add to the loss, which of them train, and choices that are replayed."""

import base64
import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

import family_models
from conftest import make_problem
from rlcs.engines import decoding
from rlcs.engines.factory import EngineNeeds, open_engines
from rlcs.engines.local import LocalEngine
from rlcs.engines.vllm.protocol import ROUTES_FLAGS, PromptRequest
from rlcs.engines.vllm.server import Launch
from rlcs.errors import EndpointError, ModelError, RecipeError, TrainingError, UserError
from rlcs.model import loading, parity_check
from rlcs.model.experts import Routing, load_balance, replay
from rlcs.model.layout import layout_of
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.publish import quantise
from rlcs.recipe.execution import Lora, Parallel
from rlcs.recipe.sampling import Rollouts
from rlcs.recipe.schema import Model, Recipe
from rlcs.recipe.stages import Grpo
from rlcs.recipe.table import summary_rows
from rlcs.records import Grade
from rlcs.records.trees import Branch
from rlcs.train import groups, learning, sft
from rlcs.train.losses import sft_loss
from rlcs.train.trainer import Batch
from test_distributed import group_of_one  # noqa: F401 - a fixture
from test_policy import CASES, assert_same_gradients, gradients, make_trees, padded_logprobs
from test_vllm_engine import program, run  # noqa: F401

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


def test_a_sharded_mixture_learns_the_same(
    vlm,
    chat,
    random_model_folder,
    group_of_one,  # noqa: F811
):
    """In shards, with layers that are recomputed and experts that are frozen."""
    packed = pack(make_trees(chat, CASES["one tree"]), chat.patches)
    sharded = loading.load(
        Model(name=str(random_model_folder), gradient_checkpointing=True), world=group_of_one
    )
    found = []
    for one in (vlm, sharded):
        loading.freeze(one, ["experts"])
        one.model.train()
        if one is sharded:
            one = loading.spread(one, Parallel())
        scores = score(balanced(one), packed)
        (scores.router_loss.sum() - scores.logprobs.sum()).backward()
        found.append({n: p.grad.full_tensor() if one.fsdp_root else p.grad for n, p in one.parameters()})
        assert found[0].keys() == found[-1].keys() and not any(".experts." in name for name in found[-1])
    assert_same_gradients(found[1], found[0])


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


class ThirdBest(Routing):
    """A sampler whose kernels choose other experts: the first and third best, with their right weights."""

    def route(self, layer, logits, weights, chosen):
        shares = logits.softmax(-1)
        other = shares.topk(3, -1).indices[:, [0, 2]]
        weights = shares.gather(1, other)
        super().route(layer, logits, weights, other)
        return weights / weights.sum(-1, keepdim=True), other


def group_of(rollouts, prompt):
    grades = tuple(Grade(reward=float(r.index), correct=False) for r in rollouts)
    problem = make_problem(prompt.problem_id)
    return groups.make_group(problem, prompt, rollouts, grades, Grpo())


@pytest.fixture
def sampled(vlm, chat, monkeypatch):
    """Groups of two prompts by an engine with a router that differs, which says what it chose."""
    monkeypatch.setattr(decoding, "Routing", ThirdBest)
    engine = LocalEngine(vlm, chat, max_rows=4, keeps_routes=True)
    prompts = [chat.prompt(make_problem("a", sizes=((56, 84),))), chat.prompt(make_problem("b", sizes=()))]
    found = engine.sample(prompts, chat.sampling(max_new_tokens=12, n=3))
    return [group_of(*each) for each in zip(found, prompts, strict=True)]


def test_replayed_experts_give_the_samplers_logprobs(vlm, chat, sampled):
    trees = [groups.tree_of(group) for group in sampled]
    packed = pack(trees, chat.patches)
    assert packed.routes.shape == (packed.num_tokens, 3, 2)
    replayed = score(vlm, packed).logprobs
    own = score(vlm, replace(packed, routes=None)).logprobs
    torch.testing.assert_close(replayed, packed.sampler_logprobs, rtol=1e-5, atol=1e-5)
    assert (own - packed.sampler_logprobs).abs().mean() > 0.01


def test_replayed_experts_have_the_gradient_of_the_policys_own_router(vlm, chat, sampled):
    """It flows through the weights of the experts that were chosen, also where layers are recomputed."""
    packed = pack([groups.tree_of(group) for group in sampled], chat.patches)
    vlm.model.train()
    plain = gradients(vlm, score(vlm, packed).logprobs.sum())
    loading.checkpoint_activations(vlm.model)
    assert_same_gradients(gradients(vlm, score(vlm, packed).logprobs.sum()), plain)
    name, step = "model.language_model.layers.0.mlp.gate.weight", 1e-2
    assert plain[name].norm() > 0
    weight = vlm.model.get_parameter(name)
    direction = plain[name] / plain[name].norm()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            ends.append(score(vlm, packed).logprobs.double().sum())
            weight -= sign * step * direction
    assert float(ends[0] - ends[1]) / (2 * step) == pytest.approx(float(plain[name].norm()), rel=0.02)


def test_only_the_policy_replays(vlm, chat, sampled):
    packed = pack([groups.tree_of(group) for group in sampled], chat.patches)
    context = SimpleNamespace(vlm=vlm, reference=vlm, teacher=None)
    settings = Grpo(optimizer_steps=2, prompts_per_step=2, old_logprobs="policy")
    [batch] = learning.with_logprobs([packed], context, settings)
    torch.testing.assert_close(batch.old_logprobs, packed.sampler_logprobs, rtol=1e-5, atol=1e-5)
    assert (batch.ref_logprobs - packed.sampler_logprobs).abs().mean() > 0.01


def test_the_prompts_experts_come_with_the_first_answer_whichever_are_scored(chat, sampled):
    group = sampled[0]
    size = len(group.prompt.ids)
    assert [len(r.routes) - len(r.ids) + 1 for r in group.rollouts] == [size, 0, 0]
    unscored = replace(group, advantages=(None, *group.advantages[1:]))
    tree = groups.tree_of(unscored)
    assert len(tree.branches) == 2 and tree.trunk_routes == group.rollouts[0].routes.first(size)
    alone = groups.tree_of(replace(group, rollouts=tuple(replace(r, routes=None) for r in group.rollouts)))
    assert alone.trunk_routes is None and pack([alone], chat.patches).routes is None


def test_experts_that_the_model_does_not_have_are_refused(vlm, chat, sampled):
    packed = pack([groups.tree_of(group) for group in sampled], chat.patches)
    for wrong in (packed.routes[:, :2], packed.routes + 7, packed.routes.clamp(max=0)):
        with pytest.raises(TrainingError, match=r"rollout.router_replay: the engine chose other experts"):
            score(vlm, replace(packed, routes=wrong))


def test_the_engine_keeps_nothing_that_nobody_wants(vlm, chat):
    [[rollout]] = LocalEngine(vlm, chat, max_rows=1).sample(
        [chat.prompt(make_problem("a"))], chat.sampling(max_new_tokens=2)
    )
    assert rollout.routes is None


def test_a_model_without_experts_has_nothing_to_replay(tmp_path):
    vlm = loading.load(Model(name="builtin"), weights=False)
    needs = EngineNeeds(settings=Rollouts(router_replay=True), max_tokens=9, max_rows=9)
    with open_engines(needs, tmp_path) as make, pytest.raises(UserError, match=r"rollout.router_replay"):
        make(vlm, None, 1)


def test_vllm_on_a_cpu_cannot_say_what_it_chose(vlm, tmp_path):
    needs = EngineNeeds(settings=Rollouts(engine="vllm_server", router_replay=True), max_tokens=9, max_rows=9)
    with open_engines(needs, tmp_path) as make, pytest.raises(UserError, match="on a CPU vLLM does not say"):
        make(vlm, None, 1)


def test_vllm_is_asked_for_its_experts_and_its_answers_are_read(chat, sampled):
    launch = Launch(settings=Rollouts(router_replay=True), dtype="float32", max_tokens=9, max_rows=9)
    assert set(ROUTES_FLAGS) < set(launch.command(Path("folder"), 1))
    prompt, ids = sampled[0].prompt, [5, 6, 7]
    request = PromptRequest(
        prompt=prompt,
        sampling=chat.sampling(max_new_tokens=5, n=2),
        step=0,
        resized=chat.resized,
        keeps_routes=True,
    )
    table = np.arange((len(prompt.ids) + 2) * 6, dtype=np.uint8).reshape(-1, 3, 2)
    choices = [
        {
            "index": index,
            "finish_reason": "stop",
            "token_ids": ids,
            "logprobs": {"content": [{"logprob": -0.5}] * 3},
            "routed_experts": encoded(table),
        }
        for index in range(2)
    ]
    reply = {"prompt_token_ids": list(prompt.ids), "choices": choices}
    first, second = request.rollouts_from(reply)
    assert len(first.routes) == len(table) and first.routes.last(2) == second.routes
    read = np.frombuffer(second.routes.data, dtype="<u2").reshape(-1, 3, 2)
    assert np.array_equal(read, table[-2:])
    choices[1]["routed_experts"] = encoded(table[1:])
    with pytest.raises(EndpointError, match="in the form"):
        request.rollouts_from(reply)
    choices[1]["routed_experts"] = None
    with pytest.raises(EndpointError, match=r"does not say .*\n.*--enable-return-routed-experts"):
        request.rollouts_from(reply)


def test_a_fake_vllms_experts_reach_the_policys_pass(run, vlm, chat):  # noqa: F811
    """They are the last two in every layer, and so are those that compute."""
    prompt = chat.prompt(make_problem("a", sizes=()))
    for replayed in (True, False):
        one = run(router_replay=replayed)
        [rollouts] = one.engine.sample([prompt], chat.sampling(max_new_tokens=64, n=2))
        packed = pack([groups.tree_of(group_of(rollouts, prompt))], chat.patches)
        assert (packed.routes is None) != replayed
        if replayed:
            known = packed.routes[:, 0, 0] >= 0
            assert known.sum() == packed.num_tokens - 2, "all but the last of each answer"
            routing = replay(vlm.model, packed.routes)
            score(vlm, packed, routing=routing)
            assert (routing.chosen[0][known] == torch.tensor([6, 7])).all()
        one.fleet.close()


def encoded(table) -> str:
    file = io.BytesIO()
    np.save(file, table)
    return base64.b64encode(file.getvalue()).decode()


def test_nearly_equal_experts_do_not_stop_a_run(vlm, chat, monkeypatch):
    """Rounding alone decides between them, so that the check compares by the same choices."""
    with torch.no_grad():
        for name, weight in vlm.model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                weight[1:3] = weight[:1]  # some of three equals are chosen
                weight[1:3] += 1e-8 * torch.randn_like(weight[1:3])
    trees = make_trees(chat, CASES["many trees of mixed sizes"])
    [found] = parity_check.agreement(vlm, chat, trees)
    assert found.share < 0.5
    monkeypatch.setattr(parity_check, "_chosen", lambda *given: None)
    [by_chance] = parity_check.agreement(vlm, chat, trees)
    assert by_chance.gap > 10 * found.gap


def test_experts_are_saved_as_published(vlm, tmp_path):
    """Qwen3-VL's transposed, as vLLM reads them, and transformers too; Qwen3.5's one by one."""
    loading.save(vlm, tmp_path)
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    layer = "model.language_model.layers.0.mlp.experts"
    if vlm.model.config.model_type == "qwen3_vl_moe":
        assert shapes[f"{layer}.gate_up_proj"] == (8, 128, 96) and shapes[f"{layer}.down_proj"] == (
            8,
            48,
            128,
        )
    else:
        assert shapes[f"{layer}.0.gate_proj.weight"] == (48, 128)
    again = loading.load(Model(name=str(tmp_path)))
    for (name, saved), own in zip(again.model.named_parameters(), vlm.model.parameters(), strict=True):
        assert torch.equal(saved, own), name


def test_the_table_of_a_recipe_names_both_choices():
    recipe = Recipe(
        model={"router_loss": 0.001}, rollout={"engine": "vllm_server", "router_replay": True}, grpo={}
    )
    rows = dict(summary_rows(recipe))
    assert "0.001 x the loss that balances experts" in rows["model"]
    assert "experts are replayed" in rows["rollouts"]
    plain = dict(summary_rows(Recipe()))
    assert "experts" not in plain["model"]
