"""Keys and values of many sequences, each in a slot of its own: they grow, move and part in place.

Letters in shapes: S slots, of which the first are in use, K key-value heads, C tokens for which there is
space, D head size; Q queries, R query heads per key-value head.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]

Indices = NDArray[np.int64]


class Slots:
    """Keys and values (S, K, C, D) by layer. Beyond a sequence's length is anything finite."""

    def __init__(self, layers: Mapping[int, KeyValue]) -> None:
        """All slots of `layers` are in use."""
        self.layers = dict(layers)
        self.count = self._shape[0]

    @property
    def _shape(self) -> tuple[int, int]:
        key = next(iter(self.layers.values()))[0]
        return key.shape[0], key.shape[2]

    @property
    def space(self) -> int:
        """Number of slots, in use or not."""
        return self._shape[0]

    @property
    def tokens(self) -> int:
        """For how many tokens of each sequence there is space."""
        return self._shape[1]

    def reserve(self, count: int, tokens: int) -> None:
        """Make space for so many sequences, of so many tokens each."""
        slots, space = self._shape
        if count <= slots and tokens <= space:
            return
        shape = max(count, slots), max(tokens, space)
        self.layers = {
            layer: (self._grown(key, *shape), self._grown(value, *shape))
            for layer, (key, value) in self.layers.items()
        }

    def _grown(self, x: Tensor, slots: int, tokens: int) -> Tensor:
        grown = x.new_zeros(slots, x.shape[1], tokens, x.shape[3])
        grown[: self.count, :, : x.shape[2]] = x[: self.count]
        return grown

    def append(self, other: "Slots") -> None:
        """Take in the sequences of others, after those that are here."""
        first = self.count
        self.reserve(first + other.count, other.tokens)
        self.count = first + other.count
        for layer, pair in other.layers.items():
            for own, more in zip(self.layers[layer], pair, strict=True):
                own[first : self.count, :, : other.tokens] = more[: other.count]

    def arrange(self, chosen: Sequence[int], tokens: int) -> None:
        """Let slot i go on with the first `tokens` tokens of what is in slot `chosen[i]`."""
        moves = [(place, source) for place, source in enumerate(chosen) if place != source]
        self.reserve(len(chosen), self.tokens)
        self.count = len(chosen)
        if not moves or not tokens:
            return
        device = next(iter(self.layers.values()))[0].device
        places, sources = torch.tensor(moves, device=device).T
        for pair in self.layers.values():
            for x in pair:
                x[places, :, :tokens] = x[sources, :, :tokens]


def settled(sources: Sequence[int]) -> list[int]:
    """An order of elements in which as many as possible are in the slot that they come from.

    Element i comes from slot `sources[i]`; several may come from one, and some slots are free.
    """
    places: list[int | None] = [None] * len(sources)
    rest = []
    for element, source in enumerate(sources):
        if source < len(places) and places[source] is None:
            places[source] = element
        else:
            rest.append(element)
    others = iter(rest)
    return [next(others) if element is None else element for element in places]


class Grid:
    """Places queries on a grid of (groups, widest group), so that one matrix product serves a group."""

    def __init__(self, groups: Indices, count: int, device: torch.device) -> None:
        """`groups` (Q,) is the group of each query, below `count`."""
        sizes = np.bincount(groups, minlength=count)
        self._count, self._width = count, int(sizes.max(initial=1))
        order = np.argsort(groups, kind="stable")
        column = np.empty_like(groups)
        column[order] = np.arange(len(groups)) - (np.cumsum(sizes) - sizes)[groups[order]]
        cells = groups * self._width + column
        # A full grid in the order of the queries needs no gather and no scatter.
        self._is_plain = len(cells) == count * self._width and bool((np.diff(cells) == 1).all())
        self._cells = torch.empty(0) if self._is_plain else torch.from_numpy(cells).to(device)

    def spread(self, x: Tensor) -> Tensor:
        """(Q, K, R, X) by query to (groups, K, width * R, X); empty cells are zero."""
        _, heads, repeat, size = x.shape
        if self._is_plain:
            grid = x
        else:
            grid = x.new_zeros(self._count * self._width, heads, repeat, size)
            grid[self._cells] = x
        if self._width == 1:
            return grid
        grid = grid.view(self._count, self._width, heads, repeat, size).transpose(1, 2)
        return grid.reshape(self._count, heads, self._width * repeat, size)

    def gather(self, grid: Tensor) -> Tensor:
        """The inverse of `spread`."""
        count, heads, cells, size = grid.shape
        if self._width > 1:
            by_query = grid.view(count, heads, self._width, cells // self._width, size).transpose(1, 2)
            grid = by_query.reshape(count * self._width, heads, -1, size)
        return grid if self._is_plain else grid[self._cells]
