"""What lies on one device: weights, gradients, optimiser, reference, and what a sharded model gathers."""

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
    """How a model is spread over a machine, what of it trains, and who samples.

    `weight`, `compute` and `reduce` are bytes of a stored weight, of a computed number and of a gradient on
    its way between devices; `trainers` devices train.
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
    def sharded(self) -> bool:
        """Whether weights are gathered before they are used: several devices, formats or memories."""
        return self.trainers > 1 or self.weight != self.compute or self.parallel.cpu_offload

    @property
    def offloaded(self) -> bool:
        """Whether what a GPU would hold lies in main memory."""
        return self.parallel.cpu_offload and self.machine.gpus > 0

    def trains(self, frozen: Collection[Part]) -> Collection[Part]:
        """Parts of the model that learn, whole or by adapters."""
        every: tuple[Part, ...] = ("vision_tower", "merger", "language_model")
        return [part for part in (self.lora.parts if self.lora.rank else every) if part not in frozen]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Bytes on one device. `gathered` stands beside them while a sharded model computes.

    `offloaded` is in main memory, in place of the first four: each device's share.
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
    """Our own vLLM servers on the fullest of the GPUs that train; they keep their memory meanwhile."""
    rollout, gpus = place.rollout, _names(place.machine)
    if rollout.engine != "vllm_server" or rollout.urls or not gpus:
        return 0
    if not rollout.devices:
        return rollout.servers  # each takes the first GPUs that it sees
    taken = _servers_by_gpu(rollout)
    return max(taken.values()) if taken.keys() >= gpus else 0


def _trainers(rollout: Rollouts, machine: Machine) -> int:
    """Devices that train: all but those that our own vLLM servers have to themselves.

    Servers that sit on every GPU share them with training.
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
    own = rollout.engine == "vllm_server" and not rollout.urls
    return Counter(gpu.strip() for each in rollout.devices if own for gpu in each.split(","))


def _names(machine: Machine) -> set[str]:
    return {str(number) for number in range(machine.gpus)}


def stored(place: Placement, trains: Collection[Part], *, reference: bool) -> Stored:
    """What one device holds, and its share of main memory; a `reference` has weights of its own."""
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
    own = {name: size / place.trainers for name, size in whole.items()}
    gathered, offloaded = _gathered(place) if place.sharded else 0.0, 0.0
    if place.offloaded:
        gathered += 2 * sizes.largest_layer * place.weight / place.trainers  # shards on their way to the GPU
        own, offloaded = dict.fromkeys(own, 0.0), sum(own.values())
    return Stored(**own, gathered=gathered, offloaded=offloaded)


def _adapter_parameters(lora: Lora, trains: Collection[Part], sizes: Sizes) -> int:
    chosen = [x for x in sizes.linears if x.part in trains]
    if lora.targets:
        chosen = [x for x in chosen if x.name.rpartition(".")[2] in lora.targets]
    return lora.rank * sum(x.inputs + x.outputs for x in chosen)


def _gathered(place: Placement) -> float:
    """The layer at work and the next one, with gradients on their way; what is in no layer stays gathered."""
    sizes = place.sizes
    units = 2 * sizes.largest_layer * (place.compute + place.reduce)
    whole = 2 * sizes.largest_layer if place.parallel.reshard_after_forward else sizes.total
    return float(units + whole * place.compute + 2 * sizes.outside_layers * place.compute)
