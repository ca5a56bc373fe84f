"""Advantages and losses as pure functions, each with its paper and equation.

Group functions take plain floats, as the records hold them. Token losses take flat tensors of one
pack and return *sums*: the trainer alone divides, by `denominator` of the whole optimiser step, so
that a loss does not depend on how its sequences were split over packs.

Letters in shapes: N tokens of the pack that carry a loss, S sequences (branches) among them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlcs.recipe.objectives import Entropy, Sight
from rlcs.recipe.stages import Advantage, Grpo, KlKind

Average = Literal["token", "sequence", "example", "constant", "micro_batch"]
"""`example` is the name of `sequence` in SFT."""

STD_EPSILON = 1e-6
"""Added to a group's standard deviation, as in the code that the paper ran (EasyR1)."""
ZERO_VARIANCE_TOLERANCE = 1e-9
"""Rewards that differ by no more than this count as equal, because rounding alone can cause it."""
MAX_LOG_RATIO = 20.0
"""Bound of log ratios before `exp`: infinity times an advantage of zero would be NaN."""
MAX_DPPO_RATIO = 20.0
"""Bound of the ratio as a weight in DPPO, as in its authors' code (20 in verl's `dppo_tv`)."""
MAX_K3 = 10.0
"""Bound of k3, as in the paper's code: [-10, 10]; the lower one never applies, as k3 is not negative."""


def has_zero_variance(rewards: Sequence[float | None]) -> bool:
    """Whether a group has no gradient: all scored rewards are equal, or fewer than two are there."""
    scored = [r for r in rewards if r is not None]
    return len(scored) < 2 or max(scored) - min(scored) <= ZERO_VARIANCE_TOLERANCE


def advantages(rewards: Sequence[float | None], kind: Advantage, *, k: int = 1) -> tuple[float | None, ...]:
    """The advantage of each member of a group; None (unscored) stays None and enters no mean.

    With mean and (unbiased) standard deviation over the n scored members:

    - `grpo`: A_i = (r_i - mean) / (std + 1e-6), arXiv 2402.03300, section 4.1.2;
    - `dr_grpo`: A_i = r_i - mean, arXiv 2503.20783, section 3.2;
    - `rloo`: A_i = r_i - mean of the others = n / (n - 1) * (r_i - mean), arXiv 2402.14740;
    - `pass_k`: of sets of `k` answers that count as their best one, see `pass_k_advantages`.

    With fewer than two scored members all are None. Equal rewards give exact zeros, without rounding errors.
    """
    scored = [r for r in rewards if r is not None]
    if len(scored) < 2:
        return tuple(None for _ in rewards)
    if has_zero_variance(rewards):
        return tuple(None if r is None else 0.0 for r in rewards)
    if kind == "pass_k":
        of_scored = iter(pass_k_advantages(scored, k))
        return tuple(None if r is None else next(of_scored) for r in rewards)
    count = len(scored)
    mean = math.fsum(scored) / count
    if kind == "grpo":
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in scored) / (count - 1))
        scale = 1.0 / (std + STD_EPSILON)
    elif kind == "dr_grpo":
        scale = 1.0
    elif kind == "rloo":
        scale = count / (count - 1)
    else:
        raise ValueError(f"advantage {kind!r} is none of grpo, dr_grpo, rloo, pass_k")
    return tuple(None if r is None else (r - mean) * scale for r in rewards)


