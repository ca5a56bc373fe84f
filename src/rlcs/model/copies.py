"""Copies of a model, one on each rank: processes that share a run on CPUs (`pipeline.processes`).

A copy needs no units as a sharded model does (`model.fsdp`), whose weights are gathered in every pass: it is
used like a model that is alone, and gradients are averaged once a step.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from rlcs.distributed import World
from rlcs.model.bins import within_budget
from rlcs.model.fsdp import fill

_AVERAGED_AT_ONCE = 1 << 22
"""Elements of gradients that are exchanged together: 16 MiB in float32, of which a copy is made."""


def copy_to_all(model: PreTrainedModel, world: World) -> None:
    """Give every rank all of rank 0's weights; on other ranks the model may lie on `meta`."""
    fill(model.modules(), world)


def mean_gradients(parameters: Sequence[Tensor], world: World) -> None:
    """Replace gradients, of which some ranks may have none, by their means over ranks, bit for bit the same.

    What no rank has stays None: an optimiser leaves such parameters alone.
    """
    if world.size == 1:
        return
    of_ranks = world.gather([parameter.grad is not None for parameter in parameters])
    shared = [p for p, *has in zip(parameters, *of_ranks, strict=True) if any(has)]
    for parameter in shared:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for members in within_budget([p.numel() for p in shared], _AVERAGED_AT_ONCE):
        gradients = [shared[i].grad for i in members]
        flat = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
        dist.all_reduce(flat)
        flat /= world.size
        for gradient, mean in zip(gradients, flat.split([shared[i].numel() for i in members]), strict=True):
            assert gradient is not None, "filled above"
            gradient.copy_(mean.view_as(gradient))
