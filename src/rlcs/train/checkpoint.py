"""Checkpoints: the state of training on disk, from which a stopped run continues bit for bit.

A checkpoint is a folder `step-000080/` of `model.safetensors`, `optimizer.safetensors`,
`state.json` and a manifest with checksums; nothing in it is ever unpickled. Of a model with adapters
it holds only the adapters, which alone train; of a sharded model every rank writes its rows
(rank 1 into `model-1.safetensors`), and any number of ranks can read them. It is written as
`step-000080.tmp-PID`, synced to disk, and renamed in one step: a folder without a suffix is complete.
Suffixes: `.tmp-PID` an unfinished save or removal, `.old` the checkpoint that a second save of the
same step replaces, `.bad` one that failed its checks. One run at a time writes to a folder.
"""

import os
import random
import re
import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rlcs import storage
from rlcs.distributed import ALONE, World, own_part
from rlcs.errors import CheckpointError, RlcsError
from rlcs.model.checkpoints import (
    ADAPTER,
    FORMAT,
    MODEL,
    OPTIMIZER,
    STATE,
    Stored,
    complete,
    folder_of,
    of_rank,
    read_facts,
    unreadable,
)

_FACTS = ("rng", "schedule", "cursor", "extra", "recipe_hash")
"""Fields of a state that are JSON-able."""
_BAD = re.compile(r"step-(\d{6,})\.bad.*")
_MACHINE_SETTINGS = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")
"""Entries of an optimiser's parameter group that depend on the machine; they are not saved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerState:
    """An optimiser's state by parameter name: tensors under `key/name`, and JSON-able groups and scalars."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Everything that the next step depends on, after `step` steps.

    `schedule`, `cursor` (position in the data) and `extra` are JSON-able dictionaries of the caller;
    by `recipe_hash` it can refuse a checkpoint of another recipe. A captured
    state shares memory with the model: save it before the next step. A loaded one is on the CPU.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: OptimizerState
    rng: Mapping[str, Any]
    schedule: Mapping[str, Any]
    cursor: Mapping[str, Any]
    extra: Mapping[str, Any]
    recipe_hash: str


# --- memory to state and back -------------------------------------------------------------------


def capture(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    step: int,
    cursor: Mapping[str, Any],
    schedule: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    recipe_hash: str = "",
) -> TrainState:
    """The current state of training, random generators included, of this rank's shard; copies nothing."""
    return TrainState(
        step=step,
        model={name: tensor.detach() for name, tensor in _trained(model).items()},
        optimizer=optimizer_to_tensors(optimizer, dict(model.named_parameters())),
        rng=capture_rng(),
        schedule=schedule or {},
        cursor=cursor,
        extra=extra or {},
        recipe_hash=recipe_hash,
    )


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The weights that a checkpoint holds: all of a model, or its adapters alone where it has any."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if ADAPTER in name} or state


def restore(state: TrainState, model: nn.Module, optimizer: Optimizer) -> None:
    """Restore weights, optimiser and random generators; the caller restores the rest.

    Raises CheckpointError if the state is of another model or another choice of trained parts.
    """
    restore_weights(state, model)
    restore_optimizer(optimizer, dict(model.named_parameters()), state.optimizer)
    restore_rng(state.rng)


def restore_weights(state: TrainState, model: nn.Module) -> None:
    """Restore the weights alone. Raises CheckpointError as `restore` does."""
    try:
        own = _trained(model)
        weights = {n: own_part(t, own[n]) if n in own else t for n, t in state.model.items()}
        _, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or weights.keys() != own.keys():
            raise RuntimeError("other names of weights")
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint is of another model: {error}", fix="resume with the recipe that wrote it"
        ) from error


def optimizer_to_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> OptimizerState:
    """The optimiser's state by parameter name; `parameters` is `dict(model.named_parameters())`."""
    name_of: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    groups = [
        {
            "names": [name_of[p] for p in group["params"]],
            "settings": {k: v for k, v in group.items() if k not in _MACHINE_SETTINGS},
        }
        for group in optimizer.param_groups
    ]
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, values in optimizer.state.items():
        name = name_of[parameter]
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    return OptimizerState(tensors=tensors, settings={"groups": groups, "scalars": scalars})


