"""The contents of one device: weights, gradients, optimiser, reference, and what a sharded model gathers."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from rlcs.errors import UserError
from rlcs.plan.machine import FP32, Machine
from rlcs.plan.shapes import Sizes
from rlcs.recipe.execution import Lora, Parallel
from rlcs.recipe.sampling import Rollouts
from rlcs.recipe.schema import Model
from rlcs.recipe.section import Part

FOUR_BITS = 4.127 / 8
"""Bytes of a weight in NF4 with its constants quantised again (QLoRA, arXiv 2305.14314, section 3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A model spread over a machine, with its adapters and its sampling engine.

    `weight`, `compute` and `reduce` are bytes of a stored weight, of a computed number and of a gradient
    when it is summed over devices; `trainers` is the number of devices that train.
    """

    sizes: Sizes
    machine: Machine
    lora: Lora
    parallel: Parallel
    rollout: Rollouts
    checkpointing: bool
    weight: int
    compute: int
    reduce: int
    trainers: int

    @property
    def shards(self) -> int:
        """The number of devices that share one copy of weights and optimiser."""
        return min(self.parallel.shard_size or self.trainers, self.trainers)

    @property
    def sharded(self) -> bool:
        """Whether weights are gathered before they are used: several devices, formats or memories."""
        return self.trainers > 1 or self.weight != self.compute or self.parallel.cpu_offload

    @property
    def offloaded(self) -> bool:
        """Whether weights, gradients and optimiser are in main memory, not on the GPU."""
        return self.parallel.cpu_offload and self.machine.gpus > 0

    def trains(self, frozen: Collection[Part]) -> Collection[Part]:
        """Parts of the model that train, whole or by adapters."""
        every: tuple[Part, ...] = ("vision_tower", "merger", "language_model")
        return [part for part in (self.lora.parts if self.lora.rank else every) if part not in frozen]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Bytes on one device, with those `gathered` while a sharded model computes.

    `offloaded` are bytes of main memory, each device's share, which replace the first four.
    """

    weights: float
    gradients: float
    optimizer: float
    reference: float
    gathered: float
    offloaded: float


def place(
    model: Model, lora: Lora, parallel: Parallel, rollout: Rollouts, *, sizes: Sizes, machine: Machine
) -> Placement:
    """Spread a model over a machine. Raises UserError where no device is left to train."""
    bytes_of = {"float32": FP32, "bfloat16": 2, "auto": 2 if machine.gpus else FP32}
    weight = bytes_of[model.dtype]
    compute = bytes_of.get(parallel.compute_dtype, weight)
    return Placement(
        sizes=sizes,
        machine=machine,
        lora=lora,
        parallel=parallel,
        rollout=rollout,
        checkpointing=model.gradient_checkpointing,
        weight=weight,
        compute=compute,
        reduce=bytes_of.get(parallel.reduce_dtype, compute),
        trainers=_trainers(rollout, machine),
    )


def servers_beside(place: Placement) -> int:
    """The number of this run's vLLM servers on the fullest training GPU; they never free their memory."""
    rollout, gpus = place.rollout, _names(place.machine)
    if rollout.engine != "vllm_server" or rollout.urls or not gpus:
        return 0
    if not rollout.devices:
        return rollout.servers  # each takes the first visible GPUs
    taken = _servers_by_gpu(rollout)
    return max(taken.values()) if taken.keys() >= gpus else 0


def _trainers(rollout: Rollouts, machine: Machine) -> int:
    """The number of devices that train: all but those that only vLLM servers of this run use.

    Servers on every GPU share them with training.
    """
    taken = _servers_by_gpu(rollout)
    if not machine.gpus or taken.keys() >= _names(machine):
        return machine.devices
    if machine.gpus <= len(taken):
        raise UserError(
            f"rollout.devices takes {len(taken)} GPUs, which leaves none of {machine.gpus} to train",
            where="--gpus",
            fix=f"plan for more, {2 * len(taken)} say, or change rollout.devices",
        )
    return machine.gpus - len(taken)


def _servers_by_gpu(rollout: Rollouts) -> Counter[str]:
    if rollout.engine != "vllm_server" or rollout.urls:
        return Counter()
    return Counter(gpu.strip() for devices in rollout.devices for gpu in devices.split(","))


def _names(machine: Machine) -> set[str]:
    return {str(number) for number in range(machine.gpus)}


def stored(place: Placement, trains: Collection[Part], *, reference: bool) -> Stored:
    """Bytes that one device holds, and its share of main memory; `reference`: whether there is one."""
    sizes, lora = place.sizes, place.lora
    adapters = _adapter_parameters(lora, trains, sizes)
    weights = float(sizes.total * place.weight)
    if lora.four_bit:
        packed = sum(x.inputs * x.outputs for x in sizes.linears if x.part == "language_model")
        weights -= packed * (place.weight - FOUR_BITS)
    learns = FP32 * adapters if lora.rank else place.weight * sum(sizes.parameters[part] for part in trains)
    whole = {
        "weights": weights + FP32 * adapters,
        "gradients": learns,
        "optimizer": 2 * learns,
        "reference": weights if reference and not lora.rank else 0.0,
    }
    own = {name: size / place.shards for name, size in whole.items()}
    gathered, offloaded = _gathered(place) if place.sharded else 0.0, 0.0
    if place.offloaded:
        # Shards that are copied to the GPU.
        gathered += 2 * sizes.largest_layer * place.weight / place.shards
        own, offloaded = dict.fromkeys(own, 0.0), sum(own.values())
    return Stored(**own, gathered=gathered, offloaded=offloaded)


def _adapter_parameters(lora: Lora, trains: Collection[Part], sizes: Sizes) -> int:
    chosen = [x for x in sizes.linears if x.part in trains]
    if lora.targets:
        chosen = [x for x in chosen if x.name.rpartition(".")[2] in lora.targets]
    return lora.rank * sum(x.inputs + x.outputs for x in chosen)


def _gathered(place: Placement) -> float:
    """Bytes of the layer in use and the next one with their gradients, and of parameters outside layers."""
    sizes = place.sizes
    units = 2 * sizes.largest_layer * (place.compute + place.reduce)
    whole = 2 * sizes.largest_layer if place.parallel.reshard_after_forward else sizes.total
    return float(units + whole * place.compute + 2 * sizes.outside_layers * place.compute)
