"""Recurrent layers over packed trees: every branch starts from the state in which what it follows ended.

A recurrent layer (see `delta_net`) has two parts that look back: a causal convolution over the last few
tokens, and a state that every token decays and writes to. Both follow the paths of a `Layout`, so that a
trunk goes through them once and its state serves all of its branches.

Letters in shapes: L tokens of the pack, C channels, K taps, H heads, B sequences, N longest of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn

from rlcs.model.chunks import DELTA_CHUNK
from rlcs.model.delta_rule import Step, by_chunk
from rlcs.model.layout import Layout


class Recurrence(Protocol):
    """Computes what looks back in the recurrent layers of one forward pass."""

    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        """Causal convolution of each channel: inputs (L, C) and weights (C, K) to outputs (L, C)."""
        ...

    def recur(self, layer: int, inputs: Sequence[Tensor]) -> Tensor:
        """Outputs (L, H, value size) of the delta rule (see `model.delta_rule`) for its inputs (L, ...)."""
        ...


@dataclass(frozen=True, slots=True)
class Chunks:
    """The tokens of a pack in `count` chunks of `size`, in `steps`; token i is in cell `cells[i]` of them.

    `ends` are the step of the last chunk of every wanted segment, and its place in that step.
    """

    size: int
    count: int
    cells: Tensor
    steps: tuple[Step, ...]
    ends: tuple[tuple[int, int], ...]

    def to(self, device: torch.device) -> "Chunks":
        """The same chunks with their indices on `device`."""
        steps = (replace(s, before=None if s.before is None else s.before.to(device)) for s in self.steps)
        return replace(self, cells=self.cells.to(device), steps=tuple(steps))

    def pad(self, x: Tensor) -> Tensor:
        """(L, ...) of the pack to (count, size, ...), zero where there is no token."""
        padded = x.new_zeros(self.count * self.size, *x.shape[1:]).index_copy_(0, self.cells, x)
        return padded.view(self.count, self.size, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of `pad`."""
        return x.flatten(0, 1).index_select(0, self.cells)


def chunks_of(layout: Layout, size: int, wanted: Sequence[int] = ()) -> Chunks:
    """Cut every segment into chunks, whose states are computed where others follow or they are `wanted`."""
    depths, before, spans, lasts = list[int](), list[int | None](), list[range](), list[int | None]()
    for segment in layout.segments:
        last = None if segment.parent is None else lasts[segment.parent]
        for start in range(segment.start, segment.stop, size):
            before.append(last)
            depths.append(0 if last is None else depths[last] + 1)
            spans.append(range(start, min(start + size, segment.stop)))
            last = len(spans) - 1
        lasts.append(last)
    finals = [chunk for chunk in map(lasts.__getitem__, wanted) if chunk is not None]
    followed = {*before, *finals}
    order = sorted(range(len(spans)), key=lambda chunk: (depths[chunk], chunk not in followed))
    places = {chunk: place for place, chunk in enumerate(order)}
    steps: list[Step] = []
    for depth, group in groupby(order, key=depths.__getitem__):
        members, start = list(group), steps[-1].stop if steps else 0
        parents = [parent for chunk in members if (parent := before[chunk]) is not None]
        rows = [places[parent] - steps[-1].start for parent in parents]
        steps.append(
            Step(
                start,
                start + len(members),
                sum(chunk in followed for chunk in members),
                torch.tensor(rows) if depth else None,
            )
        )
    cells = [places[chunk] * size + torch.arange(len(span)) for chunk, span in enumerate(spans)]
    ends = [(depths[chunk], places[chunk] - steps[depths[chunk]].start) for chunk in finals]
    return Chunks(size, len(spans), torch.cat(cells), tuple(steps), tuple(ends))


class PathRecurrence:
    """Recurrence over the paths of a layout, exact.

    Padding neither decays the state nor writes to it, so that the state after a padded chunk is that of its
    last token.
    """

    def __init__(
        self, layout: Layout, device: torch.device, *, chunk: int = DELTA_CHUNK, wanted: Sequence[int] = ()
    ) -> None:
        """Nothing is computed before the first recurrent layer: most models have none.

        States after the `wanted` segments are computed in any case.
        """
        self._layout, self._device, self._chunk, self._wanted = layout, device, chunk, wanted
        self._context: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def _chunks(self) -> Chunks:
        """The same for all layers."""
        return chunks_of(self._layout, self._chunk, self._wanted).to(self._device)

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

    def recur(self, layer: int, inputs: Sequence[Tensor]) -> Tensor:
        """See `Recurrence`."""
        return self.run(inputs)[0]

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The outputs of `recur`, and the states (H, D, V) after the wanted segments, without gradients."""
        output, states = by_chunk([self._chunks.pad(x) for x in inputs], self._chunks.steps)
        return self._chunks.unpad(output), [states[step][place] for step, place in self._chunks.ends]


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
