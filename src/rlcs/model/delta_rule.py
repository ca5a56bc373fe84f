"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464, equation 10): what recurrent layers compute.

A head's state maps keys to values. Every token decays it, then replaces part of what it holds for the token's
key by the token's value; the output is what it holds for the token's query:

    S <- exp(g) S,    S <- S + k (beta (v - k S)),    o = q S

with k and q of length 1, and q divided by the root of its size. Letters in shapes: B sequences, N tokens,
H heads of values, D size of keys, V size of values.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to the squared length of queries and keys."""


class DeltaRule(Protocol):
    """A kernel that computes the rule."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        output_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute outputs (B, N, H, V) and states (B, H, D, V) after all tokens.

        Queries and keys may have fewer heads than values: each serves as many heads that are neighbours.
        `g` (B, N, H) is the logarithm of the decay, `beta` (B, N, H) how strongly a token is written.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaRules:
    """The same rule twice: `many` for sequences, `few` for a token or a few."""

    many: DeltaRule
    few: DeltaRule


def by_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Token by token, as the rule is written: for decoding, and the reference (see `DeltaRule`)."""
    query, key = _heads(query, key, value)
    exact = query.dtype
    sizes = (*value.shape[::2], key.shape[-1], value.shape[-1])
    state = value.new_zeros(sizes, dtype=exact) if initial_state is None else initial_state.to(exact)
    outputs = []
    for t in range(value.shape[1]):
        state = state * g[:, t].to(exact).exp()[..., None, None]
        q, k = query[:, t, :, None], key[:, t, :, None]
        change = beta[:, t, :, None, None] * (value[:, t, :, None] - k @ state)
        state = state + k.transpose(-1, -2) * change
        outputs.append((q @ state)[:, :, 0])
    return torch.stack(outputs, 1).to(value.dtype), state if output_final_state else None


def _heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of the right length for each head of values, in float32 or better."""
    exact = torch.promote_types(value.dtype, torch.float32)
    repeats = value.shape[2] // key.shape[2]
    query, key = (x.to(exact) for x in (query, key))
    query, key = (x * (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt() for x in (query, key))
    query = query * query.shape[-1] ** -0.5
    return query.repeat_interleave(repeats, 2), key.repeat_interleave(repeats, 2)
