"""Entropy control against plain loops of the papers' formulas: held tokens, the bonus, and gradients."""

import itertools
import random
import statistics
from dataclasses import replace

import pytest
import torch

from conftest import make_problem
from rlcs.model import loading
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.recipe.objectives import Entropy
from rlcs.recipe.schema import Model
from rlcs.recipe.stages import Grpo
from rlcs.records import Grade, Rollout, StopReason
from rlcs.train import losses
from rlcs.train.clock import Clock
from rlcs.train.context import GrpoContext
from rlcs.train.entropy import EntropyBonus, held_tokens, with_held_tokens
from rlcs.train.groups import make_group, tree_of
from rlcs.train.learning import Learner
from rlcs.train.trainer import StepResult, Trainer
from test_losses import gradient, make_inputs

CLIP = Entropy(control="clip_cov", share=0.1, bounds=(0.2, 1.5))
WIDE = Entropy(control="clip_cov", share=0.1, bounds=(-9.0, 9.0))
KL = Entropy(control="kl_cov", share=0.1, coefficient=0.7)


def make_tokens(count=200, seed=0):
    """Advantages, a fifth of them 0, and logprobs, as lists."""
    rng = random.Random(seed)
    advantages = [rng.choice([0.0, 1.0, -1.0, 0.4, -2.0]) for _ in range(count)]
    return advantages, [-rng.expovariate(1.0) for _ in range(count)]


def covariances(advantages, logprobs):
    """arXiv 2505.22617: the centred products, over all tokens."""
    of_advantages, of_logprobs = statistics.mean(advantages), statistics.mean(logprobs)
    return [(a - of_advantages) * (x - of_logprobs) for a, x in zip(advantages, logprobs, strict=True)]


def held(advantages, logprobs, entropy, seed=0):
    chosen = held_tokens(
        torch.tensor(advantages).double(), torch.tensor(logprobs).double(), entropy, seed=seed
    )
    return sorted(chosen.tolist())


# --- which tokens are held -----------------------------------------------------------------------


def test_kl_cov_holds_the_highest_covariances():
    advantages, logprobs = make_tokens()
    cov = covariances(advantages, logprobs)
    able = [t for t in range(200) if advantages[t]]
    assert held(advantages, logprobs, KL) == sorted(sorted(able, key=lambda t: -cov[t])[:20])
    assert len(held(advantages, logprobs, Entropy(control="kl_cov"))) == 1, "2e-3 of 200 tokens, one at least"


def test_clip_cov_draws_within_its_bounds_each_as_likely():
    advantages, logprobs = make_tokens()
    cov = covariances(advantages, logprobs)
    within = {t for t in range(200) if advantages[t] and 0.2 < cov[t] < 1.5}
    assert 20 < len(within) < 80
    times = dict.fromkeys(within, 0)
    for seed in range(400):
        chosen = held(advantages, logprobs, CLIP, seed)
        assert len(chosen) == 20 == len(set(chosen)) and set(chosen) <= within
        for t in chosen:
            times[t] += 1
    expected = 400 * 20 / len(within)
    assert all(0.7 * expected < count < 1.3 * expected for count in times.values())
    assert held(advantages, logprobs, CLIP, 3) == held(advantages, logprobs, CLIP, 3)
    few = CLIP.model_copy(update={"bounds": (100.0, 200.0)})
    assert held(advantages, logprobs, few) == []
    assert len(held(advantages, logprobs, Entropy(control="clip_cov", bounds=(-99, 99)))) == 1


@pytest.mark.parametrize("entropy", [CLIP, KL], ids=["clip", "kl"])
def test_a_step_without_a_signal_holds_nothing(entropy):
    assert held([0.0] * 50, [-0.1 * t for t in range(50)], entropy) == []
    assert held([], [], entropy) == []


def make_groups(chat, settings, names="abcdef", seed=1):
    """Groups of three answers with rewards, of which every third has the same reward for all."""
    rng, groups = random.Random(seed), []
    for number, name in enumerate(names):
        problem = make_problem(name, f"question {name}", ((56, 84),) if number % 2 else ())
        rollouts, grades = [], []
        for index in range(3):
            length = rng.randint(4, 9)
            rollouts.append(
                Rollout(
                    problem_id=name,
                    index=index,
                    ids=tuple(rng.randint(20, 200) for _ in range(length)),
                    logprobs=tuple(-rng.expovariate(0.4) for _ in range(length)),
                    stop=StopReason.EOS,
                    seed=index,
                    text="t",
                )
            )
            grades.append(Grade(reward=1.0 if number % 3 == 2 or index == number % 2 else 0.0, correct=True))
        groups.append(make_group(problem, chat.prompt(problem), rollouts, grades, settings))
    return groups