def pass_k_advantages(rewards: Sequence[float], k: int) -> tuple[float, ...]:
    """The advantage of each answer where a set of `k` answers is worth what its best one is.

    Pass@k training (arXiv 2508.10751, section 2.3): of all sets of k among the n answers, the mean of
    (best reward - mean) / std over those that an answer is in. For rewards of 0 and 1 this is the paper's
    closed form; sorted rewards give it for any, since the number of sets with a given best answer is a
    binomial. A group of fewer than k answers counts as one set, of all of them: nothing to prefer.
    """
    count, k = len(rewards), min(k, len(rewards))
    order = sorted(range(count), key=lambda index: rewards[index])
    ranked = [rewards[index] for index in order]
    sets, with_one = math.comb(count, k), math.comb(count - 1, k - 1)
    shares = [math.comb(rank, k - 1) / sets for rank in range(count)]
    mean = math.fsum(share * best for share, best in zip(shares, ranked, strict=True))
    squares = math.fsum(share * (best - mean) ** 2 for share, best in zip(shares, ranked, strict=True))
    scale = 1.0 / (math.sqrt(squares) + STD_EPSILON)
    found = [0.0] * count
    beyond = 0.0
    for rank in reversed(range(count)):
        own = math.comb(rank, k - 1) * (ranked[rank] - mean)
        found[order[rank]] = (own + beyond) / with_one * scale
        if k > 1 and rank:
            beyond += math.comb(rank - 1, k - 2) * (ranked[rank] - mean)
    return tuple(found)


def overlong_penalty(length: int, limit: int, buffer: int, penalty: float) -> float:
    """The penalty to add to the reward of an answer of `length` tokens: 0 or negative.

    DAPO, arXiv 2503.14476, eq. 13: 0 up to `limit - buffer`, then linearly down to `-penalty` at
    `limit`, and `-penalty` beyond. A buffer of 0 switches it off.
    """
    if buffer == 0:
        return 0.0
    excess = min(max(length - (limit - buffer), 0), buffer)
    return -penalty * excess / buffer if excess else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """One pack's tokens, all flat (N,): `logprobs` with gradient, the rest without.

    `sequence` is the index 0..S-1 of the branch that each token belongs to; a branch is never
    split over packs. With one optimiser step a rollout, `old_logprobs` is `logprobs.detach()`.
    `importance` weighs the policy term of each token (see `truncated_importance`); None: all alike.
    `router_loss` is added to each token's loss, if there is one; `entropy_bonus` (with gradient) is taken off
    it. `sampler_logprobs` are those of the engine, for `grpo.mismatch_mask`. `held` says which tokens entropy
    control holds; None: none.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    sequence: Tensor
    ref_logprobs: Tensor | None = None
    importance: Tensor | None = None
    router_loss: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    held: Tensor | None = None
    entropy_bonus: Tensor | None = None

    def __post_init__(self) -> None:
        """Require one value a token in each tensor: broadcasting would hide a mistake."""
        optional = [self.ref_logprobs, self.importance, self.router_loss, self.sampler_logprobs]
        optional += [self.held, self.entropy_bonus]
        given = [tensor for tensor in optional if tensor is not None]
        _require_flat(self.logprobs, self.old_logprobs, self.advantages, self.sequence, *given)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSums:
    """The sums of one pack over its tokens; scalars on the pack's device, so that nothing waits for a GPU.

    `loss` has the gradient and is divided by `denominator`; `tokens` and `sequences` are the counts
    that enter it; `sums` (the report divides them by all targets of the step)
    and `maxima` are for the report. `extra`: the loss comes on top of the step's, with a divisor of its own,
    so that the pack is in no count; of its `sums`, which are divided already, the report has the totals.
    """

    loss: Tensor
    tokens: Tensor
    sequences: Tensor
    sums: Mapping[str, Tensor]
    maxima: Mapping[str, Tensor]
    extra: bool = False


def denominator(
    kind: Average, *, tokens: int, sequences: int, packs: int = 1, max_new_tokens: int = 1
) -> float:
    """The divisor of the summed loss of a whole optimiser step, over all packs and ranks.

    `token`: the global token mean (DAPO, arXiv 2503.14476, eq. 12); `sequence` / `example`: mean of
    each sequence's mean (GRPO, arXiv 2402.03300, eq. 3); `constant`: sequences times
    `max_new_tokens`, so that length is neither rewarded nor punished (Dr. GRPO, arXiv 2503.20783, section
    3.2); `micro_batch`: mean of each pack's token mean (the paper's code). At least 1.
    """
    by_kind = {"token": tokens, "sequence": sequences, "example": sequences, "micro_batch": packs}
    by_kind["constant"] = sequences * max_new_tokens
    if kind not in by_kind:
        raise ValueError(f"average {kind!r} is none of {', '.join(by_kind)}")
    return float(max(by_kind[kind], 1))


def policy_loss(inputs: LossInputs, settings: Grpo) -> LossSums:
    """The policy-gradient loss of one pack, with its KL penalty, as sums.

    Reported sums: `clip_fraction` (tokens that a bound holds: low, high or dual), `old_kl` (how far
    the policy moved from the sampling policy, k3 of new against old), `importance` where there are
    such weights, `router_loss` where there is one, `masked_share` (tokens of answers that are left out, see
    `far_and_worse`) and `held_share` (tokens that entropy control holds) where these are on, and with
    reference logprobs `kl`. Reported maximum: `ratio_max`, the largest importance ratio (a whole sequence's
    for gspo).
    """
    kl = settings.kl
    if kl.active and inputs.ref_logprobs is None:
        raise ValueError(f"a {kl.kind} penalty needs reference logprobs")
    log_ratio = (inputs.logprobs - inputs.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    moved = log_ratio.detach()
    sums = {"old_kl": (moved.exp() - 1.0 - moved).sum()}
    of_sequence = settings.loss == "gspo"
    ratio = (_sequence_mean(log_ratio, inputs.sequence) if of_sequence else log_ratio).exp()
    per_token, held = _surrogate(ratio, inputs, settings)
    sums["clip_fraction"] = held.sum()
    if settings.mismatch_mask is not None:
        left_out = far_and_worse(inputs, settings.mismatch_mask)
        per_token = per_token.masked_fill(left_out, 0.0)
        sums["masked_share"] = left_out.sum()
    if inputs.importance is not None:
        per_token = per_token * inputs.importance
        sums["importance"] = inputs.importance.sum()
    per_token = _with_entropy_control(per_token, log_ratio, inputs, settings.entropy)
    if settings.entropy.holds_tokens:
        sums["held_share"] = moved.new_zeros(()) if inputs.held is None else inputs.held.sum()
    if inputs.ref_logprobs is not None:
        penalty = kl_estimate(inputs.logprobs, inputs.ref_logprobs, kl.kind if kl.active else "k3")
        sums["kl"] = penalty.detach().sum()
        if kl.active:
            per_token = per_token + kl.coefficient * penalty
    if inputs.router_loss is not None:
        per_token = per_token + inputs.router_loss
        sums["router_loss"] = inputs.router_loss.detach().sum()
    counted = torch.ones_like(inputs.sequence)
    largest = ratio.detach().max() if ratio.numel() else ratio.new_zeros(())
    return _summed(per_token, counted, inputs.sequence, settings.loss_average, sums, {"ratio_max": largest})


def truncated_importance(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling: weights (N,) that correct for an engine's own probabilities.

    min(pi_old(token) / pi_sampler(token), cap), a constant factor of the token's term (Yao and others,
    "Your efficient RL framework secretly brings you off-policy RL training", 2025,
    https://fengyao.notion.site/off-policy-rl): rollout engines compute the same weights with other kernels
    and precision. The cap bounds the variance. All of `old_logprobs` and `sampler_logprobs` are (N,).
    """
    log_ratio = (old_logprobs - sampler_logprobs).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp().clamp(max=cap)


