"""What lies on one device: weights, gradients, optimiser, reference, and what a sharded model gathers."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from rlcs.errors import UserError
from rlcs.plan.machine import Machine
from rlcs.plan.memory import FP32
from rlcs.plan.shapes import Sizes
from rlcs.recipe.schema import Recipe
from rlcs.recipe.section import Part
from rlcs.recipe.stages import Grpo, Sft

FOUR_BITS = 4.127 / 8
"""Bytes of a weight in NF4 with its constants quantised again (QLoRA, arXiv 2305.14314, section 3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Formats:
    """Bytes of a stored weight, of a computed number, and of a gradient on its way between devices."""

    weight: int
    compute: int
    reduce: int


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


def formats(recipe: Recipe, machine: Machine) -> Formats:
    """The number formats that the recipe gets on this machine."""
    sizes = {"float32": FP32, "bfloat16": 2, "auto": 2 if machine.gpus else FP32}
    weight = sizes[recipe.learner.dtype]
    compute = sizes.get(recipe.parallel.compute_dtype, weight)
    return Formats(weight=weight, compute=compute, reduce=sizes.get(recipe.parallel.reduce_dtype, compute))


def trainers(recipe: Recipe, machine: Machine) -> int:
    """Devices that train: all but those that our own vLLM servers have to themselves. Raises UserError.

    Servers that sit on every GPU share them with training.
    """
    taken = _servers_by_gpu(recipe)
    if not machine.gpus or taken.keys() >= _names(machine):
        return machine.devices
    if machine.gpus <= len(taken):
        raise UserError(
            f"rollout.devices takes {len(taken)} GPUs, which leaves none of {machine.gpus} to train",
            where="--gpus",
            fix=f"plan for more, {2 * len(taken)} say, or change rollout.devices",
        )
    return machine.gpus - len(taken)


def servers_beside(recipe: Recipe, machine: Machine) -> int:
    """Our own vLLM servers on the fullest of the GPUs that train; they keep their memory meanwhile."""
    rollout = recipe.rollout
    if rollout.engine != "vllm_server" or rollout.urls or not machine.gpus:
        return 0
    if not rollout.devices:
        return rollout.servers  # each takes the first GPUs that it sees
    taken = _servers_by_gpu(recipe)
    return max(taken.values()) if taken.keys() >= _names(machine) else 0


def _servers_by_gpu(recipe: Recipe) -> Counter[str]:
    rollout = recipe.rollout
    own = rollout.engine == "vllm_server" and not rollout.urls
    return Counter(gpu.strip() for each in rollout.devices if own for gpu in each.split(","))


def _names(machine: Machine) -> set[str]:
    return {str(number) for number in range(machine.gpus)}


def is_sharded(recipe: Recipe, machine: Machine) -> bool:
    """Whether weights are gathered before they are used: several devices, or two formats, or two memories."""
    form = formats(recipe, machine)
    return trainers(recipe, machine) > 1 or form.weight != form.compute or recipe.parallel.cpu_offload


def trained_parts(recipe: Recipe, stage: Sft | Grpo) -> Collection[Part]:
    """Parts of the model that learn in a stage, whole or by adapters."""
    every: tuple[Part, ...] = ("vision_tower", "merger", "language_model")
    return [part for part in (recipe.lora.parts if recipe.lora.rank else every) if part not in stage.freeze]


def stored(recipe: Recipe, stage: Sft | Grpo, sizes: Sizes, machine: Machine) -> Stored:
    """What one device holds, and its share of main memory."""
    form, shards = formats(recipe, machine), trainers(recipe, machine)
    adapters = _adapter_parameters(recipe, stage, sizes)
    weights = float(sizes.total * form.weight)
    if recipe.lora.four_bit:
        packed = sum(x.inputs * x.outputs for x in sizes.linears if x.part == "language_model")
        weights -= packed * (form.weight - FOUR_BITS)
    learns = FP32 * adapters
    if not recipe.lora.rank:
        learns = form.weight * sum(sizes.parameters[part] for part in trained_parts(recipe, stage))
    reference = isinstance(stage, Grpo) and stage.kl.active and not recipe.lora.rank
    whole = {
        "weights": weights + FP32 * adapters,
        "gradients": learns,
        "optimizer": 2 * learns,
        "reference": weights if reference else 0.0,
    }
    own = {name: size / shards for name, size in whole.items()}
    gathered, offloaded = _gathered(recipe, sizes, form) if is_sharded(recipe, machine) else 0.0, 0.0
    if recipe.parallel.cpu_offload and machine.gpus:
        gathered += 2 * sizes.largest_layer * form.weight / shards  # shards on their way to the GPU
        own, offloaded = dict.fromkeys(own, 0.0), sum(own.values())
    return Stored(**own, gathered=gathered, offloaded=offloaded)


def _adapter_parameters(recipe: Recipe, stage: Sft | Grpo, sizes: Sizes) -> int:
    lora, parts = recipe.lora, trained_parts(recipe, stage)
    chosen = [x for x in sizes.linears if x.part in parts]
    if lora.targets:
        chosen = [x for x in chosen if x.name.rpartition(".")[2] in lora.targets]
    return lora.rank * sum(x.inputs + x.outputs for x in chosen)


def _gathered(recipe: Recipe, sizes: Sizes, form: Formats) -> float:
    """The layer at work and the next one, with gradients on their way; what is in no layer stays gathered."""
    units = 2 * sizes.largest_layer * (form.compute + form.reduce)
    whole = 2 * sizes.largest_layer if recipe.parallel.reshard_after_forward else sizes.total
    return float(units + whole * form.compute + 2 * sizes.outside_layers * form.compute)
