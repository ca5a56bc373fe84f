"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464, equation 10): what recurrent layers compute.

A head's state maps keys to values. Every token decays it, then replaces part of what it holds for the token's
key by the token's value; the output is what it holds for the token's query:

    S <- exp(g) S,    S <- S + k (beta (v - k S)),    o = q S

with k and q of length 1, and q divided by the root of its size. `by_token` computes just that: for decoding,
and as the reference. `by_chunk` computes c tokens at once by matrix products (section 3.2 there). With a the
logarithm of the decay since the chunk began, M[i, j] = exp(a[i] - a[j]) for j <= i, S the state before it:

    T = (1 + strictly lower part of beta K K^T M)^-1      N = T beta (V - exp(a) K S)
    O = exp(a) Q S + (Q K^T M) N                          S <- exp(a[c]) S + (exp(a[c] - a) K)^T N

Letters in shapes: B sequences, n chunks of c tokens, G heads of queries and keys, each of which serves R
heads of values that are neighbours, D size of keys, V size of values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to the squared length of queries and keys."""


def exact(dtype: torch.dtype) -> torch.dtype:
    """The format in which the rule is computed: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def normed(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (..., D) of the right length, in the format in which the rule is computed."""
    query, key = (x.to(exact(x.dtype)) for x in (query, key))
    query, key = (x * (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt() for x in (query, key))
    return query * query.shape[-1] ** -0.5, key


def by_token(inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (B, G R, V) and states (B, G R, D, V) after one more token.

    `inputs` are query and key (B, G, D), value (B, G R, V), g and beta (B, G R).
    """
    query, key = normed(inputs[0], inputs[1])
    value, g, beta = (x.to(state.dtype) for x in inputs[2:])
    repeats = value.shape[1] // key.shape[1]
    query, key = (x.repeat_interleave(repeats, 1)[:, :, None] for x in (query, key))
    state = state * g.exp()[..., None, None]
    written = beta[..., None, None] * (value[:, :, None] - key @ state)
    state = state + key.mT * written
    return (query @ state)[:, :, 0].to(inputs[2].dtype), state


@dataclass(frozen=True, slots=True)
class Step:
    """Chunks `start` to `stop`, which have equally many before them on their paths.

    The first `followed` of them have followers. `before` (stop - start,) are the places, among the followed
    chunks of the step before, of those that these ones follow; None in the first step.
    """

    start: int
    stop: int
    followed: int
    before: Tensor | None


def by_chunk(inputs: Sequence[Tensor], steps: Sequence[Step]) -> tuple[Tensor, list[Tensor]]:
    """Outputs (n, c, G R, V); of each step the states (followed, G R, D, V) after its followed chunks.

    `inputs` are query and key (n, c, G, D), value (n, c, G R, V), g and beta (n, c, G R). Only the outputs
    have gradients.
    """
    query, key = (x.transpose(1, 2)[:, :, None] for x in normed(inputs[0], inputs[1]))
    sizes = (key.shape[1], -1)
    value, g, beta = (x.to(key.dtype).transpose(1, 2).unflatten(1, sizes) for x in inputs[2:])
    output, *states = _ByChunk.apply(query, key, value.contiguous(), g, beta, steps)
    return output.flatten(1, 2).transpose(1, 2).to(inputs[2].dtype), states


def _flat(x: Tensor) -> Tensor:
    """(n, G, R, ...) to (n G R, ...): small matrices, of which one call multiplies many."""
    return x.flatten(0, 2)


class _ByChunk(torch.autograd.Function):
    """`by_chunk` with heads first: query and key (n, G, 1, c, D), value (n, G, R, c, V), others (n, G, R, c).

    The backward pass is written out, as that takes half the time that autograd takes.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, steps: Any
    ) -> Any:
        length, heads = value.shape[3], value.shape[1] * value.shape[2]
        a = g.cumsum(-1)
        upper = torch.ones(length, length, dtype=torch.bool, device=a.device).triu(1)
        mask = (a[..., :, None] - a[..., None, :]).masked_fill_(upper, float("-inf")).exp_()
        pairs = mask * (key @ key.mT)
        system = _flat(pairs * beta[..., None])
        one = torch.eye(length, dtype=a.dtype, device=a.device).expand_as(system)
        solved = torch.linalg.solve_triangular(system, one, upper=False, unitriangular=True)
        reads = _flat(mask * (query @ key.mT))
        grown = a.exp()
        looks = _flat(torch.cat([key, query], 3) * torch.cat([grown, grown], -1)[..., None])
        left = (a[..., -1:] - a).exp_()
        kept = _flat(key * left[..., None])
        decay = _flat(a[..., -1:]).exp()[..., None]
        written, states, after = torch.empty_like(value), [], list[Tensor]()
        seen = value.new_zeros(len(solved), 2 * length, value.shape[-1])
        wanted, strength, written = _flat(value), _flat(beta)[..., None], _flat(written)
        for step in steps:
            own = slice(step.start * heads, step.stop * heads)
            first = slice(own.start, own.start + step.followed * heads)
            change = wanted[own]
            if step.before is not None:
                state = after[-1].index_select(0, step.before).flatten(0, 1)
                states.append(state)
                torch.bmm(looks[own], state, out=seen[own])
                change = change - seen[own, :length]
            torch.bmm(solved[own], strength[own] * change, out=written[own])
            new = kept[first].mT @ written[first]
            if step.before is not None:
                new.addcmul_(state[: len(new)], decay[first])
            after.append(new.unflatten(0, (-1, heads)))
        output = torch.baddbmm(seen[:, length:], reads, written).view_as(value)
        ctx.save_for_backward(
            query,
            key,
            value,
            beta,
            mask,
            pairs,
            solved,
            reads,
            looks,
            grown,
            left,
            kept,
            decay,
            written,
            seen,
            *states,
        )
        ctx.steps = steps
        ctx.mark_non_differentiable(*after)
        return output, *after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (query, key, value, beta, mask, pairs, solved, reads, looks, grown, left, kept, decay, written, seen,
         *states) = ctx.saved_tensors  # fmt: skip
        length, heads, steps = value.shape[3], value.shape[1] * value.shape[2], ctx.steps
        upstream = _flat(grads[0]).contiguous()
        strength = _flat(beta)[..., None]
        d_written = reads.mT @ upstream
        d_change = torch.empty_like(d_written)  # of beta (V - exp(a) K S)
        d_looks, d_kept = torch.zeros_like(looks), torch.zeros_like(kept)
        d_last = torch.zeros_like(decay[:, 0, 0])  # of a[c], by the decay of states
        d_after: Tensor | None = None
        for index in reversed(range(len(steps))):
            step = steps[index]
            own = slice(step.start * heads, step.stop * heads)
            first = slice(own.start, own.start + step.followed * heads)
            if d_after is not None:
                d_written[first] += kept[first] @ d_after
                d_kept[first] = written[first] @ d_after.mT
            torch.bmm(solved[own].mT, d_written[own], out=d_change[own])
            if step.before is None:
                continue
            d_seen = torch.cat([-strength[own] * d_change[own], upstream[own]], 1)
            state = states[index - 1]
            torch.bmm(d_seen, state.mT, out=d_looks[own])
            d_state = looks[own].mT @ d_seen
            if d_after is not None:
                d_last[first] = (d_after * state[: len(d_after)]).sum((1, 2)) * decay[first, 0, 0]
                d_state[: len(d_after)].addcmul_(d_after, decay[first])
            d_after = d_state.new_zeros(steps[index - 1].followed, heads, *d_state.shape[1:])
            d_after = d_after.index_add_(0, step.before, d_state.unflatten(0, (-1, heads))).flatten(0, 1)
        d_value = (strength * d_change).view_as(value)
        missing = _flat(value) - seen[:, :length]
        d_beta = (d_change * missing).sum(-1).view_as(beta)
        # Of the matrices over pairs of tokens: T = (1 + A)^-1, so that dA = -(dN T)(N)^T.
        d_pairs = (d_change @ written.mT).neg_().tril_(-1).view_as(mask)
        d_beta += (d_pairs * pairs).sum(-1)
        d_pairs *= beta[..., None]
        d_reads = (upstream @ written.mT).view_as(mask)
        by_decay = d_pairs * pairs + d_reads * reads.view_as(mask)
        d_a = by_decay.sum(-1) - by_decay.sum(-2)
        of_looks = (d_looks * looks).sum(-1).view(*d_a.shape[:3], 2, length).sum(3)
        of_kept = (d_kept * kept).sum(-1).view_as(d_a)
        d_a += of_looks - of_kept
        d_a[..., -1] += of_kept.sum(-1) + d_last.view(d_a.shape[:3])
        d_keys = (d_pairs * mask).sum(2, keepdim=True)
        d_query_keys = (d_reads * mask).sum(2, keepdim=True)
        grown = grown[..., None]
        d_of_looks = d_looks.view(*d_a.shape[:3], 2, length, -1)
        d_key = (
            d_of_looks[:, :, :, 0] * grown + d_kept.view_as(d_of_looks[:, :, :, 0]) * left[..., None]
        ).sum(2, keepdim=True)
        d_key += (d_keys + d_keys.mT) @ key + d_query_keys.mT @ query
        d_query = (d_of_looks[:, :, :, 1] * grown).sum(2, keepdim=True) + d_query_keys @ key
        d_g = d_a.flip(-1).cumsum(-1).flip(-1)
        return d_query, d_key, d_value, d_g, d_beta, None
