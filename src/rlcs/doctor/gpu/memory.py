"""Checks the planned memory of a training step against the peak that is measured."""

from dataclasses import replace

import torch

from rlcs.doctor.gpu import REPORT, Check, Setting
from rlcs.doctor.gpu.devices import peak_bytes
from rlcs.doctor.gpu.models import configuration, make_chat, random_tree, random_vlm, shapes
from rlcs.model.loading import default_device
from rlcs.model.packing import pack
from rlcs.plan.memory import Load, Passing, activations, update_peak
from rlcs.plan.skeleton import measure
from rlcs.recipe.stages import Grpo, Optimizer
from rlcs.train.learning import make_objective
from rlcs.train.trainer import Batch, Trainer

MOST = 1.15
"""Measured bytes may be so many times the planned ones: a plan that promises too much ends in hour three."""
_GB = 2**30


def check(setting: Setting) -> Check:
    """Measure the peak of a step over one full pack, with and without recomputed activations."""
    device = torch.device("cpu") if setting.cpu else default_device()
    lines, failed = [], []
    values: dict[str, float] = {}
    worst = 0.0
    for checkpointing in (False, True):
        measured, planned = _peaks(setting, device, checkpointing)
        how = "recomputed" if checkpointing else "kept"
        line = f"activations {how}: {measured / _GB:.2f} GB measured, {planned / _GB:.2f} GB planned"
        lines.append(line)
        values |= {f"{how} measured": measured, f"{how} planned": planned}
        worst = max(worst, measured / planned)
        failed += [line] if measured > MOST * planned else []
    fix = f"choose pack_tokens so that `rlcs plan` leaves {worst - 1:.0%} of the GPU free, and {REPORT}"
    return Check(ok=not failed, message="; ".join(failed or lines), fix=fix if failed else "", values=values)


def _peaks(setting: Setting, device: torch.device, checkpointing: bool) -> tuple[float, float]:
    """Measured and planned bytes of gradients and activations."""
    shape = shapes(setting)[0]
    dtype = torch.float32 if setting.cpu else torch.bfloat16
    if not setting.cpu:
        shape = replace(shape, layers=4, vocabulary=151936)
    vlm = random_vlm(shape, device, dtype, checkpointing=checkpointing)
    chat = make_chat(vlm)
    sides, answers = ([(168, 168)], [120] * 4) if setting.cpu else ([(840, 840)], [600] * 4)
    trees = [random_tree(chat, sides, answers, seed=seed) for seed in range(1 if setting.cpu else 2)]
    batch = Batch(pack=pack(trees, chat.patches))
    trainer = Trainer(vlm, Optimizer(), steps=3, max_bad_steps=1)
    objective = make_objective(Grpo())
    trainer.step([batch], objective, average="token")  # from here on the optimiser has its state
    trainer.optimizer.zero_grad(set_to_none=True)
    measured = peak_bytes(lambda: trainer.step([batch], objective, average="token"), device)
    sizes = measure(shape.name, configuration(shape))
    assert batch.pack.grids is not None, "its trees have images"
    load = Load(
        tokens=batch.pack.num_tokens,
        targets=batch.pack.num_targets,
        patches=int(batch.pack.grids.prod(dim=1).sum()),
    )
    element = dtype.itemsize
    how = Passing(element=element, checkpointing=checkpointing, trains=list(sizes.parameters))
    return measured, update_peak(element * sizes.total, activations(sizes, load, how), packs=1)
