"""Attention over packed trees, in three ways from one `Layout`.

* `DensePlan`: scaled dot-product attention under the plain (L, L) mask. The reference.
* `TreePlan`: flash attention on the blocks that are not masked, and only those. For CPUs.
* `FlexPlan`: a FlexAttention block mask. For GPUs.

A plan reaches every layer through transformers' public forward as the keyword `plan`; `install`
registers the one function that hands the layer's queries, keys and values to it.
Letters in shapes: L tokens, H query heads, K key-value heads, D head size.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from rlcs.packing import Layout, dense_mask

NAME = "rlcs"
"""The name under which transformers knows our attention."""


class Plan(Protocol):
    """How the tokens of one forward pass attend to each other."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries (1, H, L, D), keys and values (1, K, L, D) of one layer to outputs (1, H, L, D)."""
        ...


def install(model: PreTrainedModel) -> None:
    """Make the language model attend by plans; the vision tower keeps its own attention.

    The registry of transformers is process-wide; registering the same function again is harmless.
    """
    AttentionInterface.register(NAME, _attend_by_plan)
    model.set_attn_implementation({"text_config": NAME})


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

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stock attention under the dense mask."""
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=self._mask, enable_gqa=True
        )


class FlexPlan:
    """FlexAttention skips the blocks in which nothing is visible (128 x 128 tokens by default)."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Compile the block mask once for all layers, and the kernel where there is a GPU."""
        self._mask = block_mask(layout, device)
        self._kernel = torch.compile(flex_attention) if device.type == "cuda" else flex_attention

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Block-sparse attention; FlexAttention has no backward on a CPU."""
        output = self._kernel(query, key, value, block_mask=self._mask, enable_gqa=True)
        assert isinstance(output, Tensor)
        return output


def block_mask(layout: Layout, device: torch.device) -> BlockMask:
    """The FlexAttention form of `dense_mask`."""
    tree, branch = (x.to(device) for x in layout.segments())

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        on_path = (branch[k] == 0) | (branch[q] == branch[k])
        return (q >= k) & (tree[q] == tree[k]) & on_path

    size = layout.length
    return create_block_mask(visible, B=None, H=None, Q_LEN=size, KV_LEN=size, device=str(device))


class TreePlan:
    """Flash attention on exactly the visible blocks.

    A trunk attends to itself causally. A branch token's softmax runs over two blocks: the whole
    trunk (no mask at all, all branches of a tree in one call) and its own branch (causal). The
    two partial results are merged by their log-sum-exp, as FlashAttention-2 merges key blocks
    (arXiv 2307.08691, section 3.1); in the backward pass each block needs only the merged output
    and log-sum-exp, so the gradients of the blocks simply add up.
    """

    def __init__(self, layout: Layout) -> None:
        """Nothing is computed ahead: the layout is enough."""
        self._layout = layout

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Exact attention whose cost and memory follow the visible blocks."""
        output = _TreeAttention.apply(query, key, value, self._layout)
        assert isinstance(output, Tensor)
        return output


Block = tuple[slice, slice, bool]
"""Queries, keys, and whether the block is causal."""


def visible_blocks(layout: Layout) -> tuple[list[Block], list[Block]]:
    """All blocks with a visible pair: own-segment blocks (causal), and branches over their trunk."""
    own: list[Block] = []
    over_trunk: list[Block] = []
    for span in layout.trees:
        trunk = slice(span.start, span.start + span.trunk)
        own.append((trunk, trunk, True))
        own += [(slice(a, b), slice(a, b), True) for a, b in span.branch_ranges()]
        if span.branches:
            over_trunk.append((slice(trunk.stop, span.stop), trunk, False))
    return own, over_trunk


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
        own, over_trunk = visible_blocks(layout)
        output = torch.empty_like(query)
        # The kernel's log-sum-exp is fp32 whatever the inputs are.
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        for q, k, causal in own:
            output[:, :, q], lse[:, :, q] = _flash(query[:, :, q], key[:, :, k], value[:, :, k], causal)
        for q, k, causal in over_trunk:
            part, part_lse = _flash(query[:, :, q], key[:, :, k], value[:, :, k], causal)
            merged = torch.logaddexp(lse[:, :, q], part_lse)
            share = torch.exp(part_lse - merged)[..., None].to(output.dtype)
            output[:, :, q] = torch.lerp(output[:, :, q], part, share)
            lse[:, :, q] = merged
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout = layout
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output, lse = ctx.saved_tensors
        grad_output = grads[0]
        own, over_trunk = visible_blocks(ctx.layout)
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        for q, k, causal in (*own, *over_trunk):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_output[:, :, q],
                query[:, :, q],
                key[:, :, k],
                value[:, :, k],
                output[:, :, q],
                lse[:, :, q],
                0.0,
                causal,
            )
            grad_query[:, :, q] += parts[0]
            grad_key[:, :, k] += parts[1]
            grad_value[:, :, k] += parts[2]
        return grad_query, grad_key, grad_value, None


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output (1, H, q, D) and log-sum-exp (1, H, q) of one block."""
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)
    return output, lse


def make_plan(kind: str, layout: Layout, device: torch.device) -> Plan:
    """The plan that the recipe asks for; `auto` is `flex` on a GPU and `tree` on a CPU."""
    if kind == "auto":
        kind = "flex" if device.type == "cuda" else "tree"
    if kind == "tree":
        return TreePlan(layout)
    return FlexPlan(layout, device) if kind == "flex" else DensePlan(layout, device)
