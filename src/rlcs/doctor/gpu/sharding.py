"""Checks a step of a sharded model on all ranks against the same step of a whole one.

In float32 both must agree; with float32 weights and work in bfloat16, as recipes train, loss and gradient
norm may differ from float32 by three times what a whole bfloat16 model's do.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rlcs.distributed import ALONE, World, join_world
from rlcs.doctor.gpu import Check, Setting
from rlcs.doctor.gpu.devices import synchronize
from rlcs.doctor.gpu.models import make_chat, random_tree, random_vlm, shapes
from rlcs.model import loading
from rlcs.model.fsdp import whole_weights
from rlcs.model.packing import pack
from rlcs.recipe.execution import Parallel
from rlcs.recipe.stages import Grpo, Optimizer
from rlcs.train.learning import make_objective
from rlcs.train.trainer import Batch, StepResult, Trainer

_LEAST = {"float32": 1e-4, "bfloat16": 1e-2}
"""Relative differences that are rounding in any case."""
_MOVED = 0.05
"""Relative difference of the weights' changes in float32. AdamW's first step is the gradient's sign times the
rate, so gradients near zero change by rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """The result of one step, and how it changed some weights (on rank 0)."""

    result: StepResult
    change: Tensor | None


def check(setting: Setting) -> Check:
    """Take the same step in four ways, then gather tensors for the rate of collectives."""
    with join_world(timeout_s=120) as world:
        device = world.device or torch.device("cpu")
        shape = shapes(setting)[0]
        chat = make_chat(random_vlm(shape, device, torch.float32))
        sides, answers = ([(112, 112)], [9, 14]) if setting.cpu else ([(448, 448)], [200, 150, 170, 90])
        trees = [random_tree(chat, sides, answers, seed=rank) for rank in range(world.size)]
        batches = [Batch(pack=pack([tree], chat.patches)) for tree in trees]

        def take(dtype: torch.dtype, parallel: Parallel | None) -> _Step:
            own = batches if parallel is None else batches[world.rank : world.rank + 1]
            return _step(setting, world, dtype, parallel, own)

        exact = take(torch.float32, None)
        rough = take(torch.bfloat16, None)
        sharded = take(torch.float32, Parallel())
        mixed = take(torch.float32, Parallel(compute_dtype="bfloat16"))
        gaps = {"float32": _gap(sharded, exact), "bfloat16": _gap(mixed, exact)}
        limits = {"float32": _LEAST["float32"], "bfloat16": max(3 * _gap(rough, exact), _LEAST["bfloat16"])}
        moved = _moved(sharded, exact)
        rate = _collective(device, world, 1 << (20 if setting.cpu else 28))
    failed = [f"in {name} off by {gaps[name]:.1e} (limit {limits[name]:.1e})" for name in gaps
              if not gaps[name] <= limits[name]]  # fmt: skip
    failed += [] if moved <= _MOVED else [f"weights change otherwise: by {moved:.1%} (limit {_MOVED:.0%})"]
    values = {"ranks": world.size, "change": moved}
    values |= {
        f"{name} {what}": given[name] for what, given in (("gap", gaps), ("limit", limits)) for name in gaps
    }
    figures = ", ".join(f"{name} {gaps[name]:.1e} ({limits[name]:.1e})" for name in gaps)
    message = "; ".join(failed) or f"{world.size} ranks step as a whole model does: {figures}"
    fix = "start one process without torchrun, or use other versions of torch" if failed else ""
    rates = {} if rate is None else {"collective": rate}
    return Check(ok=not failed, message=message, fix=fix, values=values, rates=rates)


def _step(
    setting: Setting, world: World, dtype: torch.dtype, parallel: Parallel | None, batches: Sequence[Batch]
) -> _Step:
    """Take one step of a fresh model: whole on each rank, or spread over all."""
    device = world.device or torch.device("cpu")
    here = ALONE if parallel is None else world
    vlm = random_vlm(shapes(setting)[0], device, dtype, world=here)
    if parallel is not None:
        vlm = loading.spread(vlm, parallel)
    before = _some_weights(vlm.model, here)
    trainer = Trainer(vlm, Optimizer(weight_decay=0.0), steps=2, max_bad_steps=1)
    result = trainer.step(batches, make_objective(Grpo()), average="token")
    after = _some_weights(vlm.model, here)
    loading.give_back_memory()
    return _Step(result=result, change=None if before is None or after is None else after - before)


def _some_weights(model: torch.nn.Module, world: World) -> Tensor | None:
    """The first layer's weights, whole, on rank 0."""
    weights = whole_weights(model, world, having="language_model.layers.0.")
    if world.rank:
        return None
    return torch.cat([weights[name].float().flatten() for name in sorted(weights)])


def _gap(found: _Step, exact: _Step) -> float:
    """The relative difference of the loss or of the gradient norm, whichever is larger."""
    pairs = [(found.result.loss, exact.result.loss), (found.result.grad_norm, exact.result.grad_norm)]
    gap = max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)
    return gap if gap == gap else float("inf")


def _moved(found: _Step, exact: _Step) -> float:
    if found.change is None or exact.change is None:
        return 0.0  # not rank 0
    return float((found.change - exact.change).norm() / exact.change.norm())


def _collective(device: torch.device, world: World, size: int) -> float | None:
    """Bytes a second that a rank receives when all gather parts of `size` bytes; None for one rank."""
    if world.size == 1:
        return None
    part = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
    whole = torch.empty(world.size * part.numel(), dtype=part.dtype, device=device)
    times = []
    for _ in range(4):
        synchronize(device)
        started = time.perf_counter()
        dist.all_gather_into_tensor(whole, part)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return (world.size - 1) * part.nbytes / min(times[1:])
