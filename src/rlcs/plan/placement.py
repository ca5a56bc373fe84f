"""The contents of one device: weights, gradients, optimiser, reference, and what a sharded model gathers."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from rlcs.errors import UserError
from rlcs.plan.machine import FP32, Machine
from rlcs.plan.memory import Units
from rlcs.plan.shapes import Sizes
from rlcs.recipe.execution import Lora, Parallel, ranks_per_copy
from rlcs.recipe.sampling import Rollouts
from rlcs.recipe.schema import Model
from rlcs.recipe.section import FrozenPart, Part

FOUR_BITS = 4.127 / 8
"""Bytes of a weight in NF4 with its constants quantised again (QLoRA, arXiv 2305.14314, section 3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A model spread over a machine, with its adapters and its sampling engine.

    `weight`, `compute`, `reduce` and `frozen` are bytes of a stored weight, of a computed number, of a
    gradient when it is summed over devices and of the reference's weight; `trainers` is the number of devices
    that train.
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
    frozen: int
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

    @property
    def peak(self) -> float:
        """Operations a second of one device, at its peak in the format of the computation."""
        device = self.machine.device
        return device.float32 if self.compute == FP32 else device.bfloat16

    def trained_numbers(self, frozen: Collection[FrozenPart]) -> int:
        """The numbers that train: adapters, or the weights of all parts but the frozen ones."""
        trains = self.trains(frozen)
        if self.lora.rank:
            return adapter_parameters(self.lora, trains, self.sizes)
        kept = self.sizes.frozen_numbers(frozen) if "language_model" in trains else 0
        return sum(self.sizes.parameters[part] for part in trains) - kept

    def trains(self, frozen: Collection[FrozenPart]) -> Collection[Part]:
        """Parts of the model that train, whole or by adapters."""
        every: tuple[Part, ...] = ("vision_tower", "merger", "language_model")
        return [part for part in (self.lora.parts if self.lora.rank else every) if part not in frozen]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Bytes on one device; `offloaded` are bytes of main memory, each device's share, which replace them."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    offloaded: float


def place(
    model: Model, lora: Lora, parallel: Parallel, rollout: Rollouts, *, sizes: Sizes, machine: Machine
) -> Placement:
    """Spread a model over a machine.

    Raises UserError where no device is left to train, or `parallel.shard_size` does not divide their number.
    """
    trainers = _trainers(rollout, machine)
    ranks_per_copy(trainers, parallel.shard_size)
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
        frozen=bytes_of.get(parallel.reference_dtype, compute),
        trainers=trainers,
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


def stored(place: Placement, frozen: Collection[FrozenPart], *, reference: bool) -> Stored:
    """Bytes that one device holds, and its share of main memory; `reference`: whether there is one."""
    sizes, lora = place.sizes, place.lora
    trained = place.trained_numbers(frozen)
    weights = float(sizes.total * place.weight)
    if lora.four_bit:
        packed = sum(n * x.inputs * x.outputs for x, n in sizes.linears.items() if x.part == "language_model")
        weights -= packed * (place.weight - FOUR_BITS)
    learns = (FP32 if lora.rank else place.weight) * trained
    whole = {
        "weights": weights + (learns if lora.rank else 0),
        "gradients": learns,
        "optimizer": 2 * learns,
        "reference": float(sizes.total * place.frozen) if reference and not lora.rank else 0.0,
    }
    own = {name: size / place.shards for name, size in whole.items()}
    offloaded = 0.0
    if place.offloaded:
        own, offloaded = dict.fromkeys(own, 0.0), sum(own.values())
    return Stored(**own, offloaded=offloaded)


def adapter_parameters(lora: Lora, trains: Collection[Part], sizes: Sizes) -> int:
    """The numbers in the adapters of the parts that train."""
    chosen = [x for x in sizes.linears if x.part in trains and (not lora.targets or x.name in lora.targets)]
    return lora.rank * sum(sizes.linears[x] * (x.inputs + x.outputs) for x in chosen)


def units_of(place: Placement, frozen: Collection[FrozenPart]) -> Units:
    """What a sharded model gathers and what waits to be summed, in a step with these parts frozen.

    Of one device nothing is gathered from others: weights are copied into their other format or from main
    memory, and no buffer of the next layer lies beside them.
    """
    if not place.sharded:
        return Units()
    sizes, several = place.sizes, place.shards > 1
    layer, outside = sizes.largest_layer * place.compute, sizes.outside_layers * place.compute
    layers = float((1 + several) * layer)
    if not place.parallel.reshard_after_forward:
        layers = (sizes.total - sizes.outside_layers) * place.compute
    if place.offloaded:  # shards that are copied to the GPU
        layers += 2 * sizes.largest_layer * place.weight / place.shards
    if place.lora.rank or "language_model" not in place.trains(
        frozen
    ):  # few gradients outside a tower of small blocks
        return Units(gathered=layers + outside)
    learns = sizes.largest_layer
    if "experts" in frozen:
        learns -= max(layer.experts for layer in sizes.layers)
    shard = 0.0 if place.offloaded else sizes.outside_layers * place.weight / place.shards
    return Units(
        gathered=layers + outside,
        layer=learns * (place.compute + place.reduce),
        waiting=sizes.head * place.compute,
        root=outside + sizes.outside_layers * place.reduce,
        root_shard=shard,
    )