def marks(trees):
    return {
        (tree.prompt.problem_id, number, index)
        for tree in trees
        for number, branch in enumerate(tree.branches)
        for index in branch.held
    }


@pytest.mark.parametrize("entropy", [CLIP, KL], ids=["clip", "kl"])
def test_trees_are_marked_alike_in_whatever_order_they_come(chat, entropy):
    groups = make_groups(chat, Grpo())
    trees = [tree_of(group) for group in groups]
    learnt, flat = trees[:2] + trees[3:5], [trees[2], trees[5]]
    tokens = [
        ((tree.prompt.problem_id, number, index), weight, logprob)
        for tree in trees
        for number, branch in enumerate(tree.branches)
        for index, (weight, logprob) in enumerate(zip(branch.weights, branch.logprobs, strict=True))
    ]
    names, advantages, logprobs = zip(*tokens, strict=True)
    expected = {names[t] for t in held(advantages, logprobs, entropy, 5)}
    for order in itertools.islice(itertools.permutations(learnt), 0, 24, 5):
        found = with_held_tokens(order, flat[::-1], entropy, seed=5)
        assert {tree.prompt.problem_id for tree in found} == set("abde")
        assert marks(found) == expected and len(expected) == int(0.1 * len(tokens))
    if entropy is KL:
        alone = marks(with_held_tokens(learnt, [], entropy, seed=5))
        assert len(alone) < len(expected), "groups without a signal count in the means and the share"


def test_a_pack_says_which_of_its_tokens_are_held(chat):
    trees = [tree_of(group) for group in make_groups(chat, Grpo())]
    marked = with_held_tokens(trees, [], KL, seed=0)
    whole = pack(marked, chat.patches)
    flags = [
        (tree.prompt.problem_id, number, index) in marks(marked)
        for tree in marked
        for number, branch in enumerate(tree.branches)
        for index in range(len(branch.ids))
    ]
    assert whole.held.tolist() == flags and any(flags) and len(flags) == whole.num_targets
    assert pack(trees, chat.patches).held is None


# --- what it changes in the loss -----------------------------------------------------------------


def loss_inputs():
    return replace(make_inputs((3, 6, 4, 5), seed=6), held=torch.arange(18) % 3 == 1)


@pytest.mark.parametrize("loss", ["grpo", "cispo", "sapo", "dppo"])
def test_clip_cov_takes_the_gradient_of_held_tokens_away(loss):
    inputs, settings = loss_inputs(), Grpo(loss=loss, entropy=CLIP)
    plain = replace(inputs, held=None)
    expected = torch.where(inputs.held, 0.0, gradient(plain, Grpo(loss=loss)))
    assert torch.equal(gradient(inputs, settings), expected)
    assert (gradient(plain, Grpo(loss=loss))[inputs.held] != 0).any()
    got = losses.policy_loss(inputs, settings)
    without = replace(plain, advantages=inputs.advantages.masked_fill(inputs.held, 0.0))
    assert got.loss.item() == pytest.approx(losses.policy_loss(without, Grpo(loss=loss)).loss.item())
    assert got.tokens == 18 and got.sums["held_share"] == inputs.held.sum()
    assert losses.policy_loss(plain, settings).sums["held_share"] == 0
    assert "held_share" not in losses.policy_loss(plain, Grpo(loss=loss)).sums


@pytest.mark.parametrize("loss", ["grpo", "gspo", "cispo", "sapo", "dppo"])
def test_kl_cov_holds_tokens_near_where_they_were(loss):
    """-r A + coefficient * |log r| of held tokens, which pulls each by the coefficient to where it was."""
    inputs, settings = loss_inputs(), Grpo(loss=loss, entropy=KL, optimizer_steps=2)
    plain, off = replace(inputs, held=None), Grpo(loss=loss)
    log_ratio = (inputs.logprobs - inputs.old_logprobs).tolist()
    penalty = sum(0.7 * abs(x) for x, flag in zip(log_ratio, inputs.held.tolist(), strict=True) if flag)
    got, without = losses.policy_loss(inputs, settings).loss, losses.policy_loss(plain, off).loss
    assert got.item() == pytest.approx(without.item() + penalty, rel=1e-12)
    pull = 0.7 * torch.tensor(log_ratio).double().sign() * inputs.held
    assert torch.allclose(gradient(inputs, settings), gradient(plain, off) + pull, rtol=1e-12, atol=1e-14)
    # It has no importance weight, as it says nothing of the reward.
    weighted = {"importance": torch.full((18,), 0.5).double()}
    apart = gradient(replace(inputs, **weighted), settings) - gradient(replace(plain, **weighted), off)
    assert torch.allclose(apart, pull, rtol=1e-12, atol=1e-14)


