"""Checks that a checkpoint gives back what was saved, that damage is noticed, and how fast the disk is."""

import os
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from rlcs.distributed import World, join_world
from rlcs.doctor.gpu import REPORT, Check, Setting
from rlcs.doctor.gpu.devices import seconds_of
from rlcs.doctor.gpu.models import Shape, make_chat, random_tree, random_vlm, shapes
from rlcs.model import loading
from rlcs.model.checkpoints import folder_of
from rlcs.model.packing import pack
from rlcs.model.vlm import Vlm
from rlcs.recipe.execution import Parallel
from rlcs.recipe.stages import Grpo, Optimizer
from rlcs.train import state as training
from rlcs.train.checkpoint import Checkpoints
from rlcs.train.learning import make_objective
from rlcs.train.trainer import Batch, Trainer

_GB = 1e9


def check(setting: Setting) -> Check:
    """Save after a step, from a copy; restore into another model, compare; then damage a byte."""
    folder = Path(setting.folder) / "checkpoints"
    with join_world(timeout_s=300) as world:
        device = world.device or torch.device("cpu")
        trainer = _trained(setting, device, world, seed=1)
        state = training.capture(trainer.vlm.model, trainer.optimizer, step=1, cursor={"at": 3})
        saved = _own_state(trainer)
        checkpoints = Checkpoints(folder, world)
        started = time.perf_counter()
        checkpoints.start(state, keep=1)
        still = time.perf_counter() - started
        with torch.no_grad():
            for _, parameter in trainer.vlm.parameters():
                parameter.zero_()  # as training does: what is written is a copy
        checkpoints.wait()
        wrote = time.perf_counter() - started
        path = folder / folder_of(1)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        world.first(lambda: _forget(path))
        other = _trained(setting, device, world, seed=2)
        started = time.perf_counter()
        loaded = Checkpoints(folder, world).load_latest()
        if loaded is not None:
            training.restore(loaded, other.vlm.model, other.optimizer)
        read = time.perf_counter() - started
        wrong = [] if loaded is not None else ["the checkpoint is not found again"]
        wrong += _differences(saved, _own_state(other)) if loaded is not None else []
        noticed = loaded is None or world.first(lambda: _damage_is_noticed(folder, path))
        wrong += [] if noticed else ["a damaged byte is not noticed"]
        faults = [fault for of_rank in world.gather(wrong) for fault in of_rank]
    rates = {"disk_write": size / world.size / wrote, "disk_read": size / world.size / read}
    if device.type == "cuda":
        rates["to_host"] = _to_host(device)
    if faults:
        fix = f"start it in a folder on another disk; if it fails there too, {REPORT}"
        return Check(ok=False, message="; ".join(faults[:3]), fix=fix, rates=rates)
    message = f"{size / _GB:.2f} GB saved in {wrote:.1f} s, for {still:.2f} s of which training stood still, "
    message += f"and restored in {read:.1f} s, all equal; damage is noticed"
    values = {"bytes": size, "ranks": world.size, "still_s": still, "save_s": wrote, "restore_s": read}
    return Check(ok=True, message=message, values=values, rates=rates)


def _trained(setting: Setting, device: torch.device, world: World, *, seed: int) -> Trainer:
    """A sharded model after one step, which gives its optimiser a state."""
    first = shapes(setting)[0]
    shape = Shape(name=first.name, layers=2 if setting.cpu else 4, blocks=first.blocks)
    vlm: Vlm = random_vlm(shape, device, torch.float32, seed=seed, world=world)
    vlm = loading.spread(vlm, Parallel())
    chat = make_chat(vlm)
    trainer = Trainer(vlm, Optimizer(), steps=2, max_bad_steps=1)
    batch = Batch(pack=pack([random_tree(chat, [(112, 112)], [9, 14], seed=seed)], chat.patches))
    trainer.step([batch], make_objective(Grpo()), average="token")
    return trainer


def _own_state(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of this rank's weights and optimiser state, in main memory."""
    parameters = dict(trainer.vlm.model.named_parameters())
    tensors = {f"weight/{name}": parameter for name, parameter in parameters.items()}
    tensors |= training.optimizer_to_tensors(trainer.optimizer, parameters).tensors
    found = {}
    for name, tensor in tensors.items():
        own = tensor.detach()
        found[name] = (own.to_local() if hasattr(own, "to_local") else own).cpu().clone()
    return found


def _differences(saved: dict[str, Tensor], restored: dict[str, Tensor]) -> list[str]:
    if saved.keys() != restored.keys():
        return ["other tensors came back"]
    changed = [name for name in saved if not torch.equal(saved[name], restored[name])]
    return [f"{len(changed)} of {len(saved)} tensors came back changed, {changed[0]} say"] if changed else []


def _damage_is_noticed(folder: Path, path: Path) -> bool:
    """Whether a checkpoint with one changed byte is refused."""
    file = max(path.glob("*.safetensors"), key=lambda each: each.stat().st_size)
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        byte = opened.read(1)
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([byte[0] ^ 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Checkpoints(folder).load_latest() is None


def _forget(path: Path) -> None:
    """Ask the system to forget what it keeps of the files in memory, so that the disk is read."""
    for file in path.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def _to_host(device: torch.device) -> float:
    """Bytes a second from the device into pinned main memory."""
    here = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    there = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    return here.nbytes / seconds_of(lambda: there.copy_(here, non_blocking=True), device)
