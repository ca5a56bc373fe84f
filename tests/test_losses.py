"""Advantages and losses against slow loops in plain Python, finite differences and hand computation."""

import math
import statistics
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlcs.recipe.stages import Grpo, Kl
from rlcs.train import losses as ob

torch.set_num_threads(1)

LOSSES = ("grpo", "gspo", "cispo", "sapo", "dppo")
AVERAGES = ("token", "sequence", "constant", "micro_batch")
LENGTHS = (1, 4, 2, 5)


def make_inputs(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, spread: float = 0.4) -> ob.LossInputs:
    """Random float64 tokens; sequences alternate between right and wrong."""
    rng = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    old = -torch.rand(n, generator=rng, dtype=torch.float64) - 0.05
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)[torch.arange(len(lengths)) % 2]
    size = torch.rand(len(lengths), generator=rng, dtype=torch.float64) + 0.2
    return ob.LossInputs(
        logprobs=old + spread * torch.randn(n, generator=rng, dtype=torch.float64),
        old_logprobs=old,
        advantages=(signs * size)[sequence],
        sequence=sequence,
        ref_logprobs=old + 0.3 * torch.randn(n, generator=rng, dtype=torch.float64),
    )


def slow_loss(inputs: ob.LossInputs, s: Grpo) -> float:
    """The formulas of the papers, token by token: the summed loss and nothing clever."""
    new, old, adv = inputs.logprobs.tolist(), inputs.old_logprobs.tolist(), inputs.advantages.tolist()
    seq = inputs.sequence.tolist()
    total = 0.0
    for t in range(len(new)):
        members = [u for u in range(len(new)) if seq[u] == seq[t]]
        ratio = math.exp(new[t] - old[t])
        if s.loss == "gspo":
            ratio = math.exp(sum(new[u] - old[u] for u in members) / len(members))
        clipped = min(max(ratio, 1 - s.clip_low), 1 + s.clip_high)
        if s.loss == "cispo":
            loss = -clipped * adv[t] * new[t]
        elif s.loss == "sapo":
            tau = s.sapo_temperatures[0 if adv[t] > 0 else 1]
            loss = -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * adv[t]
        elif s.loss == "dppo":
            moved = math.exp(new[t]) - math.exp(old[t])
            far = moved > s.clip_high if adv[t] > 0 else moved < -s.clip_low
            loss = 0.0 if far else -min(ratio, 20.0) * adv[t] * new[t]
        else:
            gain = min(ratio * adv[t], clipped * adv[t])
            loss = -(max(gain, s.clip_dual * adv[t]) if s.clip_dual and adv[t] < 0 else gain)
        if s.kl.kind != "none":
            d = inputs.ref_logprobs.tolist()[t] - new[t]
            kl = {"k1": -d, "k2": d * d / 2, "k3": min(math.exp(d) - d - 1, 10.0)}[s.kl.kind]
            loss += s.kl.coefficient * kl
        scale = {"sequence": len(members), "micro_batch": len(new)}.get(s.loss_average, 1)
        total += loss / scale
    return total


def gradient(inputs: ob.LossInputs, settings_: Grpo) -> Tensor:
    """d loss / d logprobs."""
    leaf = inputs.logprobs.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ob.policy_loss(replace(inputs, logprobs=leaf), settings_).loss, leaf)
    return grad


# --- groups -------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0]
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    assert ob.advantages(rewards, "grpo") == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards])
    assert ob.advantages(rewards, "dr_grpo") == pytest.approx([r - 0.6 for r in rewards])
    others = [(sum(rewards) - r) / 4 for r in rewards]
    assert ob.advantages(rewards, "rloo") == pytest.approx(
        [r - o for r, o in zip(rewards, others, strict=True)]
    )


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "pass_k"])
def test_unscored_members_count_nowhere(kind: Any) -> None:
    with_gaps = ob.advantages([None, 1.0, 0.0, None, 0.5], kind)
    assert with_gaps[0] is None and with_gaps[3] is None
    assert tuple(a for a in with_gaps if a is not None) == ob.advantages([1.0, 0.0, 0.5], kind)