def far_and_worse(inputs: LossInputs, most: float) -> Tensor:
    """Where (N,) an answer is left out: its advantage is negative, and the policy has moved far away from it.

    DeepSeek-V3.2 (arXiv 2512.02556, section 3.1, off-policy sequence masking): M = 0 where A < 0 and
    1 / |o| sum_t log(pi_old(o_t) / pi(o_t)) > delta, else 1, as a factor of the policy term; pi_old is what
    the engine returned, so that its own kernels count as well as old weights. What is left out still counts
    in the divisor, as there, and still has its KL penalty. A branch is never split over packs, so the mean is
    that of the whole answer.
    """
    base = inputs.old_logprobs if inputs.sampler_logprobs is None else inputs.sampler_logprobs
    moved = _sequence_mean((base - inputs.logprobs).detach(), inputs.sequence)
    return (inputs.advantages < 0) & (moved > most)


def _with_entropy_control(
    per_token: Tensor, log_ratio: Tensor, inputs: LossInputs, entropy: Entropy
) -> Tensor:
    """The loss (N,) of each token with what entropy control changes (`train.entropy` chooses and weighs it).

    Clip-Cov (arXiv 2505.22617): a held token has no loss. KL-Cov: its loss is more by coefficient * |log r|,
    without importance weight; the paper's loss besides, -r A, has no clip (see docs/reference/losses.md).
    The bonus (arXiv 2505.22312): weight * entropy less.
    """
    if inputs.held is not None and entropy.control == "clip_cov":
        per_token = per_token.masked_fill(inputs.held, 0.0)
    if inputs.held is not None and entropy.control == "kl_cov":
        per_token = per_token + entropy.coefficient * log_ratio.abs() * inputs.held
    return per_token if inputs.entropy_bonus is None else per_token - inputs.entropy_bonus