def test_kl_cov_gives_a_token_that_has_not_moved_no_slope_by_its_rounding():
    """Where a step begins, old and new logprobs differ by rounding, whose sign goes by the packs."""
    old = torch.full((4,), -1.0, dtype=torch.float64)
    slopes = []
    for sign in (1.0, -1.0):
        new = (old + sign * torch.tensor([1e-6, 0.0, 0.5, 1e-6])).requires_grad_()
        inputs = losses.LossInputs(
            logprobs=new, old_logprobs=old, advantages=torch.zeros(4),
            sequence=torch.zeros(4, dtype=torch.long), held=torch.tensor([True, True, True, False]),
        )  # fmt: skip
        losses.policy_loss(inputs, Grpo(entropy=KL, optimizer_steps=2)).loss.backward()
        slopes.append(new.grad.tolist())
    assert slopes[0] == [0.0, 0.0, KL.coefficient, 0.0] and slopes[1] == [0.0, 0.0, -KL.coefficient, 0.0]


def test_the_bonus_is_taken_off_each_tokens_loss():
    inputs = make_inputs()
    bonus = torch.rand(12).double().requires_grad_()
    got = losses.policy_loss(replace(inputs, entropy_bonus=bonus), Grpo(loss_average="sequence"))
    plain = losses.policy_loss(inputs, Grpo(loss_average="sequence"))
    lengths = torch.bincount(inputs.sequence)[inputs.sequence]
    assert got.loss.item() == pytest.approx((plain.loss - (bonus / lengths).sum()).item())
    got.loss.backward()
    assert torch.allclose(bonus.grad, -1.0 / lengths.double())


# --- a whole step --------------------------------------------------------------------------------


