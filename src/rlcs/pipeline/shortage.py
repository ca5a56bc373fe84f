"""Tells a run whose memory ran out what to change in its recipe, computed for this machine."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from rlcs.distributed import World
from rlcs.engines.vllm.server import SHARE
from rlcs.errors import OutOfMemory, RlcsError
from rlcs.model.loading import default_device
from rlcs.plan import machine
from rlcs.plan.shortage import shortage_advice
from rlcs.recipe.schema import Recipe

GO_ON = "the same command with such a KEY=VALUE goes on; where it gives other results, in a new --out"


@contextmanager
def memory_advice(recipe: Recipe, world: World) -> Iterator[None]:
    """Add to OutOfMemory which keys of the recipe to change, each with its arithmetic."""
    try:
        yield
    except OutOfMemory as error:
        advice = ""
        with suppress(RlcsError):
            trainers = 1 if world.has_copies else world.size
            advice = shortage_advice(recipe, error.where, _machine(world), trainers=trainers)
        # What vLLM needs more of, or less, only its own message says.
        known = error.fix if SHARE in error.fix or not advice else ""
        fix = "\n     ".join(filter(None, (known, advice, GO_ON if advice else "")))
        raise OutOfMemory(error.what, where=error.where, fix=fix) from error


def _machine(world: World) -> machine.Machine:
    """This machine: its GPUs, the memory of one, and no speed."""
    if (world.device or default_device()).type == "cpu":
        return machine.machine(0, "H100", memory=None, peak=0)
    memory = torch.cuda.get_device_properties(world.device).total_memory / machine.GIB
    some = machine.GPUS["H100"]
    return machine.Machine(gpus=torch.cuda.device_count(), device=replace(some, memory=memory))
