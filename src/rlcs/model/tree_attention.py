"""Attention over packed trees on CPUs: flash attention on the blocks that are not masked, and only those.

Letters in shapes: L tokens, H query heads, K key-value heads, D head size.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlcs.model.layout import PATH, Bucket, Layout, Scope, Segment, Sight, buckets
from rlcs.model.recurrence import PathRecurrence


class TreePlan:
    """Flash attention on exactly the visible blocks.

    A trunk attends to itself causally. A branch token's softmax runs over two blocks: the whole
    trunk (no mask at all, all branches of a tree in one call) and its own branch (causal). The
    two partial results are merged by their log-sum-exp, as FlashAttention-2 merges key blocks
    (arXiv 2307.08691, section 3.1); in the backward pass each block needs only the merged output
    and log-sum-exp, so the gradients of the blocks simply add up.

    In a layer with a window, or where an image sees itself, a block has a mask if part of it is hidden, and
    keys out of reach are left out.

    Short segments (trunks and branches) of about the same length share one call, padded at their ends,
    where causality hides the padding: hundreds of tiny calls would cost more than they compute. A trunk with
    one branch is one segment, as are all that nothing else follows.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Blocks are found once for all layers that see the same."""
        self._blocks = cache(lambda scope: blocks_of(layout, scope, device))
        self._layout = layout
        self.recurrence = PathRecurrence(layout.joined(), device)

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
        """Exact attention whose cost and memory follow the visible blocks."""
        blocks = self._blocks(scope.within(self._layout))
        output = _TreeAttention.apply(query, key, value, blocks, scale)
        assert isinstance(output, Tensor)
        return output


Rows = slice | Tensor
"""Tokens of a pack: a range, or their numbers."""


@dataclass(frozen=True, slots=True)
class Block:
    """Queries that attend to keys, with a mask (queries, keys) to be added unless all is visible."""

    queries: Rows
    keys: slice
    mask: Tensor | None = None

    @classmethod
    def of(cls, sight: Sight, queries: Tensor, keys: slice) -> "Block":
        """A block with the mask that it needs; its queries are a range where they follow each other."""
        is_range = int(queries[-1] - queries[0]) == len(queries) - 1
        rows = slice(int(queries[0]), int(queries[-1]) + 1) if is_range else queries
        hidden = ~sight.visible(queries[:, None], torch.arange(keys.start, keys.stop))
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf) if bool(hidden.any()) else None
        return cls(rows, keys, mask)

    def to(self, device: torch.device) -> "Block":
        """The same block with its tensors on `device`."""
        rows, mask = self.queries, self.mask
        return Block(
            rows if isinstance(rows, slice) else rows.to(device),
            self.keys,
            None if mask is None else mask.to(device),
        )


PIECE = 256
"""Queries of a segment that attend together where the segment needs a mask."""

ALONE = 64
"""Segments of so many tokens have a call of their own: it costs less than to copy and pad them (4 heads of 32
break even; wider layers do earlier)."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """What is visible in a layer: segments that attend to themselves causally, and blocks of others."""

    alone: list[slice]
    together: list[Bucket]
    others: list[Block]


def blocks_of(layout: Layout, scope: Scope, device: torch.device) -> Blocks:
    """The blocks of a layer with this scope."""
    if scope == PATH:
        layout = layout.joined()
    starts = {start for start, _ in layout.images} if scope.images else set()
    window = layout.length + 1 if scope.window is None else scope.window
    masked = {
        index
        for index, segment in enumerate(layout.segments)
        if len(segment) > window or not starts.isdisjoint(range(segment.start, segment.stop))
    }
    causal = [i for i, segment in enumerate(layout.segments) if len(segment) and i not in masked]
    long = [segment for i in causal if len(segment := layout.segments[i]) >= ALONE]
    short = (i for i in causal if len(layout.segments[i]) < ALONE)
    sight = None if scope == PATH else Sight.of(layout, scope)
    blocks = over_what_they_follow(layout, sight, window)
    if sight is not None:
        blocks = [*_pieces([layout.segments[index] for index in masked], sight, window), *blocks]
    return Blocks(
        [slice(segment.start, segment.stop) for segment in long],
        [bucket.to(device) for bucket in buckets(layout, short)],
        [block.to(device) for block in blocks],
    )


def _pieces(segments: Iterable[Segment], sight: Sight, window: int) -> Iterator[Block]:
    """Segments over themselves: those that are longer than the window or have images."""
    for segment in segments:
        for queries in torch.arange(segment.start, segment.stop).split(PIECE):
            first = max(segment.start, int(queries[0]) - window + 1)
            yield Block.of(sight, queries, slice(first, int(sight.last[queries].max()) + 1))


def over_what_they_follow(layout: Layout, sight: Sight | None, window: int) -> list[Block]:
    """For each segment that others follow, all their tokens (queries) and its own (keys), if near enough."""
    blocks = []
    for segment, end in zip(layout.segments, layout.ends(), strict=True):
        if sight is None and end > segment.stop:
            blocks.append(Block(slice(segment.stop, end), slice(segment.start, segment.stop)))
        elif sight is not None and len(segment):
            queries = torch.arange(segment.stop, end)
            queries = queries[sight.lowest[queries] < sight.depths[segment.stop - 1]]
            keys = slice(max(segment.start, segment.stop - window + 1), segment.stop)
            blocks += [Block.of(sight, queries, keys)] if len(queries) else []
    return blocks


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Blocks,
        scale: float | None,
    ) -> Tensor:
        # Tokens first, (1, L, H, D) in memory, as the projections leave them and the output one takes them.
        output = torch.zeros_like(query.transpose(1, 2)).transpose(1, 2)
        # The kernel's log-sum-exp is at least fp32 whatever the inputs are.
        exact = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_full((1, query.shape[2], query.shape[1]), -math.inf, dtype=exact).transpose(1, 2)
        for own in blocks.alone:
            q, k, v = (x[:, :, own] for x in (query, key, value))
            output[:, :, own], lse[:, :, own] = _flash(q, k, v, 0.0, True, scale=scale)
        for bucket in blocks.together:
            q, k, v = (_padded(bucket, x) for x in (query, key, value))
            part, part_lse = _flash(q, k, v, 0.0, True, scale=scale)
            output[0].transpose(0, 1).index_copy_(0, bucket.source, _unpadded(bucket, part))
            lse[0].transpose(0, 1).index_copy_(0, bucket.source, _unpadded(bucket, part_lse))
        for block in blocks.others:
            rows, keys = block.queries, block.keys
            q, k, v = query[:, :, rows], key[:, :, keys], value[:, :, keys]
            part, part_lse = _flash(q, k, v, 0.0, False, attn_mask=_as(block.mask, q), scale=scale)
            merged = torch.logaddexp(lse[:, :, rows], part_lse)
            share = torch.exp(part_lse - merged)[..., None].to(output.dtype)
            output[:, :, rows] = torch.lerp(output[:, :, rows], part, share)
            lse[:, :, rows] = merged
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, lse = ctx.saved_tensors
        inputs = (grads[0], query, key, value, output, lse)
        totals = [torch.zeros_like(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value)]
        for own in ctx.blocks.alone:
            parts = _flash_backward(*(x[:, :, own] for x in inputs), 0.0, True, scale=ctx.scale)
            for total, part in zip(totals, parts, strict=True):
                total[:, :, own] = part
        for bucket in ctx.blocks.together:
            # A padded query has a zero gradient, so it adds nothing to any key's or value's.
            parts = _flash_backward(*(_padded(bucket, x) for x in inputs), 0.0, True, scale=ctx.scale)
            for total, part in zip(totals, parts, strict=True):
                total[0].transpose(0, 1).index_copy_(0, bucket.source, _unpadded(bucket, part))
        for block in ctx.blocks.others:
            q, k, mask = block.queries, block.keys, _as(block.mask, query)
            chosen = [x[:, :, where] for x, where in zip(inputs, (q, q, k, k, q, q), strict=True)]
            parts = _flash_backward(*chosen, 0.0, False, attn_mask=mask, scale=ctx.scale)
            for total, part, where in zip(totals, parts, (q, k, k), strict=True):
                total[:, :, where] += part
        return totals[0], totals[1], totals[2], None, None


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""From blocks of queries, keys and values: outputs (B, H, q, D) and log-sum-exps (B, H, q)."""

_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""Gradients of queries, keys and values from (grad of output, query, key, value, output, lse)."""


def _as(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask in fp32, or wider where `x` is."""
    return mask.double() if mask is not None and x.dtype == torch.float64 else mask


def _padded(bucket: Bucket, x: Tensor) -> Tensor:
    """(1, H, L, ...) of the pack to (segments, H, longest, ...), zero where there is no token."""
    return bucket.pad(x[0].transpose(0, 1)).transpose(1, 2)


def _unpadded(bucket: Bucket, x: Tensor) -> Tensor:
    """(segments, H, longest, ...) to the tokens alone: (n, H, ...)."""
    return bucket.unpad(x.transpose(1, 2))
