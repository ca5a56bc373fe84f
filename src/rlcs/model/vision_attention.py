"""Attention in the vision tower: one call a layer for all images and windows.

Every image attends to itself, and in most layers of Qwen2.5-VL every window of it: 100 windows where it has
1,521 tokens. transformers calls its attention once for each of them, unless the attention's name contains
`flash`: then it calls once and says where the windows end. So the attention that is registered here has that
word in its name; it needs no package beside torch.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

NAME = "rlcs_flash_windows"
"""The name of this attention in transformers' registry."""


def attend_by_windows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each window: (1, H, L, D) of all windows to (1, L, H, D).

    The windows end at `cu_seq_lens_q`; they have no mask, and no order (not causal).
    """
    ends: Tensor | None = kwargs.get("cu_seq_lens_q")
    if ends is None or attention_mask is not None or kwargs.get("is_causal") or kwargs.get("dropout"):
        raise ValueError(
            f"attention {NAME!r} is for vision towers that say where windows end, without dropout"
        )
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    if _has_kernel(query):
        longest = int(kwargs["max_length_q"])
        q, k, v = (x.contiguous() for x in rows)
        output = varlen_attn(q, k, v, ends, ends, longest, longest, scale=kwargs.get("scaling"))
        assert isinstance(output, Tensor)
        return output[None], None
    return _by_length(rows, ends.tolist(), kwargs.get("scaling"))[None], None


def _has_kernel(query: Tensor) -> bool:
    """Whether torch's kernel for windows of any lengths takes these queries."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or query.shape[-1] % 8:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def _by_length(rows: list[Tensor], ends: list[int], scale: float | None) -> Tensor:
    """Plain attention, in one call for all windows of a length: three times (L, H, D) to (L, H, D)."""
    starts: dict[int, list[int]] = {}
    for start, end in pairwise(ends):
        starts.setdefault(end - start, []).append(start)
    order = torch.cat([(torch.tensor(s)[:, None] + torch.arange(n)).flatten() for n, s in starts.items()])
    order = order.to(rows[0].device)
    if len(starts) > 1:
        rows = [x.index_select(0, order) for x in rows]
    sizes = [length * len(each) for length, each in starts.items()]
    parts = []
    for (length, each), *group in zip(starts.items(), *(x.split(sizes) for x in rows), strict=True):
        q, k, v = (x.reshape(len(each), length, *x.shape[1:]).transpose(1, 2) for x in group)
        output = nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        parts.append(output.transpose(1, 2).reshape(-1, *rows[0].shape[1:]))
    joined = torch.cat(parts)
    return joined.index_select(0, order.argsort()) if len(starts) > 1 else joined
