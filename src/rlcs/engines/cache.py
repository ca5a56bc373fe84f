"""Cache for trees that grow: each trunk's keys and values are stored once, each row stores its own tokens'.

A decoding step has one query per live row. It attends to the row's trunk, which all rows of a
group share without copies, and to the row's own tokens.
Letters in shapes: T trunks, B live rows, K key-value heads, R query heads per key-value head,
P longest trunk, O longest row so far, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlcs.engines.states import RowRecurrence, TrunkRecurrence
from rlcs.model.attention import Plan
from rlcs.model.layout import PATH, Layout, Scope

GROWTH = 32
"""Tokens by which the cache of the rows grows."""

KeyValue = tuple[Tensor, Tensor]


class RecordingPlan:
    """Wraps another plan and keeps what later tokens look back at in every layer: the prefill of trunks."""

    def __init__(self, inner: Plan, layout: Layout, device: torch.device) -> None:
        """`inner` computes the attention itself; `layout` is of trunks alone."""
        self._inner, self.layout = inner, layout
        self.recurrence = TrunkRecurrence(layout, device)
        self.layers: dict[int, KeyValue] = {}
        self.sources: dict[int, int] = {}
        self._given: list[tuple[Tensor, int]] = []

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
        source = next((earlier for given, earlier in self._given if given is key), layer)
        self.sources[layer] = source
        if source == layer:
            self.layers[layer] = (key[0], value[0])
            self._given.append((key, layer))
        return self._inner.attend(layer, query, key, value, scope=scope, scale=scale)

    def trunks(self) -> dict[int, KeyValue]:
        """Per layer, keys and values (T, K, P, D) of the trunks, padded with zeros on the right."""
        return {
            layer: (_stack(key, self.layout), _stack(value, self.layout))
            for layer, (key, value) in self.layers.items()
        }


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
    """Keys and values of T trunks and B rows by layer; a plan for decoding steps.

    `trunk_lengths` (T,), `row_trunk` (B,) the trunk of every row (rows of a trunk are neighbours),
    `row_lengths` (B,) own tokens so far. `recurrence` holds what recurrent layers keep of every row. A layer
    reads the keys and values of its entry in `sources`: its own, or those that it shares.
    """

    trunks: dict[int, KeyValue]
    trunk_lengths: Tensor
    rows: dict[int, KeyValue]
    row_trunk: Tensor
    row_lengths: Tensor
    recurrence: RowRecurrence
    sources: dict[int, int]

    @classmethod
    def prefilled(cls, recording: RecordingPlan, counts: Tensor) -> "ForestCache":
        """A cache in which trunk t has counts[t] rows without tokens of their own; `counts` is (T,)."""
        trunks = recording.trunks()
        device = counts.device
        row_trunk = torch.arange(len(counts), device=device).repeat_interleave(counts)
        rows = {}
        for layer, (key, _) in trunks.items():
            empty = key.new_zeros(len(row_trunk), key.shape[1], GROWTH, key.shape[3])
            rows[layer] = (empty, empty.clone())
        return cls(
            trunks=trunks,
            trunk_lengths=torch.tensor(list(map(len, recording.layout.trunks)), device=device),
            rows=rows,
            row_trunk=row_trunk,
            row_lengths=torch.zeros(len(row_trunk), dtype=torch.long, device=device),
            recurrence=recording.recurrence.kept.rows(row_trunk),
            sources=recording.sources,
        )

    def __post_init__(self) -> None:
        """Arrange rows on a (T, widest group) grid, so that one matrix product serves a trunk."""
        self._arrange()

    def _arrange(self) -> None:
        counts = torch.bincount(self.row_trunk, minlength=len(self.trunk_lengths))
        self._width = max(1, int(counts.max())) if len(counts) else 1
        first = torch.cumsum(counts, 0) - counts
        column = torch.arange(len(self.row_trunk), device=self.row_trunk.device) - first[self.row_trunk]
        self._cell = self.row_trunk * self._width + column
        # Rows are in the order of their trunks, so a full grid needs no gather and no scatter.
        self._is_full = len(self._cell) == len(self.trunk_lengths) * self._width
        longest = _tokens(self.trunks)
        inside = torch.arange(longest, device=self.row_trunk.device)[None] < self.trunk_lengths[:, None]
        self._trunk_bias = torch.where(inside, 0.0, float("-inf"))[self.row_trunk][:, None, None]

    def append(self, other: "ForestCache") -> None:
        """Append newly prefilled trunks and their rows."""
        capacity = max(_tokens(self.rows), _tokens(other.rows))
        longest = max(_tokens(self.trunks), _tokens(other.trunks))
        self.trunks = _concatenate(self.trunks, other.trunks, longest)
        self.rows = _concatenate(self.rows, other.rows, capacity)
        self.recurrence = self.recurrence.append(other.recurrence)
        self.row_trunk = torch.cat([self.row_trunk, other.row_trunk + len(self.trunk_lengths)])
        self.trunk_lengths = torch.cat([self.trunk_lengths, other.trunk_lengths])
        self.row_lengths = torch.cat([self.row_lengths, other.row_lengths])
        self._arrange()

    def keep(self, rows: Tensor) -> None:
        """Keep the rows with these indices (in order), and the trunks that they still need."""
        needed, self.row_trunk = torch.unique(self.row_trunk[rows], return_inverse=True)
        self.rows = {layer: (k[rows], v[rows]) for layer, (k, v) in self.rows.items()}
        self.recurrence = self.recurrence.rows(rows)
        self.row_lengths = self.row_lengths[rows]
        if len(needed) < len(self.trunk_lengths):
            self.trunks = {layer: (k[needed], v[needed]) for layer, (k, v) in self.trunks.items()}
            self.trunk_lengths = self.trunk_lengths[needed]
        self._arrange()

    def begin_step(self) -> None:
        """Provide space for one more token in every row."""
        capacity = _tokens(self.rows)
        longest = int(self.row_lengths.max()) + 1
        if longest > capacity:
            longer = capacity + GROWTH
            self.rows = {
                layer: (_padded(k, longer), _padded(v, longer)) for layer, (k, v) in self.rows.items()
            }
        inside = torch.arange(longest, device=self.row_lengths.device)[None] <= self.row_lengths[:, None]
        self._row_bias = torch.where(inside, 0.0, float("-inf"))[:, None, None]
        self._windowed: dict[int, tuple[Tensor, Tensor]] = {}

    def _biases(self, window: int | None) -> tuple[Tensor, Tensor]:
        """What is added to the scores of trunks (B, 1, 1, P) and rows (B, 1, 1, O): -inf where hidden."""
        if window is None:
            return self._trunk_bias, self._row_bias
        if window not in self._windowed:
            depths = self.trunk_lengths[self.row_trunk] + self.row_lengths
            self._windowed[window] = (
                _hide_up_to(self._trunk_bias, depths - window),
                _hide_up_to(self._row_bias, self.row_lengths - window),
            )
        return self._windowed[window]

    def end_step(self) -> None:
        """Count the token that was added to every row."""
        self.row_lengths = self.row_lengths + 1

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
        """One query a row: (1, H, B, D) over trunk and own tokens; stores the new keys and values."""
        source = self.sources[layer]
        row_key, row_value = self.rows[source]
        trunk_key, trunk_value = self.trunks[source]
        trunk_bias, row_bias = self._biases(scope.window)
        count, heads, size = query.shape[2], row_key.shape[1], query.shape[3]
        if source == layer:
            rows = torch.arange(count, device=query.device)
            row_key[rows, :, self.row_lengths] = key[0].transpose(0, 1)
            row_value[rows, :, self.row_lengths] = value[0].transpose(0, 1)
        longest = row_bias.shape[-1]
        # Scores are fp32, as in other attention kernels: a product of bf16 tensors is itself rounded to bf16,
        # which costs most where a row's scores have much in common. It takes a temporary copy of one layer's
        # keys and more reading; `bmm(out_dtype=)` would take neither, but CPUs do not have it.
        q = query[0].transpose(0, 1).reshape(count, heads, -1, size).float() * (scale or size**-0.5)
        row_scores = q @ row_key[:, :, :longest].float().transpose(2, 3) + row_bias
        trunk_scores = self._to_rows(self._to_grid(q) @ trunk_key.float().transpose(2, 3)) + trunk_bias
        shares = torch.softmax(torch.cat([trunk_scores, row_scores], -1), -1).to(value.dtype)
        trunk_share, row_share = shares.split([trunk_scores.shape[-1], longest], -1)
        output = row_share @ row_value[:, :, :longest]
        output = output + self._to_rows(self._to_grid(trunk_share) @ trunk_value)
        flat: Tensor = output.reshape(count, heads * output.shape[2], size).transpose(0, 1)
        return flat[None]

    def _to_grid(self, x: Tensor) -> Tensor:
        """(B, K, R, X) by row to (T, K, width * R, X) by trunk; empty cells are zero."""
        _, heads, repeat, size = x.shape
        count = len(self.trunk_lengths)
        if self._is_full:
            grid = x
        else:
            grid = x.new_zeros(count * self._width, heads, repeat, size)
            grid[self._cell] = x
        grid = grid.reshape(count, self._width, heads, repeat, size).transpose(1, 2)
        return grid.reshape(count, heads, self._width * repeat, size)

    def _to_rows(self, grid: Tensor) -> Tensor:
        """The inverse of `_to_grid`."""
        count, heads, cells, size = grid.shape
        cells_by_row = grid.view(count, heads, self._width, cells // self._width, size).transpose(1, 2)
        rows = cells_by_row.reshape(count * self._width, heads, -1, size)
        return rows if self._is_full else rows[self._cell]


def _hide_up_to(bias: Tensor, last: Tensor) -> Tensor:
    """Hide, in a bias (B, 1, 1, X), the tokens up to number `last` (B,)."""
    order = torch.arange(bias.shape[-1], device=bias.device)
    return bias.masked_fill(order <= last[:, None, None, None], float("-inf"))


def _tokens(layers: dict[int, KeyValue]) -> int:
    """For how many tokens there is space."""
    return next(iter(layers.values()))[0].shape[2]


def _concatenate(first: dict[int, KeyValue], second: dict[int, KeyValue], length: int) -> dict[int, KeyValue]:
    """Per layer, both along the first axis, padded to `length` tokens on the third."""

    def joined(one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([_padded(one, length), _padded(other, length)])

    return {
        layer: (joined(key, second[layer][0]), joined(value, second[layer][1]))
        for layer, (key, value) in first.items()
    }


def _padded(x: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[2]))
