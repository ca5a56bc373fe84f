"""Choosing tokens: counter-based randomness, temperature, top-p, banned ids.

Row r's t-th token is drawn with a number that depends on (seed of r, t) alone, so a rollout does
not depend on its neighbours, on the order of work, or on how many workers there are.
Letters in shapes: B logits, M draws by each, V vocabulary.
"""

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """Numbers in [0, 1) in float64 from 64-bit seeds and counters, of the same shape: SplitMix64.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), fig. 19.
    """
    x = seeds + (counters + 1) * _GAMMA
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).to(torch.float64) * 2.0**-53


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of signed 64-bit integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def choose(
    logits: Tensor, draws: Tensor, *, temperature: float, top_p: float, banned: Tensor
) -> tuple[Tensor, Tensor]:
    """Token ids (B, M) and their logprobs (B, M) from logits (B, V) and uniform draws (B, M).

    Logprobs are of the whole vocabulary at the sampling temperature (1 when greedy), before
    banned ids and top-p are applied: the same quantity that `policy.score` computes.
    """
    log_probs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    allowed = log_probs.index_fill(1, banned, float("-inf"))
    if temperature == 0.0:
        ids = allowed.argmax(-1, keepdim=True).expand(draws.shape)
    elif top_p < 1.0:
        ids = _inverse_cdf_top_p(allowed, draws, top_p)
    else:
        ids = _inverse_cdf(allowed.exp(), draws)
    return ids, log_probs.gather(1, ids).clamp(max=0.0)


def likeliest(logits: Tensor, *, temperature: float, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens of one row's logits (V,), with logprobs as `choose` gives them."""
    log_probs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    values, ids = log_probs.topk(min(count, len(logits)))
    return tuple(zip(ids.tolist(), values.clamp(max=0.0).tolist(), strict=True))


def _inverse_cdf(probs: Tensor, draws: Tensor) -> Tensor:
    """The first ids at which the running sum of `probs` (need not sum to 1) passes the draws."""
    running = probs.double().cumsum(-1)
    # A draw is below 1, so the target is below the last sum and never lands on a tail of zeros.
    targets = draws * running[:, -1:]
    return torch.searchsorted(running, targets, right=True).clamp(max=probs.shape[1] - 1)


def _inverse_cdf_top_p(log_probs: Tensor, draws: Tensor, top_p: float) -> Tensor:
    """Draw from the smallest set of most likely ids whose probability reaches `top_p`."""
    probs, order = log_probs.exp().sort(dim=-1, descending=True, stable=True)
    mass = probs.sum(-1, keepdim=True)
    before = probs.cumsum(-1) - probs
    kept = torch.where(before < top_p * mass, probs, 0.0)
    return order.gather(1, _inverse_cdf(kept, draws))
