"""Attention over packed trees: three implementations of one `Layout`.

* `DensePlan`: scaled dot-product attention under the plain (L, L) mask. The reference.
* `TreePlan`: flash attention on the blocks that are not masked, and only those. For CPUs.
* `FlexPlan`: a FlexAttention block mask. For GPUs.

A plan reaches every layer through transformers' public forward as the keyword `plan`; `install`
registers the one function that hands the layer's queries, keys and values to it.
Letters in shapes: L tokens, H query heads, K key-value heads, D head size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_static
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from rlcs.errors import TrainingError, UserError, shortage
from rlcs.model import delta_net, vision_attention
from rlcs.model.layout import Bucket, Layout, buckets, dense_mask
from rlcs.model.recurrence import PathRecurrence, Recurrence

NAME = "rlcs"
"""The name of this attention in transformers' registry."""


class Plan(Protocol):
    """Computes what lets tokens see each other in one forward pass.

    `recurrence` is for recurrent layers; with None they compute what transformers' own forward computes.
    """

    @property
    def recurrence(self) -> Recurrence | None:
        """What recurrent layers compute with."""
        ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries (1, H, L, D), keys and values (1, K, L, D) of one layer to outputs (1, H, L, D)."""
        ...


def install(model: PreTrainedModel, *, vision: str = vision_attention.NAME) -> None:
    """Make the language model attend by plans, and the vision tower by windows or as `vision` names it.

    The registry of transformers is process-wide; registering the same functions again is harmless.
    """
    AttentionInterface.register(NAME, _attend_by_plan)
    AttentionInterface.register(vision_attention.NAME, vision_attention.attend_by_windows)
    model.set_attn_implementation({"text_config": NAME, "vision_config": vision})
    delta_net.install(model)


def _attend_by_plan(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    plan: Plan | None = kwargs.get("plan")
    if plan is None:
        raise ValueError(f"attention {NAME!r} needs the keyword `plan`; use 'sdpa' for plain batches")
    if kwargs.get("scaling") not in (None, query.shape[-1] ** -0.5):
        raise ValueError(f"attention {NAME!r} scales by 1/sqrt(head size), not by {kwargs['scaling']}")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return plan.attend(layer, query, key, value).transpose(1, 2), None


class DensePlan:
    """The plain reference: every block is computed, masked ones too."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Build the mask once for all layers."""
        self._mask = dense_mask(layout).to(device)
        self.recurrence = PathRecurrence(layout, device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stock attention under the dense mask."""
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=self._mask, enable_gqa=True
        )


class FlexPlan:
    """FlexAttention skips the blocks in which nothing is visible (128 x 128 tokens)."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Build the block mask once for all layers."""
        self._mask = block_mask(layout, device)
        self.recurrence = PathRecurrence(layout, device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Block-sparse attention; FlexAttention has no backward on a CPU. Raises TrainingError.

        The kernel is never run uncompiled: without the compiler FlexAttention holds all L x L scores.
        """
        kernel = _flex_kernel(query.shape[1], key.shape[1], query.shape[3], query.dtype)
        for x in (query, key, value):  # or a number of blocks that happens to equal one of these is fixed too
            mark_static(x, [1, 3])
        try:
            return kernel(query, key, value, self._mask)
        except (FailOnRecompileLimitHit, TorchDynamoException) as error:
            if shortage(str(error)):  # of memory: reported by those who know what to change
                raise
            reason = " ".join(str(error).split())[:300]
            if isinstance(error, FailOnRecompileLimitHit):
                reason = f"it was compiled {MAX_GRAPHS} times already, which packs never need"
            raise TrainingError(
                f"the attention kernel cannot be compiled: {reason}",
                where="model.attention=flex",
                fix="install a C compiler (gcc) where there is none; see why with TORCH_LOGS=recompiles, "
                "report it with your torch version, and train with model.attention=dense meanwhile",
            ) from error


BLOCK = 128
"""Tokens along a side of FlexAttention's blocks."""

MAX_GRAPHS = 6
"""How often one kernel may be compiled. It is once with gradients and once without; where adapters or frozen
parts begin, a layer has gradients for some of its inputs only."""


@cache
def _flex_kernel(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The kernel for all packs and layers of this shape, compiled in its first call."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
        if not torch.compiler.is_compiling():
            raise TrainingError(
                "the attention kernel was not compiled: torch's compiler is switched off",
                where="model.attention=flex",
                fix="unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE, or set model.attention=dense",
            )
        # The kernel for short queries would be a second one, with a graph of its own.
        options: Any = {"FORCE_USE_FLEX_ATTENTION": True}
        output = flex_attention(query, key, value, block_mask=mask, enable_gqa=True, kernel_options=options)
        assert isinstance(output, Tensor)
        return output

    limits: Any = {"recompile_limit": MAX_GRAPHS, "isolate_recompiles": True}
    compiled: Callable[..., Tensor] = torch.compile(attend, fullgraph=True, dynamic=True, **limits)
    return compiled


def block_mask(layout: Layout, device: torch.device) -> BlockMask:
    """The FlexAttention form of `dense_mask`, computed from the spans alone.

    `create_block_mask` computes the L x L mask first, in 4 bytes each: 7 GiB for 43,000 tokens. This takes
    bytes by the token, and by the block: 16 (L / 128)^2, for the lists of blocks. There are at least two
    blocks a side, for a size of one would need a graph of its own.
    """
    sizes = torch.tensor([len(segment) for segment in layout.segments])
    ends = torch.tensor(layout.ends()).repeat_interleave(sizes).to(device, torch.int32)

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q < ends[k])

    partial, full = _blocks(layout)
    kv, full_kv, q, full_q = (_listed(blocks) for blocks in (partial, full, partial.T, full.T))
    whole = (layout.length, layout.length)
    mask = BlockMask(whole, *kv, *full_kv, *q, *full_q, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible)
    return mask.to(device)


def _blocks(layout: Layout) -> tuple[Tensor, Tensor]:
    """Which blocks (queries, keys) are visible in part, and which as a whole."""
    length = layout.length
    count = max(2, -(-length // BLOCK))
    left = BLOCK * torch.arange(count)[:, None]
    # Segments are cut where blocks of keys begin. The keys of such a piece are seen by the tokens from each
    # of them to the same end: so its first key is seen by the most queries, its last by the fewest.
    segments = [(s.start, end) for s, end in zip(layout.segments, layout.ends(), strict=True) if len(s)]
    starts, ends = torch.tensor(segments).T.contiguous()
    first = torch.cat([starts, torch.arange(0, length, BLOCK)]).unique()
    last = torch.cat([first[1:], torch.tensor([length])]) - 1
    end = ends[torch.searchsorted(starts, first, right=True) - 1]

    def pieces(chosen: Tensor) -> Tensor:
        return torch.zeros(count, count, dtype=torch.int32).index_add_(1, first // BLOCK, chosen.int())

    visible = pieces((first < left + BLOCK) & (end > left)) > 0
    hidden = pieces((last > left) | (end < left + BLOCK)) > 0
    whole = left + BLOCK <= length
    full = visible & ~hidden & whole & whole.T
    return visible & ~full, full


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, and all columns, those of set blocks first."""
    counts = blocks.sum(-1, dtype=torch.int32)
    columns = torch.argsort(blocks.byte().contiguous(), dim=-1, descending=True, stable=True).int()
    return counts[None, None], columns[None, None]


class TreePlan:
    """Flash attention on exactly the visible blocks.

    A trunk attends to itself causally. A branch token's softmax runs over two blocks: the whole
    trunk (no mask at all, all branches of a tree in one call) and its own branch (causal). The
    two partial results are merged by their log-sum-exp, as FlashAttention-2 merges key blocks
    (arXiv 2307.08691, section 3.1); in the backward pass each block needs only the merged output
    and log-sum-exp, so the gradients of the blocks simply add up.

    Segments (trunks and branches) of about the same length share one call, padded at their ends,
    where causality hides the padding: hundreds of tiny calls would cost more than they compute.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Sort the segments into buckets once for all layers."""
        self._buckets = tuple(bucket.to(device) for bucket in segment_buckets(layout))
        self._over_others = over_what_they_follow(layout)
        self.recurrence = PathRecurrence(layout, device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Exact attention whose cost and memory follow the visible blocks."""
        output = _TreeAttention.apply(query, key, value, self._buckets, self._over_others)
        assert isinstance(output, Tensor)
        return output


Ranges = tuple[tuple[slice, slice], ...]
"""Queries and keys of blocks without a mask."""


def segment_buckets(layout: Layout) -> list[Bucket]:
    """Put every trunk and every branch, which attend to themselves causally, into buckets by length."""
    order = sorted(range(len(layout.segments)), key=lambda i: layout.segments[i].parent is not None)
    return buckets(layout, order)


def over_what_they_follow(layout: Layout) -> Ranges:
    """For each segment that others follow, all their tokens (queries) and its own (keys)."""
    return tuple(
        (slice(segment.stop, end), slice(segment.start, segment.stop))
        for segment, end in zip(layout.segments, layout.ends(), strict=True)
        if end > segment.stop
    )


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, buckets: tuple[Bucket, ...], over_others: Ranges
    ) -> Tensor:
        # Tokens first, (1, L, H, D) in memory, as the projections leave them and the output one takes them.
        output = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
        # The kernel's log-sum-exp is at least fp32 whatever the inputs are.
        exact = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(1, query.shape[2], query.shape[1], dtype=exact).transpose(1, 2)
        for bucket in buckets:
            q, k, v = (_padded(bucket, x) for x in (query, key, value))
            part, part_lse = _flash(q, k, v, True)
            output[0].transpose(0, 1).index_copy_(0, bucket.source, _unpadded(bucket, part))
            lse[0].transpose(0, 1).index_copy_(0, bucket.source, _unpadded(bucket, part_lse))
        for rows, keys in over_others:
            part, part_lse = _flash(query[:, :, rows], key[:, :, keys], value[:, :, keys], False)
            merged = torch.logaddexp(lse[:, :, rows], part_lse)
            share = torch.exp(part_lse - merged)[..., None].to(output.dtype)
            output[:, :, rows] = torch.lerp(output[:, :, rows], part, share)
            lse[:, :, rows] = merged
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.blocks = (buckets, over_others)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, lse = ctx.saved_tensors
        inputs = (grads[0], query, key, value, output, lse)
        buckets, over_others = ctx.blocks
        totals = [torch.zeros_like(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value)]
        for bucket in buckets:
            # A padded query has a zero gradient, so it adds nothing to any key's or value's.
            for total, part in zip(
                totals, _flash_backward([_padded(bucket, x) for x in inputs], True), strict=True
            ):
                total[0].transpose(0, 1).index_copy_(0, bucket.source, _unpadded(bucket, part))
        for q, k in over_others:
            where = (q, q, k, k, q, q)
            parts = _flash_backward([x[:, :, w] for x, w in zip(inputs, where, strict=True)], False)
            for total, part, w in zip(totals, parts, (q, k, k), strict=True):
                total[:, :, w] += part
        return totals[0], totals[1], totals[2], None, None


def _padded(bucket: Bucket, x: Tensor) -> Tensor:
    """(1, H, L, ...) of the pack to (segments, H, longest, ...), zero where there is no token."""
    return bucket.pad(x[0].transpose(0, 1)).transpose(1, 2)


def _unpadded(bucket: Bucket, x: Tensor) -> Tensor:
    """(segments, H, longest, ...) to the tokens alone: (n, H, ...)."""
    return bucket.unpad(x.transpose(1, 2))


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, q, D) and log-sum-exps (B, H, q) of blocks."""
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)
    return output, lse


def _flash_backward(inputs: list[Tensor], causal: bool) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values from (grad of output, query, key, value, output, lse)."""
    return tuple(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, 0.0, causal))


def require_usable(kind: str, device: torch.device) -> None:
    """Raise UserError if this kind of attention cannot train on this device."""
    cuda = device.type == "cuda"
    if (kind == "flex" and not cuda) or (kind == "tree" and cuda):
        raise UserError(
            "its kernel is for CPUs only" if cuda else "FlexAttention has no backward pass on a CPU",
            where=f"model.attention={kind}",
            fix=f"set model.attention=auto ({'flex' if cuda else 'tree'} on this device), or dense",
        )


def make_plan(kind: str, layout: Layout, device: torch.device) -> Plan:
    """Make the plan of this kind (`model.attention`); `auto` is `flex` on a GPU and `tree` on a CPU."""
    if kind == "auto":
        kind = "flex" if device.type == "cuda" else "tree"
    if kind == "tree":
        return TreePlan(layout, device)
    return FlexPlan(layout, device) if kind == "flex" else DensePlan(layout, device)