@pytest.mark.parametrize("rewards", [[], [None], [1.0], [None, 1.0, None], [None, None]])
def test_fewer_than_two_scored_have_no_advantage(rewards: list[float | None]) -> None:
    assert ob.advantages(rewards, "grpo") == (None,) * len(rewards)
    assert ob.has_zero_variance(rewards)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("rewards", [[1.0, 0.0, 0.0, 1.0, 0.0], [0.1, 1.1, 0.0, 0.1, 1.0, 0.9]])
def test_pass_k_advantages_are_those_of_all_sets(rewards: list[float], k: int) -> None:
    sets = list(combinations(range(len(rewards)), k))
    best = [max(rewards[i] for i in chosen) for chosen in sets]
    mean, std = statistics.mean(best), statistics.pstdev(best)
    expected = [
        statistics.mean(b - mean for b, chosen in zip(best, sets, strict=True) if i in chosen) / (std + 1e-6)
        for i in range(len(rewards))
    ]
    assert ob.advantages(rewards, "pass_k", k=k) == pytest.approx(expected, abs=1e-12)


def test_pass_k_advantages_of_right_and_wrong_have_the_closed_form() -> None:
    """arXiv 2508.10751, eq. 10 to 15, with 2 right answers of 8 and k = 4."""
    mean = 1 - math.comb(6, 4) / math.comb(8, 4)
    std = math.sqrt(mean * (1 - mean))
    right, wrong = (1 - mean) / std, (1 - mean - math.comb(5, 3) / math.comb(7, 3)) / std
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    expected = [right if r else wrong for r in rewards]
    assert ob.advantages(rewards, "pass_k", k=4) == pytest.approx(expected, rel=1e-5)


def test_flat_group_is_exactly_zero_even_where_rounding_is_not() -> None:
    assert ob.advantages([0.1, 0.1, 0.1], "grpo") == (0.0, 0.0, 0.0)
    assert ob.advantages([0.1 + 0.2, 0.3, None], "rloo") == (0.0, 0.0, None)
    assert ob.has_zero_variance([0.1 + 0.2, 0.3]) and ob.has_zero_variance([1.0, None, 1.0])
    assert not ob.has_zero_variance([0.0, None, 1e-6])


def test_unknown_names_are_refused() -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match="best"):
        ob.advantages([0.0, 1.0], "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ppo"):
        Grpo(loss="ppo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k9"):
        ob.kl_estimate(inputs.logprobs, inputs.old_logprobs, "k9")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row"):
        ob.denominator("row", tokens=1, sequences=1)  # type: ignore[arg-type]


def test_overlong_penalty_ramps_down_to_the_limit() -> None:
    lengths = [0, 75, 80, 85, 95, 100, 130]
    got = [ob.overlong_penalty(n, 100, 20, 0.5) for n in lengths]
    assert got == pytest.approx([0.0, 0.0, 0.0, -0.125, -0.375, -0.5, -0.5])
    assert ob.overlong_penalty(100, 100, 0, 0.5) == 0.0


# --- policy losses ------------------------------------------------------------------------------


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_equals_the_slow_loop(loss: Any, average: Any) -> None:
    for seed, kl in enumerate(("none", "k1", "k2", "k3")):
        inputs = make_inputs(seed=seed)
        chosen = Grpo(loss=loss, loss_average=average, kl=Kl(kind=kl, coefficient=0.1), clip_dual=1.5)
        got = ob.policy_loss(inputs, chosen)
        assert got.loss.item() == pytest.approx(slow_loss(inputs, chosen), rel=1e-12)
        assert (got.tokens.item(), got.sequences.item()) == (12, 4)


@pytest.mark.parametrize("kl", ["none", "k1", "k2", "k3"])
@pytest.mark.parametrize("loss", ["grpo", "gspo", "sapo"])
def test_gradient_by_finite_differences(loss: Any, kl: Any) -> None:
    inputs = make_inputs(seed=3)
    chosen = Grpo(loss=loss, kl=Kl(kind=kl, coefficient=0.3), loss_average="sequence", clip_dual=1.5)
    leaf = inputs.logprobs.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ob.policy_loss(replace(inputs, logprobs=x), chosen).loss, (leaf,)
    )