def restore_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], saved: OptimizerState
) -> None:
    """Give `optimizer` the saved state and hyperparameters, on each parameter's device.

    `Optimizer.load_state_dict` is not used: it matches by position and casts states to the type of
    their parameter. Raises CheckpointError unless both have the same parameters in the same groups.
    """
    name_of = {parameter: name for name, parameter in parameters.items()}
    saved_groups = saved.settings["groups"]
    names = [[name_of[p] for p in group["params"]] for group in optimizer.param_groups]
    saved_names = [group["names"] for group in saved_groups]
    if names != saved_names:
        differing = sorted({n for g in names for n in g} ^ {n for g in saved_names for n in g})
        raise CheckpointError(
            f"the optimizer of the checkpoint trains other parameters: {', '.join(differing[:3]) or 'order'}",
            fix="resume with the same frozen parts and the same parameter groups",
        )
    optimizer.state.clear()
    step_device = {}
    for group, saved_group in zip(optimizer.param_groups, saved_groups, strict=True):
        for key, value in saved_group["settings"].items():
            group[key] = tuple(value) if isinstance(value, list) else value
        on_device = group.get("capturable") or group.get("fused")
        step_device.update({p: p.device if on_device else torch.device("cpu") for p in group["params"]})
    for name, scalars in saved.settings["scalars"].items():
        optimizer.state[parameters[name]].update(scalars)
    for label, tensor in saved.tensors.items():
        key, name = label.split("/", 1)
        parameter = parameters[name]
        optimizer.state[parameter][key] = (
            tensor.to(step_device[parameter], copy=True)
            if key == "step"
            else own_part(tensor.clone(), parameter.detach())
        )


def capture_rng() -> dict[str, Any]:
    """The states of torch's (CPU and CUDA), Python's and numpy's random generators, JSON-able."""
    version, internal, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in cuda],
        "python": [version, list(internal), gauss],
        "numpy": numpy | {"state": numpy["state"] | {"key": numpy["state"]["key"].tolist()}},
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set every generator of this machine to its captured state."""
    torch.set_rng_state(_unhex(state["torch"]))
    for device in range(min(len(state["cuda"]), torch.cuda.device_count())):
        torch.cuda.set_rng_state(_unhex(state["cuda"][device]), device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


# --- state to disk ------------------------------------------------------------------------------


def save(
    folder: Path,
    state: TrainState,
    *,
    keep: int,
    always: Collection[int] = (),
    world: World = ALONE,
) -> Path:
    """Write `step-NNNNNN` below `folder` and return its path; then prune to the `keep` newest.

    Those of the steps `always` are kept besides.

    Whenever the process is killed, `load_latest` finds this state or the one before. Leftovers of
    earlier saves are removed. Raises RunFolderError, leaving no files, if the disk is full.
    All ranks of a world save together, into a folder that they all see.
    """
    target = folder / folder_of(state.step)
    aside = world.first(lambda: _prepare(target))
    try:
        failed: RlcsError | None = None
        try:
            _write_tensors(aside, state, world)
        except RlcsError as error:
            failed = error
        for failure in filter(None, world.gather(failed)):
            raise failure
        world.first(lambda: _write_state(aside, state, world.writers))
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    world.first(lambda: _put_in_place(aside, target))
    world.first(lambda: _prune(folder, state.step, keep, always))
    return target


def _prepare(target: Path) -> Path:
    """Remove leftovers of killed saves; the temporary folder in which to write `target`."""
    _tidy(target.parent)
    return target.with_name(f"{target.name}.tmp-{os.getpid()}")


def _put_in_place(aside: Path, target: Path) -> None:
    replaced = target.with_name(f"{target.name}.old")
    if target.exists():
        target.replace(replaced)  # a rename cannot replace a folder that has files
    aside.replace(target)
    storage.fsync(target.parent)
    if replaced.exists():
        _remove(replaced)


def _write_tensors(aside: Path, state: TrainState, world: World) -> None:
    """Write this rank's rows of sharded tensors; rank 0 also writes the tensors that are not sharded.

    Where ranks hold copies of each other's rows, the first with them writes.
    """
    if world.rank >= world.writers:
        return
    tensors, _ = _untied(_own(state.model, world))
    _write(aside / of_rank(MODEL, world.rank), tensors)
    optimizer = {name: _plain(tensor) for name, tensor in _own(state.optimizer.tensors, world).items()}
    _write(aside / of_rank(OPTIMIZER, world.rank), optimizer)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write and sync tensors without a copy in memory; not atomic, which the folder's rename is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, path)
        storage.open_as_its_folder(path)  # safetensors lets only the owner read it
        storage.fsync(path)  # by the rank that wrote it, as rank 0 may be on another machine
    except (OSError, SafetensorError) as error:
        raise storage.cannot_write(path, sum(t.nbytes for t in tensors.values()), error) from error


def _own(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The tensors, or rows of tensors, that this rank writes."""
    return {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
        if world.rank == 0 or isinstance(tensor, DTensor)
    }


