"""Speeds up linear layers on a CPU while their weights stay the same, by copies in oneDNN's own layout.

A plain matrix product rearranges the weights every time. Sampling multiplies a few rows by the same weights
for every token, where that, and the code that MKL runs on non-Intel CPUs, cost more than the product itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psutil
import torch
from torch import Tensor, nn

MEMORY_SHARE = 0.25
"""Largest share of the free memory that the second copy of the weights may take."""


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside, fp32 linear layers on a CPU compute with packed copies of the weights that they have now.

    The results are those of the plain layers to fp32 precision, without gradients. Elsewhere, and where
    memory is short, nothing happens.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and _can_be_packed(m.weight)]
    size = sum(layer.weight.nbytes for layer in layers)
    if size > MEMORY_SHARE * psutil.virtual_memory().available:
        layers = []
    try:
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
            layer.forward = partial(_linear, weight=weight, bias=layer.bias)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _can_be_packed(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return on_cpu and weight.dtype == torch.float32


def _linear(rows: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result
