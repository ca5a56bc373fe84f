"""Computes logprobs of targets from hidden states, and their gradients, a chunk of logits at a time.

The same as the plain way (see `model.policy`) with less to read and write: the logits of a chunk are turned
into their gradients in place, entropies are not computed again for the backward pass, and the gradient of
the head is added up in one tensor instead of one for each chunk. torch's `linear_cross_entropy` does the
former two, but gives no entropies.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_logprobs(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    rows: int,
    softcap: float | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logprobs (N,) of the targets (N,) after the states (N, C), and entropies (N,).

    `weight` (V, C) is that of the head, which has no bias. At most `rows` rows of logits are held at once
    (twice in the backward pass where there is a `softcap`, see `Vlm`, and once more with `entropy_gradient`,
    without which entropies have no gradient).
    """
    logprobs, entropy = _LinearLogprobs.apply(states, weight, targets, (temperature, softcap), rows)
    return logprobs, entropy if entropy_gradient else entropy.detach()


class _LinearLogprobs(torch.autograd.Function):
    """The logits are computed twice: the gradient of a logprob is known only in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        shape: tuple[float, float | None],
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        totals, chosen, entropies = [], [], []
        for of_chunk in _chunks(len(states), rows):
            logits = _logits(states[of_chunk], weight, *shape)
            totals.append(logits.logsumexp(-1))
            logprobs = logits.sub_(totals[-1][:, None])
            chosen.append(logprobs.gather(1, targets[of_chunk, None])[:, 0])
            entropies.append(-torch.linalg.vecdot(logprobs.exp(), logprobs))
        entropy = torch.cat(entropies)
        ctx.save_for_backward(states, weight, targets, torch.cat(totals), entropy)
        ctx.shape, ctx.rows = shape, rows
        ctx.set_materialize_grads(False)
        return torch.cat(chosen), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, targets, totals, entropy = ctx.saved_tensors
        temperature, softcap = ctx.shape
        of_logprobs, of_entropy = (None if g is None else g / temperature for g in gradients)
        if of_logprobs is None:
            of_logprobs = torch.zeros_like(entropy)
        of_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for of_chunk in _chunks(len(states), ctx.rows):
            logits = _logits(states[of_chunk], weight, temperature, softcap)
            # The slope of c tanh(x / c) is 1 - tanh(x / c)^2.
            of_cap = None if softcap is None else 1 - (logits * (temperature / softcap)).square_()
            factor = of_logprobs[of_chunk, None]
            logprobs, weights = logits.sub_(totals[of_chunk, None]), -factor
            if of_entropy is not None:  # the slope of an entropy H is -p (log p + H)
                weights = (logprobs + entropy[of_chunk, None]).mul_(-of_entropy[of_chunk, None]).add_(weights)
            slopes = logprobs.exp_().mul_(weights)
            slopes = slopes.scatter_add_(1, targets[of_chunk, None], factor)
            slopes = (slopes if of_cap is None else slopes.mul_(of_cap)).to(states.dtype)
            if of_states is not None:
                torch.mm(slopes, weight, out=of_states[of_chunk])
            if of_weight is not None:
                of_weight.addmm_(slopes.T, states[of_chunk])
        return of_states, of_weight, None, None, None


def _chunks(count: int, rows: int) -> Iterator[slice]:
    """At least one, which is empty where a pack has no targets: a padding pack, which keeps ranks in step."""
    return (slice(start, start + rows) for start in range(0, max(1, count), rows))


def _logits(states: Tensor, weight: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """The logits of some rows in float32, for the caller to overwrite."""
    logits = torch.nn.functional.linear(states, weight)
    logits = (logits if softcap is None else torch.tanh(logits / softcap) * softcap).float()
    return logits if temperature == 1.0 else logits.div_(temperature)