def test_cispo_gradient_is_the_bounded_weight_even_where_clipped() -> None:
    inputs = make_inputs(seed=1, spread=1.0)
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    weight = ratio.clamp(0.8, 1.3)
    clipped = (ratio < 0.8) | (ratio > 1.3)
    assert clipped.any() and not clipped.all()
    grad = gradient(inputs, Grpo(loss="cispo"))
    assert torch.equal(grad, -weight * inputs.advantages)
    assert (grad[clipped] != 0).all()
    sums = ob.policy_loss(inputs, Grpo(loss="cispo")).sums
    assert sums["clip_fraction"].item() == clipped.sum().item()


def test_sapo_teaches_less_the_further_the_ratio_is_from_one() -> None:
    """Slope sech^2(t (r - 1) / 2) of the gate, times r for the log ratio (arXiv 2511.20347)."""
    inputs = make_inputs(seed=4, spread=1.0)
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    tau = torch.where(inputs.advantages > 0, 2.0, 3.0).double()
    expected = -inputs.advantages * ratio / torch.cosh(tau * (ratio - 1) / 2) ** 2
    assert torch.allclose(gradient(inputs, Grpo(loss="sapo", sapo_temperatures=(2.0, 3.0))), expected)


def test_dppo_stops_only_what_moved_far_and_away() -> None:
    """Of (old, new) probabilities: by 0.2 up where it is good and by 0.1 down where it is bad."""
    moves = [(0.3, 0.55), (0.3, 0.45), (0.55, 0.3), (0.3, 0.1), (0.3, 0.25), (0.1, 0.4), (1e-6, 1e-3)]
    signs = [1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0]
    learns = [False, True, True, False, True, True, True]
    old, new = torch.tensor(moves, dtype=torch.float64).log().T
    inputs = ob.LossInputs(
        logprobs=new, old_logprobs=old, advantages=torch.tensor(signs).double(), sequence=torch.arange(7)
    )
    chosen = Grpo(loss="dppo", clip_low=0.1, clip_high=0.2)
    weight = torch.minimum((new - old).exp(), torch.tensor(20.0).double()) * torch.tensor(learns)
    assert torch.allclose(gradient(inputs, chosen), -weight * inputs.advantages)
    assert ob.policy_loss(inputs, chosen).sums["clip_fraction"].item() == 2


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_gradient_is_reinforce(loss: Any) -> None:
    inputs = make_inputs()
    inputs = replace(inputs, old_logprobs=inputs.logprobs.clone())
    for chosen in (Grpo(loss=loss), Grpo(loss=loss, clip_low=0.0, clip_high=0.0)):
        grad = gradient(inputs, chosen)
        assert torch.allclose(grad, -inputs.advantages, rtol=1e-14, atol=0)
        assert ob.policy_loss(inputs, chosen).sums["clip_fraction"].item() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_flat_group_gives_exactly_no_gradient(loss: Any) -> None:
    inputs = make_inputs(spread=300.0)  # ratios that overflow float32 and would make 0 * inf
    flat = replace(
        inputs,
        logprobs=inputs.logprobs.float(),
        old_logprobs=inputs.old_logprobs.float(),
        advantages=torch.zeros(12),
    )
    assert torch.equal(gradient(flat, Grpo(loss=loss)), torch.zeros(12))


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "loss", "learns"),
    [
        (1.2, 1.0, 3.0, -1.2, True),
        (1.5, 1.0, 3.0, -1.3, False),  # high
        (0.5, 1.0, 3.0, -0.5, True),  # a falling good token is never clipped
        (0.9, -1.0, 3.0, 0.9, True),
        (0.5, -1.0, 3.0, 0.8, False),  # low
        (2.9, -1.0, 3.0, 2.9, True),  # a rising bad token is punished in full ...
        (5.0, -1.0, 3.0, 3.0, False),  # ... up to the dual bound
        (5.0, -1.0, None, 5.0, True),
        (5.0, 1.0, None, -1.3, False),
        (5.0, 0.0, 3.0, 0.0, False),
    ],
)
def test_clip_cases(ratio: float, advantage: float, dual: float | None, loss: float, learns: bool) -> None:
    inputs = ob.LossInputs(
        logprobs=torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64),
        old_logprobs=torch.tensor([-1.0], dtype=torch.float64),
        advantages=torch.tensor([advantage], dtype=torch.float64),
        sequence=torch.tensor([0]),
    )
    chosen = Grpo(clip_dual=dual)
    got = ob.policy_loss(inputs, chosen)
    assert got.loss.item() == pytest.approx(loss)
    assert (gradient(inputs, chosen).item() != 0) == learns
    assert got.sums["clip_fraction"].item() == (not learns and advantage != 0)
    assert got.maxima["ratio_max"].item() == pytest.approx(ratio)


