"""Checks the attention over packed trees, forward and backward, against dense attention in float64.

An error may be three times that of dense attention in the same number format. Packs of many layouts may not
compile many kernels: each costs seconds to minutes in the middle of a run.
"""

import itertools
import random
import time

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from rlcs.doctor.gpu import Check, Setting
from rlcs.doctor.gpu.devices import synchronize
from rlcs.doctor.gpu.models import configuration, shapes
from rlcs.model import attention
from rlcs.model.layout import Layout, layout_of
from rlcs.model.loading import default_device

MOST_GRAPHS = 6
"""Compiled kernels that packs of all layouts may need together."""
FACTOR = 3.0
_LEAST = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
"""Errors that are rounding in any case; a wrong mask costs a hundred times as much."""
_SIZES = (
    [(300, [130, 7, 260, 64])],
    [(1, [1, 1]), (129, [128, 127]), (5, [])],
    [(40, [33] * 8), (700, [50, 400]), (256, [256])],
)
"""Layouts as (trunk, branches): lengths around a kernel's blocks of 128, trees without branches, several."""


def check(setting: Setting) -> Check:
    """Compare outputs and gradients for each model's heads and format, then count compiled kernels."""
    device = torch.device("cpu") if setting.cpu else default_device()
    values: dict[str, float] = {}
    failed = []
    for shape in shapes(setting):
        text = configuration(shape).text_config
        heads = (text.num_attention_heads, text.num_key_value_heads)
        size = text.hidden_size // text.num_attention_heads
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{shape.label} {str(dtype).removeprefix('torch.')}"
            error, limit = _worst(heads, size, dtype, device)
            values |= {f"{name} error": error, f"{name} limit": limit}
            if not error <= limit:
                failed.append(f"{name}: off by {error:.1e} (limit {limit:.1e})")
    graphs, first, later = _graphs(heads, size, device)
    values |= {"graphs": graphs, "first_s": first, "later_s": later}
    if failed:
        return Check(ok=False, message="; ".join(failed), fix="set model.attention=dense", values=values)
    if graphs > MOST_GRAPHS:
        message = f"{graphs} kernels were compiled for 12 packs; {MOST_GRAPHS} are enough"
        return Check(
            ok=False, message=message, fix="runs will be slow; set model.attention=dense", values=values
        )
    worst = max(values[name] / values[name.replace("error", "limit")] for name in values if "error" in name)
    message = f"forward and backward as dense attention ({worst:.0%} of the limit), {graphs} kernels compiled"
    return Check(ok=True, message=message, values=values)


def _worst(
    heads: tuple[int, int], size: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """The largest error of all layouts, and the limit where it is nearest to it."""
    pairs = []
    for seed, sizes in enumerate(_SIZES):
        layout = layout_of(sizes)
        inputs = _inputs(layout, heads, size, device, seed=seed)
        exact = _results("dense", layout, [x.double() for x in inputs])
        plain = _results("dense", layout, [x.to(dtype) for x in inputs])
        ours = _results("auto", layout, [x.to(dtype) for x in inputs])
        for truth, dense, tree in zip(exact, plain, ours, strict=True):
            limit = max(FACTOR * _error(dense, truth), _LEAST[dtype])
            pairs.append((_error(tree, truth), limit))
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def _inputs(
    layout: Layout, heads: tuple[int, int], size: int, device: torch.device, *, seed: int
) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    counts = (heads[0], heads[1], heads[1], heads[0])
    # Rounded to bfloat16, so that all formats compute with the same numbers.
    return [
        torch.randn(1, count, layout.length, size, generator=generator).bfloat16().float().to(device)
        for count in counts
    ]


def _results(kind: str, layout: Layout, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of queries, keys and values."""
    *variables, gradient = inputs
    for variable in variables:
        variable.requires_grad_()
    plan = attention.make_plan(kind, layout, gradient.device)
    output = plan.attend(0, *variables)
    grads = torch.autograd.grad(output, variables, gradient)
    for variable in variables:
        variable.requires_grad_(False)
    return [output.detach(), *grads]


def _error(found: Tensor, truth: Tensor) -> float:
    """Root mean square difference, relative to the truth; infinite for numbers that are not finite."""
    error = float((found.double() - truth).norm() / truth.norm())
    return error if error == error else float("inf")


def _graphs(heads: tuple[int, int], size: int, device: torch.device) -> tuple[int, float, float]:
    """Kernels compiled for 12 packs, seconds of the first pass and of the slowest later one."""
    before, seconds = counters["stats"]["unique_graphs"], []
    draw = random.Random(0)
    for index in range(12):
        trees = [(draw.randint(20, 300), [draw.randint(1, 200) for _ in range(draw.randint(1, 5))])]
        layout = layout_of(list(itertools.chain(trees, [(64 * index + 1, [9])])))
        started = time.perf_counter()
        _results("auto", layout, [x.bfloat16() for x in _inputs(layout, heads, size, device, seed=index)])
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return counters["stats"]["unique_graphs"] - before, round(seconds[0], 3), round(max(seconds[1:]), 3)
