"""Cache for trees that grow: each trunk's keys and values are stored once, each row stores its own tokens'.

A row is a branch that is being decoded. A pass has one query or more in a row of them: its newest tokens.
They attend to the row's trunk, which all rows of a group share without copies, and to the row's own tokens.
Letters in shapes: T trunks, B rows, Q queries, K key-value heads, R query heads per key-value head,
P longest trunk, O longest row so far, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlcs.engines.slots import Grid, Indices, KeyValue, Slots, settled
from rlcs.engines.states import RowRecurrence, TrunkRecurrence
from rlcs.model.attention import Plan
from rlcs.model.layout import PATH, Layout, Scope

GROWTH = 32
"""Tokens by which the cache of the rows grows."""


class Sources:
    """Which layer's keys and values each layer reads: some share those of an earlier one."""

    def __init__(self) -> None:
        """No layer is known yet."""
        self.by_layer: dict[int, int] = {}
        self._given: list[tuple[Tensor, int]] = []

    def of(self, layer: int, key: Tensor) -> int:
        """The layer from which these keys are: `layer` itself, or an earlier one."""
        source = next((earlier for given, earlier in self._given if given is key), layer)
        self.by_layer[layer] = source
        if source == layer:
            self._given.append((key, layer))
        return source


class Prefill(Plan, Protocol):
    """A plan by which prompts were computed, from which decoding goes on."""

    lengths: list[int]
    sources: Sources

    @property
    def kept(self) -> RowRecurrence:
        """What recurrent layers keep at the end of each prompt."""
        ...

    def trunks(self) -> Slots:
        """Keys and values (T, K, P, D) of the prompts, padded with zeros on the right."""
        ...


class RecordingPlan:
    """Wraps another plan and keeps what later tokens look back at in every layer: the prefill of trunks."""

    def __init__(self, inner: Plan, layout: Layout, device: torch.device) -> None:
        """`inner` computes the attention itself; `layout` is of trunks alone."""
        self._inner, self._layout = inner, layout
        self.lengths = list(map(len, layout.trunks))
        self.recurrence = TrunkRecurrence(layout, device)
        self.layers: dict[int, KeyValue] = {}
        self.sources = Sources()

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scope: Scope = PATH,
        scale: float | None = None,
    ) -> Tensor:
        """Attend as `inner` does; the keys that a layer shares with an earlier one are kept once."""
        if self.sources.of(layer, key) == layer:
            self.layers[layer] = (key[0], value[0])
        return self._inner.attend(layer, query, key, value, scope=scope, scale=scale)

    @property
    def kept(self) -> RowRecurrence:
        """See `Prefill`."""
        return self.recurrence.kept

    def trunks(self) -> Slots:
        """See `Prefill`."""
        return Slots(
            {
                layer: (_stack(key, self._layout), _stack(value, self._layout))
                for layer, (key, value) in self.layers.items()
            }
        )


def _stack(flat: Tensor, layout: Layout) -> Tensor:
    """(K, L, D) of the whole pack to (T, K, P, D)."""
    heads, _, size = flat.shape
    longest = max(map(len, layout.trunks))
    stacked = flat.new_zeros(len(layout.trunks), heads, longest, size)
    for index, trunk in enumerate(layout.trunks):
        stacked[index, :, : len(trunk)] = flat[:, trunk.start : trunk.stop]
    return stacked