def test_gspo_by_hand() -> None:
    inputs = ob.LossInputs(
        logprobs=torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64),
        old_logprobs=torch.tensor([-1.2, -2.1, -0.1], dtype=torch.float64),
        advantages=torch.tensor([2.0, 2.0, -1.0], dtype=torch.float64),
        sequence=torch.tensor([0, 0, 1]),
    )
    chosen = Grpo(loss="gspo", loss_average="sequence", clip_dual=None)
    first, second = math.exp((0.2 + 0.1) / 2), 0.8  # exp(-0.4) = 0.67 is held at 1 - 0.2
    got = ob.policy_loss(inputs, chosen)
    assert got.loss.item() == pytest.approx(-first * 2.0 + second)
    expected = torch.tensor([-first * 2.0 / 2, -first * 2.0 / 2, 0.0], dtype=torch.float64)
    assert torch.allclose(gradient(inputs, chosen), expected)
    assert got.sums["clip_fraction"].item() == 1
    assert got.maxima["ratio_max"].item() == pytest.approx(first)


def test_each_bound_changes_the_loss() -> None:
    inputs = make_inputs((8,) * 4, seed=2, spread=1.5)
    base = Grpo()
    losses = {
        ob.policy_loss(inputs, s).loss.item()
        for s in (
            base,
            base.model_copy(update={"clip_low": 0.4}),
            base.model_copy(update={"clip_high": 0.5}),
            base.model_copy(update={"clip_dual": 1.2}),
            base.model_copy(update={"clip_dual": None}),
            base.model_copy(update={"kl": Kl(kind="k3", coefficient=0.1)}),
            base.model_copy(update={"kl": Kl(kind="k2", coefficient=0.1)}),
            base.model_copy(update={"kl": Kl(kind="k1", coefficient=0.1)}),
            base.model_copy(update={"loss": "cispo"}),
            base.model_copy(update={"loss": "gspo"}),
            base.model_copy(update={"loss": "dppo"}),
            base.model_copy(update={"loss": "sapo"}),
            base.model_copy(update={"loss": "sapo", "sapo_temperatures": (2.0, 1.05)}),
        )
    }
    assert len(losses) == 13


def test_kl_estimators() -> None:
    new = torch.tensor([-1.0, -1.0, -30.0], dtype=torch.float64)
    ref = torch.tensor([-1.5, -1.0, -1.0], dtype=torch.float64)
    assert ob.kl_estimate(new, ref, "k1").tolist() == pytest.approx([0.5, 0.0, -29.0])
    assert ob.kl_estimate(new, ref, "k2").tolist() == pytest.approx([0.125, 0.0, 420.5])
    assert ob.kl_estimate(new, ref, "k3").tolist() == pytest.approx([math.exp(-0.5) - 0.5, 0.0, 10.0])


def test_k3_is_unbiased_for_the_true_divergence() -> None:
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    true = (policy * (policy / reference).log()).sum()
    for kind in ("k1", "k3"):
        estimates = ob.kl_estimate(policy.log(), reference.log(), kind)
        assert torch.allclose((policy * estimates).sum(), true)


