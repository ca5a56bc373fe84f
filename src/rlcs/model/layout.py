"""The shape of a pack of trees: segments that lie end to end, and what each may see.

Letters in shapes: L tokens of the pack, n of those in a bucket.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Tokens `start` to `stop` of a pack that follow each other: a trunk, or a branch.

    `parent` is the index of the segment whose last token they follow; None: nothing comes before them.
    """

    start: int
    stop: int
    parent: int | None = None

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The shape of a pack, from which every layer's view of it is derived.

    `segments` lie end to end, depth first: what follows a segment, directly or not, comes right after it.
    `images` are the ranges of tokens of one image each, which some families let see each other.
    """

    segments: tuple[Segment, ...]
    images: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Check that segments lie end to end and depth first."""
        path: list[int] = []
        for index, segment in enumerate(self.segments):
            while path and path[-1] != segment.parent:
                path.pop()
            before = self.segments[index - 1].stop if index else 0
            if segment.start != before or (segment.parent is not None and not path):
                raise ValueError(f"segment {index} does not lie where a walk depth first reaches it")
            path.append(index)

    @property
    def length(self) -> int:
        """Tokens of the pack (L)."""
        return self.segments[-1].stop if self.segments else 0

    @property
    def trunks(self) -> tuple[Segment, ...]:
        """The segments before which nothing comes, in order."""
        return tuple(segment for segment in self.segments if segment.parent is None)

    def ends(self) -> list[int]:
        """For every segment, one past the last token that may see it: of all that follows it."""
        ends = [segment.stop for segment in self.segments]
        for index in reversed(range(len(ends))):
            parent = self.segments[index].parent
            if parent is not None:
                ends[parent] = max(ends[parent], ends[index])
        return ends

    def depths(self) -> Tensor:
        """How many tokens come before each token on its own path (L,)."""
        starts: list[int] = []
        for segment in self.segments:
            parent = segment.parent
            starts.append(0 if parent is None else starts[parent] + len(self.segments[parent]))
        parts = [torch.arange(len(s)) + d for s, d in zip(self.segments, starts, strict=True)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)

    def joined(self) -> "Layout":
        """The same pack, in which a segment and the only one that follows it are one: tokens see the same."""
        followers = Counter(segment.parent for segment in self.segments)
        made: list[Segment] = []
        places: list[int] = []
        for segment in self.segments:
            parent = segment.parent
            if parent is not None and followers[parent] == 1:  # it comes right after its parent
                made[-1] = replace(made[-1], stop=segment.stop)
            else:
                made.append(replace(segment, parent=None if parent is None else places[parent]))
            places.append(len(made) - 1)
        return Layout(segments=tuple(made), images=self.images)


@dataclass(frozen=True, slots=True)
class Scope:
    """What the tokens of one layer see of their own path up to themselves: all, or the last `window` tokens.

    With `images` a token of an image also sees those after it in the same image.
    """

    window: int | None = None
    images: bool = False

    def within(self, layout: Layout) -> "Scope":
        """The plainest scope that means the same in a pack."""
        window = self.window
        if window is not None and (not layout.length or window > int(layout.depths().max())):
            window = None
        return Scope(window=window, images=self.images and bool(layout.images))


PATH = Scope()
"""Tokens see all of their path."""


def layout_of(sizes: Sequence[tuple[int, Sequence[int]]]) -> Layout:
    """Lay trees of (trunk length, branch lengths) end to end."""
    segments: list[Segment] = []
    start = 0
    for trunk, branches in sizes:
        root = len(segments)
        for parent, length in [(None, trunk), *((root, n) for n in branches)]:
            segments.append(Segment(start=start, stop=start + length, parent=parent))
            start += length
    return Layout(segments=tuple(segments))


@dataclass(frozen=True, slots=True)
class Sight:
    """What each token sees, and who sees it, in numbers (L,): from these any mask follows.

    A token sees keys up to `last` (itself, or the end of its image) with `depths` above its `lowest`. It is
    seen by tokens before `ends`, where all that follows its segment ends: segments lie depth first.
    """

    last: Tensor
    ends: Tensor
    depths: Tensor
    lowest: Tensor

    @classmethod
    def of(cls, layout: Layout, scope: Scope) -> "Sight":
        """What the tokens of a pack see in layers of this scope."""
        sizes = torch.tensor([len(segment) for segment in layout.segments])
        last, depths = torch.arange(layout.length), layout.depths()
        for start, stop in layout.images if scope.images else ():
            last[start:stop] = stop - 1
        lowest = torch.full_like(depths, -1) if scope.window is None else depths - scope.window
        ends = torch.tensor(layout.ends()).repeat_interleave(sizes)
        return cls(*(x.int() for x in (last, ends, depths, lowest)))

    def to(self, device: torch.device) -> "Sight":
        """The same on `device`."""
        return Sight(*(x.to(device) for x in (self.last, self.ends, self.depths, self.lowest)))

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether tokens see others, both by their numbers in the pack."""
        before_end = (key <= self.last[query]) & (query < self.ends[key])
        return before_end & (self.depths[key] > self.lowest[query])


def dense_mask(layout: Layout, scope: Scope = PATH) -> Tensor:
    """Make the reference mask: (L, L) booleans, true where a query (row) may see a key (column)."""
    order = torch.arange(layout.length)
    return Sight.of(layout, scope).visible(order[:, None], order)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Segments of about the same length: tokens `source` (n,) of the pack, padded into `cells` (n,).

    `members` are the indices of the segments. Cells count through (members, `longest` tokens).
    """

    members: tuple[int, ...]
    longest: int
    source: Tensor
    cells: Tensor

    def to(self, device: torch.device) -> "Bucket":
        """The same bucket with its indices on `device`."""
        return Bucket(self.members, self.longest, self.source.to(device), self.cells.to(device))

    def pad(self, x: Tensor) -> Tensor:
        """(L, ...) of the pack to (members, longest, ...), zero where there is no token."""
        padded = x.new_zeros(len(self.members) * self.longest, *x.shape[1:])
        padded.index_copy_(0, self.cells, x.index_select(0, self.source))
        return padded.view(len(self.members), self.longest, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """(members, longest, ...) to the tokens alone: (n, ...)."""
        return x.reshape(-1, *x.shape[2:]).index_select(0, self.cells)


PADDING_SHARE = 0.25
"""A segment joins a bucket if it is at most this much shorter than the bucket's longest."""

TINY = 16
"""Segments up to this long all share a bucket."""


def buckets(layout: Layout, chosen: Iterable[int]) -> list[Bucket]:
    """Put the chosen segments into buckets by length, each padded at its end."""
    groups: list[list[int]] = []
    sizes = [len(segment) for segment in layout.segments]
    for index in sorted(chosen, key=lambda index: -sizes[index]):
        longest = sizes[groups[-1][0]] if groups else 0
        if not groups or sizes[index] < (1 - PADDING_SHARE) * longest > (1 - PADDING_SHARE) * TINY:
            groups.append([])
        groups[-1].append(index)
    made = []
    for group in groups:
        longest, spans = sizes[group[0]], [layout.segments[index] for index in group]
        source = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        cells = torch.cat([row * longest + torch.arange(len(span)) for row, span in enumerate(spans)])
        made.append(Bucket(tuple(group), longest, source, cells))
    return made