class Step:
    """Gradients of the optimiser steps of one rollout step, at a rate of 0."""

    def __init__(self, folder, settings, *, order=None, weight=0.0, fused=False, parts=1):
        vlm = loading.load(Model(name=str(folder), fused_loss=fused))
        chat = loading.make_chat(vlm)
        context = GrpoContext(vlm=vlm, reference=None, chat=chat, engine=None, grader=None)
        trainer = Trainer(vlm, settings.optimizer, steps=9, max_bad_steps=1)
        self.vlm, self.chat, self.gradients = vlm, chat, []
        apply = trainer.apply
        trainer.apply = lambda **more: self.keep(apply(**more))
        placed = list(enumerate(make_groups(chat, settings)))
        placed = [placed[place] for place in order or range(6)]
        learner = Learner(trainer, context, settings, Clock(), entropy_weight=weight)
        for start in range(0, 6, 6 // parts):
            learner.add(placed[start : start + 6 // parts])
            learner.advance()
        self.results = learner.finish()

    def keep(self, result):
        self.gradients.append({name: p.grad.clone() for name, p in self.vlm.parameters()})
        return result


def settings_of(**more):
    optimizer = {"lr": 0.0, "max_grad_norm": 1e9, "weight_decay": 0.0}
    return Grpo(prompts_per_step=6, group_size=3, optimizer=optimizer, **more)


def plain_step(vlm, chat, groups, entropy, seed, *, weight=0.0):
    """The gradient of one optimiser step: token by token from the logprobs of one answer at a time."""
    tokens = [
        (a, x)
        for group in groups
        for a, rollout in zip(group.advantages, group.rollouts, strict=True)
        for x in rollout.logprobs
    ]
    of_step = set(held(*zip(*tokens, strict=True), entropy, seed)) if entropy.holds_tokens else set()
    total, at = torch.zeros(()), 0
    for group in groups:
        for branch in tree_of(group).branches:
            tree = replace(tree_of(group), branches=(branch,))
            scores = score(vlm, pack([tree], chat.patches), entropy_gradient=True)
            for t, sampled in enumerate(branch.logprobs):
                ratio, advantage = (scores.logprobs[t] - sampled).exp(), branch.weights[t]
                gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
                if entropy.control == "clip_cov" and at in of_step:
                    gain = gain * 0
                if entropy.control == "kl_cov" and at in of_step:
                    gain = gain - entropy.coefficient * (scores.logprobs[t] - sampled).abs()
                total = total - gain - weight * scores.entropy[t]
                at += 1
    vlm.model.zero_grad()
    (total / at).backward()
    return {name: p.grad.clone() for name, p in vlm.parameters()}


def assert_close(ours, theirs, tolerance=1e-4):
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    for name, expected in theirs.items():
        assert float((ours[name] - expected).norm()) <= tolerance * max(
            float(expected.norm()), largest / 10
        ), name


@pytest.mark.parametrize("entropy", [WIDE, KL], ids=["clip", "kl"])
def test_a_step_is_that_of_plain_loops_however_it_is_packed(random_model_folder, entropy):
    settings = settings_of(optimizer_steps=2, entropy=entropy, clip_dual=None)
    steps = [
        Step(random_model_folder, settings),
        Step(random_model_folder, settings.model_copy(update={"pack_tokens": 1})),
        Step(
            random_model_folder,
            settings.model_copy(update={"pack_tokens": 40}),
            order=[5, 1, 0, 4, 2, 3],
            parts=3,
        ),
    ]
    one = steps[0]
    for number in range(2):
        groups = make_groups(one.chat, settings)[3 * number : 3 * number + 3]
        expected = plain_step(one.vlm, one.chat, groups, entropy, number)
        for step in steps:
            assert_close(step.gradients[number], expected)
            assert step.results[number].values["held_share"] > 0
    off = Step(random_model_folder, settings_of(optimizer_steps=2, clip_dual=None))
    with pytest.raises(AssertionError):
        assert_close(off.gradients[0], one.gradients[0], 1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_the_bonus_reaches_every_weight_and_every_group(random_model_folder, fused):
    """Those whose rewards are all equal, too; also where logits become their own gradients."""
    bonus = Entropy(control="bonus")
    settings = settings_of(optimizer_steps=2, entropy=bonus, clip_dual=None)
    step = Step(random_model_folder, settings, weight=0.5, fused=fused)
    plain = Step(random_model_folder, settings)
    for number in range(2):
        groups = make_groups(plain.chat, settings)[3 * number : 3 * number + 3]
        for taken, weight in ((step, 0.5), (plain, 0.0)):
            expected = plain_step(plain.vlm, plain.chat, groups, bonus, 0, weight=weight)
            assert_close(taken.gradients[number], expected)
        values, targets = step.results[number].values, sum(len(r.ids) for g in groups for r in g.rollouts)
        assert step.results[number].targets == targets
        apart = plain.results[number].loss - step.results[number].loss
        assert apart == pytest.approx(0.5 * values["entropy"], rel=1e-4)


# --- the weight of the bonus ---------------------------------------------------------------------


def test_the_weight_follows_the_entropy():
    """arXiv 2505.22312: c by the entropies so far, and alpha = c where the last one is at most the target."""
    settings = Entropy(control="bonus", target=0.5, bonus_step=0.1, bonus_max=0.25)
    entropies = [0.9, 0.4, 0.3, 0.5, 0.2, 0.1, 0.1, 0.6, 0.4, 0.9, 0.9, 0.9, 0.9]
    carried = {}
    c, last = 0.0, 9.0
    for entropy in entropies:
        expected = c if last <= 0.5 else 0.0
        bonus = EntropyBonus(settings, carried)  # as after a resume: all that it knows is carried
        assert bonus.weight == pytest.approx(expected)
        result = StepResult(loss=0, grad_norm=0, lr=0, tokens=1, targets=1, values={"entropy": entropy})
        assert bonus.after(result) == {"entropy_weight": pytest.approx(expected)}
        if entropy != 0.5:
            c = min(max(c + (0.1 if entropy < 0.5 else -0.1), 0.0), 0.25)
        last = entropy
    assert carried == {"entropy_bonus": {"coefficient": 0.0, "entropy": 0.9}}


def test_a_step_without_a_finite_entropy_changes_no_weight():
    settings, carried = Entropy(control="bonus", target=9.0), {}
    bonus = EntropyBonus(settings, carried)
    broken = StepResult(loss=0, grad_norm=0, lr=0, tokens=1, targets=1, values={"entropy": float("nan")})
    assert bonus.after(None) == bonus.after(broken) == {"entropy_weight": 0.0} and not carried
    assert EntropyBonus(Entropy(), carried).after(broken) == {}