def test_kl_is_reported_without_a_penalty_and_required_with_one() -> None:
    inputs = make_inputs()
    plain = ob.policy_loss(inputs, Grpo())
    assert plain.sums["kl"].item() == pytest.approx(
        ob.kl_estimate(inputs.logprobs, inputs.ref_logprobs, "k3").sum().item()
    )
    without = replace(inputs, ref_logprobs=None)
    assert "kl" not in ob.policy_loss(without, Grpo()).sums
    with pytest.raises(ValueError, match="reference"):
        ob.policy_loss(without, Grpo(kl=Kl(kind="k3", coefficient=0.1)))


def test_old_kl_measures_the_move_since_sampling() -> None:
    inputs = make_inputs()
    d = inputs.logprobs - inputs.old_logprobs
    got = ob.policy_loss(inputs, Grpo()).sums["old_kl"]
    assert got.item() == pytest.approx((d.exp() - 1 - d).sum().item())


def test_a_penalty_of_coefficient_zero_is_none() -> None:
    inputs, idle = make_inputs(), Grpo(kl=Kl(kind="k2", coefficient=0.0))
    assert torch.equal(ob.policy_loss(inputs, idle).loss, ob.policy_loss(inputs, Grpo()).loss)
    assert "kl" not in ob.policy_loss(replace(inputs, ref_logprobs=None), idle).sums


def test_shapes_that_would_broadcast_are_refused() -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match="flat"):
        replace(inputs, advantages=inputs.advantages[:1])
    with pytest.raises(ValueError, match="flat"):
        replace(inputs, ref_logprobs=inputs.ref_logprobs[:, None])
    with pytest.raises(ValueError, match="flat"):
        ob.sft_loss(inputs.logprobs, torch.ones(1), inputs.sequence, "token")


def test_empty_pack_adds_nothing() -> None:
    nothing = torch.zeros(0, requires_grad=True)
    inputs = ob.LossInputs(
        logprobs=nothing, old_logprobs=nothing, advantages=nothing, sequence=torch.zeros(0, dtype=torch.long)
    )
    for average in AVERAGES:
        got = ob.policy_loss(inputs, Grpo(loss_average=average))  # type: ignore[arg-type]
        got.loss.backward()
        assert got.loss.item() == got.maxima["ratio_max"].item() == got.sequences.item() == 0
    assert ob.denominator("token", tokens=0, sequences=0) == 1.0


def plainly_masked(inputs: ob.LossInputs, base: Tensor, most: float) -> list[bool]:
    """DeepSeek-V3.2's M = 0, token by token, from the sampler's logprobs `base`."""
    new, far, advantage = inputs.logprobs.tolist(), base.tolist(), inputs.advantages.tolist()
    answers = inputs.sequence.tolist()
    moved = {
        answer: statistics.mean(far[t] - new[t] for t in range(len(new)) if answers[t] == answer)
        for answer in set(answers)
    }
    return [advantage[t] < 0 and moved[answers[t]] > most for t in range(len(new))]