def _write_state(aside: Path, state: TrainState, ranks: int) -> None:
    """Write everything but tensors, the manifest last."""
    _, tied = _untied(_own(state.model, ALONE))
    facts = {"format": FORMAT, "tied": tied, "ranks": ranks, "optimizer": state.optimizer.settings}
    facts |= {name: getattr(state, name) for name in ("step", *_FACTS)}
    storage.write_json(aside / STATE, facts)
    storage.write_manifest(aside)


def _untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, each shared one under its first name only, and that name for each of its other names."""
    unique: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key in first and tensor.numel():
            tied[name] = first[key]
        else:
            first[key] = name
            unique[name] = _plain(tensor)
    return unique, tied


def _plain(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, and without shared storage, as safetensors requires."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _tidy(folder: Path) -> None:
    """Remove leftovers of a killed save or removal, and restore a checkpoint that was being replaced."""
    for path in sorted(folder.glob("step-*.tmp-*")):
        shutil.rmtree(path)
    for path in sorted(folder.glob("step-*.old")):
        target = path.with_suffix("")
        if target.exists():
            _remove(path)
        else:
            path.replace(target)


def _prune(folder: Path, step: int, keep: int, always: Collection[int]) -> None:
    """Of steps up to `step`, keep the newest `keep` that pass their checks, with the one just written.

    Later steps and those of `always` are not touched. A folder is renamed before it is removed, so that a
    partly removed one is never taken for a checkpoint.
    """
    found = complete(folder)
    older = sorted((n for n in found if n < step and n not in always), reverse=True)
    kept = 1
    oldest = step
    for number in older:
        if kept >= keep:
            _remove(found[number])
        elif _is_valid(found[number]):
            kept, oldest = kept + 1, number
    for path in folder.iterdir():
        match = _BAD.fullmatch(path.name)
        if match and kept >= keep and int(match[1]) < oldest:
            _remove(path)


def _is_valid(path: Path) -> bool:
    try:
        storage.verify_manifest(path)
    except CheckpointError:
        return False
    return True


def _remove(path: Path) -> None:
    removed = path.with_name(f"{path.name.partition('.')[0]}.tmp-{os.getpid()}")
    path.replace(removed)
    shutil.rmtree(removed)


# --- disk to state ------------------------------------------------------------------------------


def load_latest(folder: Path, world: World = ALONE) -> TrainState | None:
    """The newest checkpoint that passes its checks, or None if there is none.

    Leftovers of a killed save are removed, which may be large and are never read. A damaged
    checkpoint is renamed to `.bad` with a RuntimeWarning, and the next older one is tried. Rank 0
    checks; the other ranks open the one that it found.
    """
    found = world.first(lambda: _newest(folder))
    return None if found is None else _read(*found)


def load_step(folder: Path, step: int, world: World = ALONE) -> TrainState:
    """The checkpoint of a step, on all ranks. Raises CheckpointError if it is missing or damaged."""
    path = world.first(lambda: _verified(folder, step))
    return _read(path, step)


def _verified(folder: Path, step: int) -> Path:
    path = complete(folder).get(step)
    if path is None:
        raise CheckpointError(f"there is no checkpoint of step {step}", where=str(folder))
    storage.verify_manifest(path)
    return path


def _newest(folder: Path) -> tuple[Path, int] | None:
    _tidy(folder)
    for step, path in sorted(complete(folder).items(), reverse=True):
        try:
            read_verified(path, step)
            return path, step
        except CheckpointError as error:
            bad = _free_name(folder / f"{folder_of(step)}.bad")
            path.replace(bad)
            warnings.warn(f"{error}\nset aside as {bad.name}; trying an older one", RuntimeWarning, 2)
    return None


def _free_name(path: Path) -> Path:
    names = (path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000)))
    return next(name for name in names if not name.exists())


def read_verified(path: Path, step: int) -> TrainState:
    """The checkpoint in the folder `path`. Raises CheckpointError if it is damaged or of another step."""
    storage.verify_manifest(path)
    return _read(path, step)


def _read(path: Path, step: int) -> TrainState:
    """Open a checkpoint. Raises CheckpointError for anything that `save` did not write."""
    try:
        facts = read_facts(path, step)
        ranks = range(facts["ranks"])
        return TrainState(
            step=step,
            model=Stored([path / of_rank(MODEL, rank) for rank in ranks], facts["tied"]),
            optimizer=OptimizerState(
                tensors=Stored([path / of_rank(OPTIMIZER, rank) for rank in ranks], {}),
                settings=facts["optimizer"],
            ),
            **{name: facts[name] for name in _FACTS},
        )
    except (FileNotFoundError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise unreadable(path, step, error) from error
