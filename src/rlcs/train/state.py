"""The state of training: captured from a model and its optimiser, and given back to them, bit for bit."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rlcs.distributed import own_part, shard_of
from rlcs.errors import CheckpointError
from rlcs.model.checkpoints import ADAPTER, Stored

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
    own = _trained(model)
    try:
        if state.model.keys() != own.keys():
            raise RuntimeError("other names of weights")
        with torch.no_grad():
            for name, like in own.items():
                like.copy_(_own_part(state.model, name, like))
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
    for label in saved.tensors:
        key, name = label.split("/", 1)
        parameter = parameters[name]
        if key == "step":
            optimizer.state[parameter][key] = saved.tensors[label].to(step_device[parameter], copy=True)
        else:
            optimizer.state[parameter][key] = _own_part(saved.tensors, label, parameter.detach()).clone()


def _own_part(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A tensor on the device of `like`; of a sharded one only this rank's rows are read.

    Raises RuntimeError for another shape.
    """
    if not isinstance(like, DTensor) or not isinstance(tensors, Stored):
        part = own_part(tensors[name], like)
    else:
        local, (index, parts) = like.to_local(), shard_of(like)
        start = min(len(like), index * -(-len(like) // parts))  # as torch.chunk divides rows
        rows = tensors.rows(name, start, start + len(local), part=index, parts=parts)
        if rows.shape != local.shape:
            raise RuntimeError(f"{name} has rows of shape {list(rows.shape)}, not {list(local.shape)}")
        mesh, placements = like.device_mesh, like.placements
        part = DTensor.from_local(
            rows.to(local.device), mesh, placements, shape=like.shape, stride=like.stride(), run_check=False
        )
    if part.shape != like.shape:
        raise RuntimeError(f"{name} has the shape {list(part.shape)}, not {list(like.shape)}")
    return part


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