@pytest.mark.parametrize("by_sampler", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_answers_that_are_worse_and_far_from_the_sampler_are_left_out(loss: Any, by_sampler: bool) -> None:
    inputs = make_inputs((2, 4, 2, 6, 2, 6), seed=5)
    shift = torch.tensor([0.9, 0.9, 0.0, 0.01, 0.3, -0.9], dtype=torch.float64)[inputs.sequence]
    jitter = torch.tensor([1.0, -1.0] * 11, dtype=torch.float64)  # of mean 0 in each answer
    base = inputs.logprobs + shift + jitter
    now = inputs.logprobs.clone()
    given = {"sampler_logprobs": base, "old_logprobs": now} if by_sampler else {"old_logprobs": base}
    inputs = replace(inputs, **given)
    masked = torch.tensor(plainly_masked(inputs, base, 0.05))
    assert masked.tolist() == [answer == 1 for answer in inputs.sequence.tolist()]
    wide = {"clip_low": 9.0, "clip_high": 9.0, "clip_dual": None}  # the clip alone leaves nothing out
    chosen = Grpo(loss=loss, mismatch_mask=0.05, kl=Kl(kind="k3", coefficient=0.1), **wide)
    got = ob.policy_loss(inputs, chosen)
    assert got.sums["masked_share"].item() == 4
    assert (got.tokens.item(), got.sequences.item()) == (22, 6), "they still count in the divisor"
    # What is left out has the loss of an answer without an advantage: none but its KL penalty.
    without = replace(inputs, advantages=inputs.advantages.masked_fill(masked, 0.0))
    plain = chosen.model_copy(update={"mismatch_mask": None})
    assert got.loss.item() == pytest.approx(slow_loss(without, plain), rel=1e-12)
    assert torch.allclose(gradient(inputs, chosen), gradient(without, plain), rtol=1e-12, atol=0)
    assert not torch.allclose(gradient(inputs, chosen), gradient(inputs, plain))


# --- averages and splits ------------------------------------------------------------------------


def take(inputs: ob.LossInputs, members: list[int]) -> tuple[ob.LossInputs, Tensor]:
    """The pack of some sequences, in that order, and where its tokens were."""
    where = torch.cat([(inputs.sequence == m).nonzero()[:, 0] for m in members])
    lengths = torch.tensor([int((inputs.sequence == m).sum()) for m in members])
    part = ob.LossInputs(
        logprobs=inputs.logprobs[where],
        old_logprobs=inputs.old_logprobs[where],
        advantages=inputs.advantages[where],
        sequence=torch.repeat_interleave(torch.arange(len(members)), lengths),
        ref_logprobs=inputs.ref_logprobs[where],
    )
    return part, where


def over_packs(
    inputs: ob.LossInputs, packs: list[list[int]], chosen: Grpo
) -> tuple[float, Tensor, dict[str, float]]:
    """Average loss, gradient and sums of a step whose sequences lie in `packs`, as a trainer does it."""
    leaf = inputs.logprobs.clone().requires_grad_()
    parts = [ob.policy_loss(take(replace(inputs, logprobs=leaf), p)[0], chosen) for p in packs]
    divisor = ob.denominator(
        chosen.loss_average,
        tokens=sum(int(p.tokens) for p in parts),
        sequences=sum(int(p.sequences) for p in parts),
        packs=len(parts),
        max_new_tokens=chosen.max_new_tokens,
    )
    loss = torch.stack([p.loss for p in parts]).sum() / divisor
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.item(), grad, {k: sum(float(p.sums[k]) for p in parts) for k in parts[0].sums}


@st.composite
def splits(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]]]:
    """Sequence lengths, and the sequences dealt into packs in any order."""
    lengths = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=7)))
    order = draw(st.permutations(range(len(lengths))))
    cuts = sorted(draw(st.sets(st.integers(1, max(len(lengths) - 1, 1)))) | {0, len(lengths)})
    return lengths, [order[a:b] for a, b in pairwise(cuts) if a < b]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    split=splits(),
    loss=st.sampled_from(LOSSES),
    average=st.sampled_from(["token", "sequence", "constant"]),
    seed=st.integers(0, 1000),
)
def test_no_split_over_packs_changes_anything(split: Any, loss: Any, average: Any, seed: int) -> None:
    lengths, packs = split
    inputs = make_inputs(lengths, seed)
    chosen = Grpo(
        loss=loss,
        loss_average=average,
        kl=Kl(kind="k3", coefficient=0.1),
        max_new_tokens=9,
        mismatch_mask=0.1 if seed % 2 else None,
    )
    whole = over_packs(inputs, [list(range(len(lengths)))], chosen)
    parts = over_packs(inputs, packs, chosen)
    assert parts[0] == pytest.approx(whole[0], rel=1e-10, abs=1e-12)
    assert torch.allclose(parts[1], whole[1], rtol=1e-10, atol=1e-14)
    assert parts[2] == pytest.approx(whole[2], rel=1e-10, abs=1e-12)


