"""Shards a model over the ranks of a run with PyTorch's FSDP2 (`fully_shard`).

All ranks share one copy, or groups of neighbouring ranks (those of a node) one each (`parallel.shard_size`):
then layers are gathered within a group, over its fast links, and only gradients cross between groups.

Every decoder layer and vision block is one unit, and all the rest (embedding, head, norms, merger)
belongs to the root: so tied weights lie in one unit. FSDP gathers a unit when its forward is called, but
we call the inner model and the head separately; so the root is an `FsdpRoot` around the model, and all
work with the weights runs inside its forward.

Sampling does not run in step: it would take as many forwards on every rank, each of which gathers the
whole model for one token a row. The weights are gathered once instead (`gathered`), and every rank
samples independently.

Offloading (`cpu_offload`) is done by FSDP: shards, their gradients and AdamW live in main memory, and a
unit's shard is copied to the GPU when the unit is gathered. Moving AdamW's state alone in for each step
would save half of it and only between steps: a step would still need all 16 bytes a float32 weight on
the GPUs (60 GB for 3B). With FSDP they hold only the units in use: `rlcs plan` finds that every weight
of a 3B model trains on one GPU of 24 GB; and FSDP schedules the copies.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlcs.distributed import World
from rlcs.recipe.execution import Parallel

T = TypeVar("T")


class FsdpRoot(nn.Module):
    """The root of a sharded model; in its forward the root's weights are gathered."""

    def __init__(self, model: PreTrainedModel, *, reshards: bool) -> None:
        """A plain wrapper until `shard` makes it FSDP's root; `reshards`: layers free their weights."""
        super().__init__()
        self.model = model
        self._reshards = reshards
        self._is_gathered = False

    def forward(self, work: Callable[[], T]) -> T:
        """Do the work. For gradients to be reduced, it must return a tensor or a tuple of tensors."""
        return work()

    @property
    def units(self) -> list[FSDPModule]:
        """FSDP's units, the root first."""
        return [module for module in self.modules() if isinstance(module, FSDPModule)]

    def run(self, work: Callable[[], T]) -> T:
        """Call `forward`; without gradients free the root's weights, as no backward pass would."""
        result: T = self(work)
        if not torch.is_grad_enabled() and not self._is_gathered:
            self.units[0].reshard()
        return result

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold all weights on every rank: inside, each runs any number of forwards, without gradients.

        Every rank must enter and leave, even one that has nothing to do.
        """
        units = self.units
        self(lambda: None)  # in the first forward FSDP learns which unit is the root
        for unit in units:
            unit.unshard()
        self._keep(self._reshards)
        self._is_gathered = True
        try:
            yield
        finally:
            # FSDP prefetches in the order of past forwards, which must end with the same unit on all ranks.
            self(lambda: None)
            self._is_gathered = False
            self._keep(False)
            for unit in units:
                unit.reshard()

    def _keep(self, kept: bool) -> None:
        """Set whether layers stay gathered after a forward, if they free their weights otherwise."""
        if self._reshards:
            for unit in self.units[1:]:
                unit.set_reshard_after_forward(not kept, recurse=False)


def shard(model: PreTrainedModel, world: World, settings: Parallel) -> FsdpRoot:
    """Spread rank 0's weights over the ranks, unit by unit; on other ranks the model may lie on `meta`.

    Only rank 0 ever holds the whole model, and its copy shrinks as the shards grow.
    """
    assert world.device is not None, "a world with process groups has a device"
    return wrap(
        model, mesh_of(world, world.device.type), settings, before=lambda modules: fill(modules, world)
    )


def mesh_of(world: World, device: str) -> DeviceMesh:
    """All ranks in one row; with several copies of the model, a row of neighbours for each."""
    if world.writers == world.size:
        return init_device_mesh(device, (world.size,))
    names = ("replicate", "shard")
    return init_device_mesh(device, (world.size // world.writers, world.writers), mesh_dim_names=names)


def wrap(
    model: PreTrainedModel,
    devices: DeviceMesh,
    settings: Parallel,
    *,
    before: Callable[[Iterable[nn.Module]], None] = lambda modules: None,
) -> FsdpRoot:
    """Make FSDP's units: each layer and block, then the root; `before` is called with a unit's modules."""
    offload = CPUOffloadPolicy(pin_memory=devices.device_type == "cuda")
    options: dict[str, Any] = {
        "mesh": devices,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=_dtype(settings.compute_dtype),
            reduce_dtype=_dtype(settings.reduce_dtype),
            cast_forward_inputs=False,  # rotary angles must stay exact; other inputs have the right type
        ),
        "offload_policy": offload if settings.cpu_offload else OffloadPolicy(),
    }
    fsdp_root = FsdpRoot(model, reshards=settings.reshard_after_forward)
    units = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    done: set[nn.Module] = set()
    for unit in units:
        before(unit.modules())
        done.update(unit.modules())
        fully_shard(unit, reshard_after_forward=settings.reshard_after_forward, **options)
    before(module for module in fsdp_root.modules() if module not in done)
    fully_shard(fsdp_root, **options)
    return fsdp_root


def reference_dtype(settings: Parallel) -> torch.dtype | None:
    """The number format of a sharded reference's weights; None: the policy's."""
    name = settings.reference_dtype
    return _dtype(settings.compute_dtype if name == "same" else name)


def _dtype(name: str) -> torch.dtype | None:
    return None if name == "same" else getattr(torch, name)


def fill(modules: Iterable[nn.Module], world: World) -> None:
    """Set the modules' direct tensors to rank 0's values on this rank's device; tied ones stay tied."""
    filled: dict[Tensor, Tensor] = {}
    for module in modules:
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if tensor not in filled:
                    filled[tensor] = _from_first(tensor, world)
                table[name] = filled[tensor]  # type: ignore[assignment]


def _from_first(tensor: Tensor, world: World) -> Tensor:
    """A copy of rank 0's tensor, or on rank 0 the tensor itself where it lies on the right device."""
    if world.rank == 0:
        values = tensor.detach().to(world.device).contiguous()
    else:
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device=world.device)
    dist.broadcast(values, src=0)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


def whole_weights(model: nn.Module, world: World, *, having: str = "") -> dict[str, Tensor]:
    """Collect all weights by name on rank 0's CPU, tied ones as one tensor; other ranks get none.

    `having`: only those with this in their names.
    """
    copies: dict[Tensor, Tensor] = {}
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if having in name}
    for tensor in state.values():
        if tensor not in copies:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            copies[tensor] = whole.detach().cpu() if world.rank == 0 else torch.empty(0)
    return {name: copies[tensor] for name, tensor in state.items()} if world.rank == 0 else {}
