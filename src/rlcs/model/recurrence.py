"""Recurrent layers over packed trees: every branch starts from the state in which what it follows ended.

A recurrent layer (see `delta_net`) has two parts that look back: a causal convolution over the last few
tokens, and a state that every token decays and writes to. Both follow the paths of a `Layout`, so that a
trunk goes through them once and its state serves all of its branches.

Letters in shapes: L tokens of the pack, C channels, K taps, H heads, B sequences, N longest of them.
"""

from collections.abc import Container, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from rlcs.model.delta_rule import DeltaRules
from rlcs.model.layout import Bucket, Layout, buckets


class Recurrence(Protocol):
    """Computes what looks back in the recurrent layers of one forward pass."""

    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        """Causal convolution of each channel: inputs (L, C) and weights (C, K) to outputs (L, C)."""
        ...

    def recur(self, layer: int, rules: DeltaRules, inputs: Sequence[Tensor]) -> Tensor:
        """Outputs (L, H, value size) of the rules for query, key, value (L, H, size), g and beta (L, H)."""
        ...


class PathRecurrence:
    """Recurrence over the paths of a layout, exact, in as many passes as the trees are deep.

    Padding neither decays the state nor writes to it, so that the state after a padded segment is that of its
    last token.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Nothing is computed before the first recurrent layer: most models have none."""
        self._layout, self._device = layout, device
        self._context: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def _passes(self) -> list[tuple[Bucket, list[int | None]]]:
        """The segments by depth, the same for all layers."""
        return [(bucket.to(self._device), parents) for bucket, parents in _passes(self._layout)]

    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        """See `Recurrence`."""
        taps = weight.shape[-1]
        if taps not in self._context:
            self._context[taps] = _with_context(self._layout, taps - 1, self._device)
        source, own = self._context[taps]
        with_zero = torch.cat([x, x.new_zeros(1, x.shape[1])])  # stands where nothing comes before
        rows = with_zero.index_select(0, source).T[None]
        output = nn.functional.conv1d(rows, weight.unsqueeze(1), groups=len(weight))
        return output[0].T.index_select(0, own)

    def recur(self, layer: int, rules: DeltaRules, inputs: Sequence[Tensor]) -> Tensor:
        """See `Recurrence`."""
        followed = {segment.parent for segment in self._layout.segments}
        return self.run(rules, inputs, wanted=followed)[0]

    def run(
        self, rules: DeltaRules, inputs: Sequence[Tensor], *, wanted: Container[int | None]
    ) -> tuple[Tensor, dict[int | None, Tensor]]:
        """Outputs as of `recur`, and the states after `wanted` segments, among them all with followers."""
        states: dict[int | None, Tensor] = {}
        outputs, sources = [], []
        for bucket, parents in self._passes:
            query, key, value, g, beta = (bucket.pad(x) for x in inputs)
            before = None if parents[0] is None else torch.stack([states[p] for p in parents])
            followed = [i for i, segment in enumerate(bucket.members) if segment in wanted]
            output, after = rules.many(
                query, key, value, g=g, beta=beta, initial_state=before, output_final_state=bool(followed)
            )
            if after is not None:
                states |= {bucket.members[i]: after[i] for i in followed}
            outputs.append(bucket.unpad(output))
            sources.append(bucket.source)
        return torch.cat(outputs).index_select(0, torch.cat(sources).argsort()), states


def _passes(layout: Layout) -> list[tuple[Bucket, list[int | None]]]:
    """Buckets of segments that may be computed together, and their parents, which come in earlier ones."""
    depth: list[int] = []
    for segment in layout.segments:
        depth.append(0 if segment.parent is None else 1 + depth[segment.parent])
    passes: list[tuple[Bucket, list[int | None]]] = []
    for level in range(max(depth, default=-1) + 1):
        chosen = [i for i, own in enumerate(depth) if own == level and len(layout.segments[i])]
        for bucket in buckets(layout, chosen):
            passes.append((bucket, [layout.segments[member].parent for member in bucket.members]))
    return passes


def _with_context(layout: Layout, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every segment behind the `count` tokens before it on its path, and where its tokens' windows begin.

    Index L stands for a token that does not exist.
    """
    ends: list[list[int]] = []
    source, own = list[int](), list[int]()
    for segment in layout.segments:
        tokens = range(segment.start, segment.stop)
        before = [layout.length] * count if segment.parent is None else ends[segment.parent]
        ends.append([*before, *tokens][-count:] if count else [])
        source += [*before, *tokens]
        own += range(len(source) - len(tokens) - count, len(source) - count)
    return torch.tensor(source, device=device), torch.tensor(own, device=device)