@dataclass
class ForestCache:
    """Keys and values of T trunks and B rows by layer; a plan for decoding passes.

    `trunk_lengths` has the tokens of each trunk and `row_trunk` the trunk of each row. `recurrence` holds
    what recurrent layers keep of every row. A layer reads the keys and values of its entry in `sources`: its
    own, or those that it shares.
    """

    trunks: Slots
    trunk_lengths: list[int]
    rows: Slots
    row_trunk: list[int]
    recurrence: RowRecurrence
    sources: dict[int, int]

    @classmethod
    def prefilled(cls, prefill: Prefill) -> "ForestCache":
        """A cache in which each trunk has one row, without tokens of its own."""
        trunks = prefill.trunks()
        rows = {}
        for layer, (key, _) in trunks.layers.items():
            empty = key.new_zeros(key.shape[0], key.shape[1], GROWTH, key.shape[3])
            rows[layer] = (empty, empty.clone())
        return cls(
            trunks=trunks,
            trunk_lengths=prefill.lengths,
            rows=Slots(rows),
            row_trunk=list(range(trunks.count)),
            recurrence=prefill.kept,
            sources=prefill.sources.by_layer,
        )

    def append(self, other: "ForestCache") -> None:
        """Take in newly prefilled trunks and their rows, after those that are here."""
        self.row_trunk += [trunk + len(self.trunk_lengths) for trunk in other.row_trunk]
        self.trunk_lengths += other.trunk_lengths
        self.trunks.append(other.trunks)
        self.rows.append(other.rows)
        self.recurrence = self.recurrence.append(other.recurrence)

    def reserve(self, more: int, tokens: int) -> None:
        """Make space for so many more trunks of so many tokens and their rows, to be appended one by one."""
        self.trunks.reserve(self.trunks.count + more, tokens)
        self.rows.reserve(self.rows.count + more, self.rows.tokens)

    def arrange(self, chosen: Sequence[int], tokens: int, *, most: int) -> None:
        """Let row i go on after what row `chosen[i]` has, of which `tokens` tokens are needed.

        There will never be more than `most` of these rows. Trunks that no row needs any longer are dropped.
        """
        if list(chosen) == list(range(self.rows.count)):
            return
        if len(chosen) > self.rows.space:
            self.rows.reserve(min(most, len(chosen) * 5 // 4), self.rows.tokens)
        self.rows.arrange(chosen, tokens)
        self.recurrence = self.recurrence.rows(torch.tensor(chosen))
        self.row_trunk = [self.row_trunk[source] for source in chosen]
        needed = sorted(set(self.row_trunk))
        if len(needed) < len(self.trunk_lengths):
            kept = [needed[index] for index in settled(needed)]
            self.trunks.arrange(kept, self.trunks.tokens)
            self.trunk_lengths = [self.trunk_lengths[trunk] for trunk in kept]
            places = {trunk: place for place, trunk in enumerate(kept)}
            self.row_trunk = [places[trunk] for trunk in self.row_trunk]

    def begin_pass(self, lengths: Sequence[int], counts: Sequence[int], device: torch.device) -> None:
        """Announce the next queries: row i has `lengths[i]` tokens, which `counts[i]` more follow.

        What was computed of a row beyond its length is forgotten: the new tokens take its place.
        """
        self._longest = int((np.asarray(lengths) + counts).max())
        if self._longest > self.rows.tokens:
            self.rows.reserve(self.rows.count, max(self._longest, self.rows.tokens + GROWTH))
        sizes, trunk_of_row = np.asarray(counts), np.asarray(self.row_trunk)
        rows: Indices = np.repeat(np.arange(len(sizes)), sizes)
        offsets = np.arange(len(rows)) - (np.cumsum(sizes) - sizes)[rows]
        places = np.asarray(lengths)[rows] + offsets
        trunks = trunk_of_row[rows]
        self._by_row = Grid(rows, len(sizes), device)
        self._by_trunk = Grid(trunks, len(self.trunk_lengths), device)
        trunk_lengths = np.asarray(self.trunk_lengths)[trunks]
        numbers = torch.from_numpy(np.stack([rows, places, trunk_lengths])).to(device)
        self._query_rows, self._places, self._trunk_lengths = numbers
        self._trunk_bias = _hidden(self.trunks.tokens, self._trunk_lengths - 1, device)
        self._row_bias = _hidden(self._longest, self._places, device)
        self._windowed: dict[int, tuple[Tensor, Tensor]] = {}

    def _biases(self, window: int | None) -> tuple[Tensor, Tensor]:
        """What is added to the scores of trunks (Q, 1, 1, P) and rows (Q, 1, 1, O): -inf where hidden."""
        if window is None:
            return self._trunk_bias, self._row_bias
        if window not in self._windowed:
            depths = self._trunk_lengths + self._places
            self._windowed[window] = (
                _hide_up_to(self._trunk_bias, depths - window),
                _hide_up_to(self._row_bias, self._places - window),
            )
        return self._windowed[window]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scope: Scope = PATH,
        scale: float | None = None,
    ) -> Tensor:
        """Queries (1, H, Q, D) over trunk and own tokens up to each; stores the new keys and values."""
        source = self.sources[layer]
        row_key, row_value = self.rows.layers[source]
        trunk_key, trunk_value = (x[: self.trunks.count] for x in self.trunks.layers[source])
        trunk_bias, row_bias = self._biases(scope.window)
        count, heads, size = query.shape[2], row_key.shape[1], query.shape[3]
        if source == layer:
            row_key[self._query_rows, :, self._places] = key[0].transpose(0, 1)
            row_value[self._query_rows, :, self._places] = value[0].transpose(0, 1)
        row_key, row_value = (x[: self.rows.count, :, : self._longest] for x in (row_key, row_value))
        # Scores are fp32, as in other attention kernels: a product of bf16 tensors is itself rounded to bf16,
        # which costs most where a row's scores have much in common. It takes a temporary copy of one layer's
        # keys and more reading; `bmm(out_dtype=)` would take neither, but CPUs do not have it.
        q = query[0].transpose(0, 1).reshape(count, heads, -1, size).float() * (scale or size**-0.5)
        by_row, by_trunk = self._by_row, self._by_trunk
        row_scores = by_row.gather(by_row.spread(q) @ row_key.float().transpose(2, 3)) + row_bias
        trunk_scores = by_trunk.gather(by_trunk.spread(q) @ trunk_key.float().transpose(2, 3)) + trunk_bias
        shares = torch.softmax(torch.cat([trunk_scores, row_scores], -1), -1).to(value.dtype)
        trunk_share, row_share = shares.split([trunk_scores.shape[-1], self._longest], -1)
        output = by_row.gather(by_row.spread(row_share) @ row_value)
        output = output + by_trunk.gather(by_trunk.spread(trunk_share) @ trunk_value)
        flat: Tensor = output.reshape(count, -1, size).transpose(0, 1)
        return flat[None]


def _hidden(tokens: int, last: Tensor, device: torch.device) -> Tensor:
    """What hides, of so many tokens, those after number `last` (Q,): (Q, 1, 1, tokens)."""
    inside = torch.arange(tokens, device=device) <= last[:, None]
    return torch.where(inside, 0.0, float("-inf"))[:, None, None]


def _hide_up_to(bias: Tensor, last: Tensor) -> Tensor:
    """Hide, in a bias (Q, 1, 1, X), the tokens up to number `last` (Q,)."""
    order = torch.arange(bias.shape[-1], device=bias.device)
    return bias.masked_fill(order <= last[:, None, None, None], float("-inf"))