def _surrogate(ratio: Tensor, inputs: LossInputs, settings: Grpo) -> tuple[Tensor, Tensor]:
    """The loss (N,) of each token's ratio (N,) and advantage, and where (N,) a bound holds it.

    `grpo` and `gspo`: -min(r A, clip(r, 1 - low, 1 + high) A) (GRPO, arXiv 2402.03300, eq. 3; low
    and high apart: DAPO, arXiv 2503.14476, eq. 10) only ever bounds r from above where A > 0 and
    from below where A < 0. There the dual clip max(that, c A) (arXiv 1912.09729, eq. 5) bounds it
    from above too. A bounded ratio has no gradient. GSPO (arXiv 2507.18071, eq. 5-7) bounds the
    sequence's ratio, exp of the mean log ratio; its authors' bounds are far tighter (3e-4, 4e-4).

    `cispo` (MiniMax-M1, arXiv 2506.13585, eq. 4-5): clip(r, 1 - low, 1 + high) whatever the sign,
    as a constant weight of -A log p: a clipped token still teaches. No dual clip.

    `sapo` (arXiv 2511.20347): a soft gate instead of a bound, -(4 / t) sigmoid(t (r - 1)) A, with a
    temperature t for A > 0 and one for the rest. Its slope is 1 at r = 1 and falls to 0 on both sides.

    `dppo` (binary total variation, arXiv 2602.04879): -min(r, 20) A log p with a constant weight, and
    none where the token's probability has moved by more than a bound: up by `clip_high` where A > 0,
    down by `clip_low` where A < 0. A ratio says little of rare tokens, whose ratios are wild.
    """
    advantage = inputs.advantages
    low, high = 1.0 - settings.clip_low, 1.0 + settings.clip_high
    if settings.loss == "sapo":
        rising, falling = settings.sapo_temperatures
        temperature = torch.full_like(ratio, falling).masked_fill(advantage > 0, rising)
        gate = torch.sigmoid(temperature * (ratio - 1.0)) * (4.0 / temperature)
        return -gate * advantage, torch.zeros_like(advantage, dtype=torch.bool)
    if settings.loss == "dppo":
        moved = (inputs.logprobs.exp() - inputs.old_logprobs.exp()).detach()
        held = ((advantage > 0) & (moved > settings.clip_high)) | (
            (advantage < 0) & (moved < -settings.clip_low)
        )
        weight = ratio.detach().clamp(max=MAX_DPPO_RATIO).masked_fill(held, 0.0)
        return -weight * advantage * inputs.logprobs, held
    # Chosen by comparison: the gradient of `clamp` is zero at the bound itself.
    below, above = ratio < low, ratio > high
    if settings.loss == "cispo":
        bounded = ratio.masked_fill(below, low).masked_fill(above, high)
        return -bounded.detach() * advantage * inputs.logprobs, below | above
    dual = math.inf if settings.clip_dual is None else settings.clip_dual
    below, above = below & (advantage < 0), above & (advantage > 0)
    punished = (ratio > dual) & (advantage < 0)
    bounded = ratio.masked_fill(below, low).masked_fill(above, high).masked_fill(punished, dual)
    return -bounded * advantage, below | above | punished


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KlKind) -> Tensor:
    """KL(policy || reference) from sampled tokens, one estimate (N,) a token.

    http://joschu.net/blog/kl-approx.html with d = ref - policy: k1 = -d; k2 = d^2 / 2; k3 =
    exp(d) - d - 1 (GRPO, arXiv 2402.03300, eq. 4), held at 10 as in the paper's code, with no
    gradient beyond. As a loss, k1 has a gradient of zero on average: it measures, k2 and k3 pull.
    """
    difference = ref_logprobs - logprobs
    if kind == "k1":
        return -difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return (difference.exp() - difference - 1.0).clamp(max=MAX_K3)
    raise ValueError(f"KL estimator {kind!r} is none of k1, k2, k3")


