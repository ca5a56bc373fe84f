"""Attention over packed trees: three implementations of one `Layout`.

* `DensePlan`: scaled dot-product attention under the plain (L, L) mask. The reference.
* `tree_attention.TreePlan`: flash attention on the blocks that are not masked, and only those. For CPUs.
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
from rlcs.model.layout import PATH, Layout, Scope, Sight, dense_mask
from rlcs.model.recurrence import PathRecurrence, Recurrence
from rlcs.model.tree_attention import TreePlan

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
        """Queries (1, H, L, D), keys and values (1, K, L, D) of one layer to outputs (1, H, L, D).

        `scope` is what the layer's tokens see, `scale` the factor of scores (None: 1 / sqrt(D)).
        """
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
    scale = kwargs.get("scaling")
    window = kwargs.get("sliding_window")
    config: Any = getattr(module, "config", None)
    images = window is not None and getattr(config, "use_bidirectional_attention", None) == "vision"
    output = plan.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query,
        key,
        value,
        scope=Scope(window=window, images=images),
        scale=None if scale == query.shape[-1] ** -0.5 else scale,
    )
    return output.transpose(1, 2), None


class DensePlan:
    """The plain reference: every block is computed, masked ones too."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Masks are built once for all layers that see the same."""
        self._mask = cache(lambda scope: dense_mask(layout, scope).to(device))
        self._layout = layout
        self.recurrence = PathRecurrence(layout, device)

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
        """Stock attention under the dense mask."""
        mask = self._mask(scope.within(self._layout))
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )


class FlexPlan:
    """FlexAttention skips the blocks in which nothing is visible (128 x 128 tokens)."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Block masks are built once for all layers that see the same."""
        self._mask = cache(lambda scope: block_mask(layout, device, scope))
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
        """Block-sparse attention; FlexAttention has no backward on a CPU. Raises TrainingError.

        The kernel is never run uncompiled: without the compiler FlexAttention holds all L x L scores.
        """
        shape = query.shape[1], key.shape[1], query.shape[3]
        kernel = _flex_kernel(shape, query.dtype, scope != PATH, scale)
        for x in (query, key, value):  # or a number of blocks that happens to equal one of these is fixed too
            mark_static(x, [1, 3])
        try:
            return kernel(query, key, value, self._mask(scope))
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
def _flex_kernel(
    shape: tuple[int, int, int], dtype: torch.dtype, scoped: bool, scale: float | None
) -> Callable[..., Tensor]:
    """The kernel for all packs and layers of this (H, K, D), compiled in its first call.

    Masks of layers that see less than their path, or more, are computed by other code (`scoped`).
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
        if not torch.compiler.is_compiling():
            raise TrainingError(
                "the attention kernel was not compiled: torch's compiler is switched off",
                where="model.attention=flex",
                fix="unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE, or set model.attention=dense",
            )
        # The kernel for short queries would be a second one, with a graph of its own.
        options: Any = {"FORCE_USE_FLEX_ATTENTION": True}
        output = flex_attention(
            query, key, value, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options
        )
        assert isinstance(output, Tensor)
        return output

    limits: Any = {"recompile_limit": MAX_GRAPHS, "isolate_recompiles": True}
    compiled: Callable[..., Tensor] = torch.compile(attend, fullgraph=True, dynamic=True, **limits)
    return compiled


def block_mask(layout: Layout, device: torch.device, scope: Scope = PATH) -> BlockMask:
    """The FlexAttention form of `dense_mask`, computed from the spans alone.

    `create_block_mask` computes the L x L mask first, in 4 bytes each: 7 GiB for 43,000 tokens. This takes
    bytes by the token, and by the block: 16 (L / 128)^2, for the lists of blocks. There are at least two
    blocks a side, for a size of one would need a graph of its own.
    """
    sight = Sight.of(layout, scope).to(device)

    def on_path(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q < sight.ends[k])

    def scoped(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sight.visible(q, k)

    partial, full = _blocks(layout, scope)
    kv, full_kv, q, full_q = (_listed(blocks) for blocks in (partial, full, partial.T, full.T))
    whole = (layout.length, layout.length)
    visible = on_path if scope == PATH else scoped
    mask = BlockMask(whole, *kv, *full_kv, *q, *full_q, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible)
    return mask.to(device)


def _blocks(layout: Layout, scope: Scope) -> tuple[Tensor, Tensor]:
    """Which blocks (queries, keys) are visible in part, and which as a whole."""
    length = layout.length
    count = max(2, -(-length // BLOCK))
    images = torch.tensor(layout.images if scope.images else (), dtype=torch.long).view(-1, 2)
    segments = [(s.start, end) for s, end in zip(layout.segments, layout.ends(), strict=True) if len(s)]
    starts, ends = torch.tensor(segments).T.contiguous()
    # The pack is cut where segments, images and blocks begin: depths count up within such a piece.
    first = torch.cat([starts, torch.arange(0, length, BLOCK), images.flatten()])
    first = first[first < length].unique()
    last = torch.cat([first[1:], torch.tensor([length])]) - 1
    segment = torch.searchsorted(starts, first, right=True) - 1
    depths = layout.depths().int()
    image = torch.searchsorted(images[:, 0].contiguous(), first, right=True) - 1
    inside = image >= 0
    inside[inside.clone()] = first[inside] < images[image[inside], 1]
    together = (image[:, None] == image) & inside[:, None] & inside
    # By how many tokens queries are deeper than keys, at least and at most; all between occur.
    nearest, farthest = (depths[a][:, None] - depths[b] for a, b in ((first, last), (last, first)))
    on_path = (first[:, None] >= starts[segment]) & (first[:, None] < ends[segment])
    window = length + 1 if scope.window is None else scope.window
    some = on_path & (nearest < window) & ((farthest >= 0) | together)
    every = on_path & (farthest < window) & ((nearest >= 0) | together)

    def blocks(pieces: Tensor) -> Tensor:
        rows = torch.zeros(count, len(first), dtype=torch.int32).index_add_(0, first // BLOCK, pieces.int())
        return torch.zeros(count, count, dtype=torch.int32).index_add_(1, first // BLOCK, rows) > 0

    whole = BLOCK * (torch.arange(count) + 1) <= length
    full = blocks(some) & ~blocks(~every) & whole[:, None] & whole
    return blocks(some) & ~full, full


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, and all columns, those of set blocks first."""
    counts = blocks.sum(-1, dtype=torch.int32)
    columns = torch.argsort(blocks.byte().contiguous(), dim=-1, descending=True, stable=True).int()
    return counts[None, None], columns[None, None]


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