def test_micro_batch_mean_depends_on_the_split() -> None:
    chosen = Grpo(loss_average="micro_batch")
    inputs = make_inputs()
    whole, _, _ = over_packs(inputs, [[0, 1, 2, 3]], chosen)
    parts, _, _ = over_packs(inputs, [[0], [1, 2, 3]], chosen)
    token, _, _ = over_packs(inputs, [[0, 1, 2, 3]], chosen.model_copy(update={"loss_average": "token"}))
    assert whole == pytest.approx(token)
    assert parts != pytest.approx(whole)
    means = [slow_loss(take(inputs, p)[0], chosen) for p in ([0], [1, 2, 3])]
    assert parts == pytest.approx(sum(means) / 2)


def test_denominators() -> None:
    counts = {"tokens": 100, "sequences": 8, "packs": 3, "max_new_tokens": 50}
    expected = {"token": 100.0, "sequence": 8.0, "example": 8.0, "constant": 400.0, "micro_batch": 3.0}
    assert {kind: ob.denominator(kind, **counts) for kind in expected} == expected  # type: ignore[arg-type]


# --- SFT ----------------------------------------------------------------------------------------


def test_sft_token_and_example_means() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.0, -8.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    sequence = torch.tensor([0, 0, 0, 1])
    token = ob.sft_loss(logprobs, weights, sequence, "token")
    assert (token.loss.item(), token.tokens.item(), token.sequences.item()) == (11.0, 3, 2)
    example = ob.sft_loss(logprobs, weights, sequence, "example")
    assert example.loss.item() == pytest.approx(1.5 + 8.0)
    assert ob.denominator("example", tokens=3, sequences=2) == 2.0


@pytest.mark.parametrize("average", ["token", "example"])
def test_sft_gradient(average: Any) -> None:
    inputs = make_inputs()
    leaf = inputs.logprobs.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ob.sft_loss(x, inputs.advantages, inputs.sequence, average).loss, (leaf,)
    )


def test_sft_is_the_on_policy_loss_with_advantage_one() -> None:
    inputs = replace(make_inputs(), advantages=torch.ones(12, dtype=torch.float64))
    inputs = replace(inputs, old_logprobs=inputs.logprobs.clone())
    leaf = inputs.logprobs.clone().requires_grad_()
    ob.sft_loss(leaf, torch.ones(12, dtype=torch.float64), inputs.sequence, "token").loss.backward()
    assert torch.equal(leaf.grad, gradient(inputs, Grpo()))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("average", AVERAGES)
def test_truncated_importance_weighs_each_token_and_not_its_kl(loss: Any, average: Any) -> None:
    inputs = make_inputs()
    rng = torch.Generator().manual_seed(7)
    sampler = inputs.old_logprobs + 0.8 * torch.randn(
        len(inputs.sequence), generator=rng, dtype=torch.float64
    )
    weights = [
        min(math.exp(old - other), 2.0)
        for old, other in zip(inputs.old_logprobs.tolist(), sampler.tolist(), strict=True)
    ]
    assert min(weights) < 0.8 and weights.count(2.0) >= 1, "some weights are cut"
    importance = ob.truncated_importance(inputs.old_logprobs, sampler, 2.0)
    assert importance.tolist() == pytest.approx(weights)
    # An advantage enters every policy loss as a factor, so a weight must be the same as a larger advantage.
    chosen = Grpo(
        loss=loss,
        loss_average=average,
        clip_low=9.0,
        clip_high=9.0,
        clip_dual=None,
        kl=Kl(kind="k3", coefficient=0.3),
    )
    weighted = replace(inputs, importance=importance)
    scaled = replace(inputs, advantages=inputs.advantages * importance)
    assert ob.policy_loss(weighted, chosen).loss.item() == pytest.approx(
        ob.policy_loss(scaled, chosen).loss.item()
    )
    assert ob.policy_loss(weighted, chosen).sums["importance"].item() == pytest.approx(sum(weights))
    assert ob.policy_loss(weighted, chosen).loss.item() != pytest.approx(
        ob.policy_loss(inputs, chosen).loss.item()
    )


def test_importance_weights_carry_no_gradient_and_no_infinity() -> None:
    old = torch.tensor([-1.0, -80.0], requires_grad=True)
    weights = ob.truncated_importance(old, torch.tensor([-90.0, -1.0]), 5.0)
    assert not weights.requires_grad and weights[0] == 5.0 and 0 < weights[1] < 1e-8
