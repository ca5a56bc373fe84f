"""What lies on one device: weights, gradients, optimiser, reference, and what a sharded model gathers."""

from collections.abc import Collection
from dataclasses import dataclass

from rlcs.errors import UserError
from rlcs.plan.machine import Machine
from rlcs.plan.memory import FP32
from rlcs.plan.shapes import Sizes
from rlcs.recipe.schema import Grpo, Recipe, Sft
from rlcs.recipe.section import Part

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
    """Bytes on one device. `gathered` stands beside them while a sharded model computes."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    gathered: float


def formats(recipe: Recipe, machine: Machine) -> Formats:
    """The number formats that the recipe gets on this machine."""
    sizes = {"float32": FP32, "bfloat16": 2, "auto": 2 if machine.gpus else FP32}
    weight = sizes[recipe.model.dtype]
    compute = sizes.get(recipe.parallel.compute_dtype, weight)
    return Formats(weight=weight, compute=compute, reduce=sizes.get(recipe.parallel.reduce_dtype, compute))


def trainers(recipe: Recipe, machine: Machine) -> int:
    """Devices that train: all but those that our own vLLM servers have to themselves. Raises UserError."""
    rollout = recipe.rollout
    own = rollout.engine == "vllm_server" and not rollout.urls
    taken = sum(len(devices.split(",")) for devices in rollout.devices) if own else 0
    if machine.gpus and machine.gpus <= taken:
        raise UserError(
            f"rollout.devices takes {taken} GPUs, which leaves none of {machine.gpus} to train",
            where="--gpus",
            fix=f"plan for more, {2 * taken} say, or change rollout.devices",
        )
    return machine.devices - (taken if machine.gpus else 0)


def trained_parts(recipe: Recipe, stage: Sft | Grpo) -> Collection[Part]:
    """Parts of the model that learn in a stage, whole or by adapters."""
    every: tuple[Part, ...] = ("vision_tower", "merger", "language_model")
    return [part for part in (recipe.lora.parts if recipe.lora.rank else every) if part not in stage.freeze]


def stored(recipe: Recipe, stage: Sft | Grpo, sizes: Sizes, machine: Machine) -> Stored:
    """What one device holds. Sharded over several devices, or over one where formats are mixed."""
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
    return Stored(
        weights=(weights + FP32 * adapters) / shards,
        gradients=learns / shards,
        optimizer=2 * learns / shards,
        reference=weights / shards if reference else 0.0,
        gathered=_gathered(recipe, sizes, form) if shards > 1 or form.weight != form.compute else 0.0,
    )


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