def sft_loss(
    logprobs: Tensor,
    weights: Tensor,
    sequence: Tensor,
    average: Average,
    router_loss: Tensor | None = None,
) -> LossSums:
    """Negative log likelihood of one pack, all (N,): the sum of -weight * logprob.

    `token` gives the mean over all tokens of the step, `example` the mean of each response's mean.
    Tokens of weight 0 are not learnt and not counted. `router_loss` is added to the loss of all others.
    """
    _require_flat(logprobs, weights, sequence, *([] if router_loss is None else [router_loss]))
    counted, per_token, sums = (weights != 0).long(), -weights * logprobs, dict[str, Tensor]()
    if router_loss is not None:
        per_token = per_token + router_loss * counted
        sums["router_loss"] = router_loss.detach().sum()
    return _summed(per_token, counted, sequence, average, sums, {})


def sight_loss(
    logprobs: Tensor, masked: Tensor, pictured: Tensor, sequence: Tensor, *, settings: Sight, average: Average
) -> LossSums:
    """What PAPO (arXiv 2507.06448, section 3.2) adds to the policy loss of one pack, all tensors (N,).

    `masked` are logprobs of the same tokens by the same policy where it sees masked images. The divergence
    KL(seeing || masked), by k3 on the sampled tokens, is made larger; it is held at 10, as in the authors'
    code, so that it cannot grow without bound. The double entropy loss makes the entropies of both smaller,
    which are estimated by -logprob, as there. Tokens of trees without an image (`pictured` 0) get nothing.
    Reported: `sight`, the sum of the divergence.
    """
    _require_flat(logprobs, masked, pictured, sequence)
    divergence = kl_estimate(logprobs, masked, "k3") * pictured
    entropies = -(logprobs + masked) * pictured
    per_token = settings.entropy_coefficient * entropies - settings.coefficient * divergence
    sums = {"sight": divergence.detach().sum()}
    return _summed(per_token, torch.ones_like(sequence), sequence, average, sums, {})


def _summed(
    per_token: Tensor,
    counted: Tensor,
    sequence: Tensor,
    average: Average,
    sums: Mapping[str, Tensor],
    maxima: Mapping[str, Tensor],
) -> LossSums:
    """Add up a per-token loss (N,) so that `denominator` of the same kind makes it the average.

    `counted` (N,) is 1 for tokens that count and 0 for others. Indices in `sequence` are below N
    because every sequence has a token, so N counters serve without asking the device for S.
    """
    lengths = torch.zeros_like(sequence).index_add(0, sequence, counted)
    tokens = counted.sum()
    if average in ("sequence", "example"):
        per_token = per_token / lengths.clamp(min=1)[sequence]
    loss = per_token.sum()
    if average == "micro_batch":
        loss = loss / tokens.clamp(min=1)
    return LossSums(loss=loss, tokens=tokens, sequences=(lengths > 0).sum(), sums=sums, maxima=maxima)


def _sequence_mean(values: Tensor, sequence: Tensor) -> Tensor:
    """Each token's (N,) mean over its own sequence, gradient included."""
    totals = torch.zeros_like(values).index_add(0, sequence, values)
    lengths = torch.zeros_like(sequence).index_add(0, sequence, torch.ones_like(sequence))
    return totals[sequence] / lengths[sequence]


def _require_flat(first: Tensor, *others: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (first, *others)]
    if first.dim() != 1 or len(set(shapes)) != 1:
        raise ValueError(f"token tensors must be flat and of one length, not {shapes}")
