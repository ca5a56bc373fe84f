"""Speeds up wide linear layers on a CPU while their weights stay the same, by copies in oneDNN's own layout.

A plain product of a few rows with a wide weight reads it in an order that costs more than the product.
Narrow weights, and more rows, gain nothing: there oneDNN's calls cost more than plain ones, and its first
call for each number of rows, of which drafts make many, compiles for milliseconds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import psutil
import torch
from torch import Tensor, nn

MEMORY_SHARE = 0.25
"""Largest share of the free memory that the second copy of the weights may take."""
LEAST_WEIGHTS = 1 << 18
"""Elements of the narrowest weight that gains."""
MOST_ROWS = 32
"""Rows up to which a product gains."""


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside, wide fp32 linear layers on a CPU compute few rows with packed copies of the weights of now.

    The results are those of the plain layers to fp32 precision, without gradients. Elsewhere, and where
    memory is short, nothing happens.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and _gains(m.weight)]
    size = sum(layer.weight.nbytes for layer in layers)
    if size > MEMORY_SHARE * psutil.virtual_memory().available:
        layers = []
    try:
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
            layer.forward = partial(_linear, plain=layer.forward, weight=weight, bias=layer.bias)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _gains(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return on_cpu and weight.dtype == torch.float32 and weight.numel() >= LEAST_WEIGHTS


def _linear(
    rows: Tensor, *, plain: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None
) -> Tensor:
    if rows.numel() > MOST_ROWS * rows.shape[-1]:
        return plain(rows)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result
