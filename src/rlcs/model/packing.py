"""Packs trees into tensors: layout, positions, targets, token budgets.

Many trees lie end to end in one pack: `[trunk | branch 1 | ... | branch G | trunk | ...]`. A token
sees its own trunk and its own branch up to itself, nothing else; a branch's positions restart
where its trunk ends; the first token of every branch is predicted by the trunk's last token. A branch may
follow another branch in place of the trunk, as deep as one likes: an answer that forks. So
the gradients of a pack are those of the padded, repeated batch. In a conversation earlier replies lie in
the trunk, between images that may come after them; where they are learnt, trunk tokens are targets too.
Branches that begin alike may share tokens (`Tree.merges`); each has its own targets for them. Trees whose
prompts begin alike, with a system message, may share that head: it lies once before all of them, and every
trunk follows it as a branch does.

Letters in shapes: L tokens of the pack, N target tokens (all branch
tokens, and those of the trunk with a loss weight), U different ones (those that branches share count once),
S branches, T trees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rlcs.model.layout import Layout, Segment
from rlcs.records import ImageRef, Prompt
from rlcs.records.trees import Shape, Tree


def trunk_positions(prompt: Prompt) -> Tensor:
    """Compute M-RoPE positions (3, P): time, height, width (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Text counts up in all three; the tokens of an image share a time and count rows and columns;
    what follows starts after the largest position so far. Where a model counts all tokens one by one
    (`Prompt.positions`), all three are the same.
    """
    if prompt.positions == "line":
        return _text_positions(0, len(prompt.ids))
    parts, text_start, next_position = [], 0, 0
    for (start, end), (frames, height, width) in zip(prompt.spans, prompt.grids, strict=True):
        parts.append(_text_positions(next_position, start - text_start))
        next_position += start - text_start
        rows, columns = height // prompt.merge_size, width // prompt.merge_size
        axes = (torch.arange(frames), torch.arange(rows), torch.arange(columns))
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, -1)
        parts.append(grid + next_position)
        next_position += max(frames, rows, columns)
        text_start = end
    parts.append(_text_positions(next_position, len(prompt.ids) - text_start))
    return torch.cat(parts, dim=1)


def _text_positions(start: int, length: int) -> Tensor:
    return torch.arange(start, start + length).expand(3, length)


PixelSource = Callable[[ImageRef, torch.device], Tensor]
"""Returns the processed patches (patches, patch size) of one image, on a device."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Trees as tensors, ready for one forward pass.

    ids (L,), positions (3, L); the images in order with their grids (images, 3), or None. Their patches are
    no part of a pack: `pixels` returns those of one image when the pack is used. Where `kept` is a mapping,
    it holds what a frozen vision tower made of them (see `image_features`). For every target token:
    `sequence` (N,) is its branch (0..S-1), `weights` (N,) its loss weight, `sampler_logprobs` (N,) the
    sampler's logprobs (None if any branch has none). Targets in a trunk come before those of its first
    branch, and have its index in `sequence`. For every different one `predictors` (U,) is the hidden state
    that predicts it, and `targets` (U,) its id; `shared` (N,) is which of them a target is (None: U is N, in
    the same order). `tree_tokens` are those of trees with branches, each with its head. `routes`
    (L, layers, k) are the experts that computed the tokens in sampling, below zero where they are not known
    (None: nowhere). `held` (N,) says which tokens entropy control holds (None: none).
    """

    layout: Layout
    ids: Tensor
    positions: Tensor
    predictors: Tensor
    targets: Tensor
    sequence: Tensor
    weights: Tensor
    sampler_logprobs: Tensor | None
    images: tuple[ImageRef, ...]
    grids: Tensor | None
    pixels: PixelSource
    kept: dict[Any, Any] | None = None
    routes: Tensor | None = None
    held: Tensor | None = None
    shared: Tensor | None = None
    tree_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the language model (L)."""
        return self.ids.numel()

    @property
    def num_targets(self) -> int:
        """Tokens with a loss (N)."""
        return self.sequence.numel()

    @property
    def num_sequences(self) -> int:
        """Branches (S)."""
        return int(self.sequence[-1]) + 1 if self.num_targets else 0

    def of_targets(self, different: Tensor) -> Tensor:
        """From (U, ...) of different targets to (N, ...) of all."""
        # Indexing adds gradients up in a fixed order on every device, as `index_select` does not on GPUs.
        return different if self.shared is None else different[self.shared]

    def to(self, device: torch.device) -> "Pack":
        """The same pack with its tensors on `device`."""
        moved: dict[str, Any] = {k: x.to(device) for k, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


LEAST_SHARE = 0.02
"""Share of a pack's tokens that a common head must save: all that follows it attends in one more block."""


def pack(
    trees: Sequence[Tree], pixels: PixelSource, *, keeps_features: bool = False, shares_head: bool = False
) -> Pack:
    """Lay trees end to end. Every image is included once, however many branches its tree has.

    With `keeps_features` a frozen vision tower runs once, however often the pack goes through the model; with
    `shares_head` what all prompts begin with is computed once.
    """
    if not trees:
        raise ValueError("a pack needs at least one tree")
    shapes = [tree.shape for tree in trees]
    head = _common_head(trees) if shares_head else 0
    layout = _layout(trees, shapes, head)
    branches = [branch for tree in trees for branch in tree.branches]
    of_targets = _Targets.of(trees, shapes, head)
    grids = [grid for tree in trees for grid in tree.prompt.grids]
    with_logprobs = bool(branches) and all(b.logprobs is not None for b in branches)
    return Pack(
        layout=layout,
        ids=torch.tensor(
            [
                *trees[0].prompt.ids[:head],
                *(i for each in zip(trees, shapes, strict=True) for i in _flat_ids(*each)[head:]),
            ],
            dtype=torch.long,
        ),
        positions=torch.cat(
            [
                _text_positions(0, head),
                *(_positions(*each)[:, head:] for each in zip(trees, shapes, strict=True)),
            ],
            dim=1,
        ),
        predictors=torch.tensor(of_targets.predictors, dtype=torch.long),
        targets=torch.tensor(of_targets.targets, dtype=torch.long),
        sequence=torch.repeat_interleave(
            torch.arange(len(branches)), torch.tensor(of_targets.lengths, dtype=torch.long)
        ),
        weights=torch.tensor(of_targets.weights, dtype=torch.float32),
        sampler_logprobs=(
            torch.tensor([x for b in branches for x in b.logprobs or ()], dtype=torch.float32)
            if with_logprobs
            else None
        ),
        images=tuple(image for tree in trees for image in tree.prompt.images),
        grids=torch.tensor(grids, dtype=torch.long) if grids else None,
        pixels=pixels,
        kept={} if keeps_features else None,
        routes=_routes(trees),
        held=_held(trees),
        shared=(
            torch.tensor(of_targets.shared, dtype=torch.long) if any(tree.merges for tree in trees) else None
        ),
        tree_tokens=sum(tree.num_tokens for tree in trees if tree.branches),
    )


@dataclass(slots=True)
class _Targets:
    """The target tokens of a pack (see `Pack`) as lists, with how many (S,) each branch has."""

    predictors: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, trees: Sequence[Tree], shapes: Sequence[Shape], head: int) -> "_Targets":
        """Those of trees that lie behind the `head` tokens that all share."""
        found, before = cls(), 0
        for tree, shape in zip(trees, shapes, strict=True):
            found._add(tree, shape, head, before)
            before += len(tree.prompt.ids) - head + sum(len(part.ids) for part in shape.parts)
        return found

    def _add(self, tree: Tree, shape: Shape, head: int, before: int) -> None:
        """Add those of one tree, with `before` tokens of others between the head and its own."""
        in_trunk = tree.trunk_targets
        self.shared += range(len(self.targets), len(self.targets) + len(in_trunk))
        self.shared += _shared(shape, len(self.targets) + len(in_trunk))
        in_tree = [*(i - 1 for i in in_trunk), *_predictors(tree, shape)]
        self.predictors += [i if i < head else before + i for i in in_tree]
        self.targets += [tree.prompt.ids[i] for i in in_trunk]
        self.targets += [i for part in shape.parts for i in part.ids]
        self.weights += [tree.trunk_weights[i] for i in in_trunk]
        self.weights += [w for b in tree.branches for w in b.weights]
        sizes = [len(branch.ids) for branch in tree.branches]
        self.lengths += [len(in_trunk) + sizes[0], *sizes[1:]] if sizes else []


def _common_head(trees: Sequence[Tree]) -> int:
    """How many tokens all prompts begin with, up to the first image and their last token.

    0 where sharing them costs more than it saves, and with experts to be replayed, which are those of whole
    prompts.
    """
    first, *others = (tree.prompt for tree in trees)
    routed = any(tree.trunk_routes or any(branch.routes for branch in tree.branches) for tree in trees)
    if routed or not others:
        return 0
    limit = min(min([len(each.ids) - 1, *(start for start, _ in each.spans)]) for each in (first, *others))
    head = next((i for i in range(limit) if any(each.ids[i] != first.ids[i] for each in others)), limit)
    return head if head * len(others) >= LEAST_SHARE * sum(tree.num_tokens for tree in trees) else 0


def _held(trees: Sequence[Tree]) -> Tensor | None:
    """See `Pack.held`."""
    if not any(branch.held for tree in trees for branch in tree.branches):
        return None
    flags = list[bool]()
    for tree in trees:
        flags += [False] * len(tree.trunk_targets)
        flags += [index in branch.held for branch in tree.branches for index in range(len(branch.ids))]
    return torch.tensor(flags)


def _routes(trees: Sequence[Tree]) -> Tensor | None:
    """See `Pack.routes`."""
    parts = [
        part
        for tree in trees
        for part in [(tree.prompt.ids, tree.trunk_routes), *((b.ids, b.routes) for b in tree.branches)]
    ]
    known = next((routes for _, routes in parts if routes is not None), None)
    if known is None:
        return None
    table = torch.full((sum(len(ids) for ids, _ in parts), known.layers, known.chosen), -1, dtype=torch.int16)
    start = 0
    for ids, routes in parts:
        if routes is not None and (few := routes.first(len(ids))):
            rows = torch.frombuffer(bytearray(few.data), dtype=torch.int16)
            table[start : start + len(few)] = rows.view(-1, *table.shape[1:])
        start += len(ids)
    return table


def _flat_ids(tree: Tree, shape: Shape) -> list[int]:
    return [*tree.prompt.ids, *(i for part in shape.parts for i in part.ids)]


def _layout(trees: Sequence[Tree], shapes: Sequence[Shape], head: int) -> Layout:
    segments = [Segment(start=0, stop=head)] if head else []
    images: list[tuple[int, int]] = []
    for tree, shape in zip(trees, shapes, strict=True):
        root, start = len(segments), segments[-1].stop if segments else 0
        images += [(start - head + a, start - head + b) for a, b in tree.prompt.spans]
        stop = start - head + len(tree.prompt.ids)
        segments.append(Segment(start=start, stop=stop, parent=0 if head else None))
        for part in shape.parts:
            start, parent = segments[-1].stop, root if part.parent is None else root + 1 + part.parent
            segments.append(Segment(start=start, stop=start + len(part.ids), parent=parent))
    return Layout(segments=tuple(segments), images=tuple(images))


def _positions(tree: Tree, shape: Shape) -> Tensor:
    trunk = trunk_positions(tree.prompt)
    after_trunk = int(trunk.max()) + 1
    positions, ends = [trunk], list[int]()
    for part in shape.parts:
        start = after_trunk if part.parent is None else ends[part.parent]
        ends.append(start + len(part.ids))
        positions.append(_text_positions(start, len(part.ids)))
    return torch.cat(positions, dim=1)


def _predictors(tree: Tree, shape: Shape) -> list[int]:
    """For every token of the parts, the index in the tree of the token before it on its own path."""
    stop = len(tree.prompt.ids)
    predictors, last = list[int](), list[int]()
    for part in shape.parts:
        before = len(tree.prompt.ids) - 1 if part.parent is None else last[part.parent]
        start, stop = stop, stop + len(part.ids)
        predictors += [before, *range(start, stop - 1)]
        last.append(stop - 1)
    return predictors


def _shared(shape: Shape, first: int) -> list[int]:
    """For every token of the branches, which target it is, where those of the parts count from `first`."""
    starts = list(accumulate((len(part.ids) for part in shape.parts), initial=first))
    ranges = (range(starts[i], starts[i] + len(shape.parts[i].ids)) for path in shape.paths for i in path)
    return [index for each in ranges for index in each]
