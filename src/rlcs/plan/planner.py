"""A recipe on a machine: memory, work and time of each training stage.

Memory is that of the fullest device at its worst moment: the largest pack that the recipe allows,
answers at their limit. Work and time are for the lengths that are assumed. Bytes follow from what
the code keeps; seconds follow from the machine's peaks and a stated utilisation, and are a guess.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlcs.engines.local import PREFILL_TOKENS
from rlcs.plan.machine import GIB, Assumed, Machine
from rlcs.plan.memory import FP32, Load, Passing, activations, update_peak
from rlcs.plan.shapes import Sizes
from rlcs.plan.work import language, vision
from rlcs.recipe.schema import Grpo, Recipe, Sft
from rlcs.sft import steps_of

PATCHES_A_TOKEN = 4
PIXELS_A_TOKEN = 28 * 28
LIBRARIES = 3 * GIB // 2
"""What a process holds before any model: the GPU's context and kernels, or Python with its libraries."""
FRAGMENTS = 0.05
"""Share of the memory in use that the allocator cannot hand out."""
READING = 0.6
"""Share of the memory bandwidth that decoding reaches."""
LAYER_S = 5e-4
"""Seconds that one layer's launches take at least in a decoding step of the local engine: a guess."""
SAMPLING = 32
SAMPLING_TOP_P = 52
"""Bytes that choosing a token takes for each row and word of the vocabulary (`engines.sampling`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Formats:
    """Bytes of a stored weight, of a computed number, and of a gradient on its way between devices."""

    weight: int
    compute: int
    reduce: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trees:
    """`count` trees a step of `trunk` tokens with `patches` image patches and `group` answers of `answer`."""

    count: int
    trunk: int
    patches: int
    group: int
    answer: int

    @property
    def tokens(self) -> int:
        """Of one tree."""
        return self.trunk + self.group * self.answer


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """One stage. `parts` of the memory are bytes on one device; `peak` is their worst sum.

    `tokens` and `flops` are of one step over all devices; `repeated_*` is what a trainer pays that
    repeats prompt and image for every answer. `steps` is None where the data decide.
    """

    parts: Mapping[str, float]
    peak: float
    fits: bool
    tokens: int
    repeated_tokens: int
    flops: float
    repeated_flops: float
    seconds: Mapping[str, float]
    steps: int | None

    def to_json(self) -> dict[str, Any]:
        """Sizes in GB of 2**30 bytes."""
        step = sum(self.seconds.values())
        return {
            "memory_gb": round(self.peak / GIB, 3),
            "fits": self.fits,
            "parts_gb": {name: round(size / GIB, 3) for name, size in self.parts.items()},
            "tokens_per_step": self.tokens,
            "tokens_per_step_repeated": self.repeated_tokens,
            "flops_per_step": self.flops,
            "flops_per_step_repeated": self.repeated_flops,
            "seconds_per_step": round(step, 3),
            "seconds_by_phase": {name: round(each, 3) for name, each in self.seconds.items()},
            "steps": self.steps,
            "hours": None if self.steps is None else round(step * self.steps / 3600, 2),
        }


def formats(recipe: Recipe, machine: Machine) -> Formats:
    """The number formats that the recipe gets on this machine."""
    exact = recipe.model.dtype == "float32" or (recipe.model.dtype == "auto" and not machine.gpus)
    weight = FP32 if exact else 2
    return Formats(weight=weight, compute=weight, reduce=weight)


def plan_stages(recipe: Recipe, sizes: Sizes, machine: Machine, assumed: Assumed) -> dict[str, StagePlan]:
    """The plan of each stage that trains."""
    steps = steps_of(recipe.sft, assumed.demonstrations) if assumed.demonstrations else None
    return {
        "sft": _stage(recipe, recipe.sft, sizes, machine, assumed, steps),
        "grpo": _stage(recipe, recipe.grpo, sizes, machine, assumed, recipe.grpo.steps),
    }


def _stage(
    recipe: Recipe, stage: Sft | Grpo, sizes: Sizes, machine: Machine, assumed: Assumed, steps: int | None
) -> StagePlan:
    trees = expected_trees(recipe, stage, assumed)
    parts, peak = _memory(recipe, stage, sizes, machine, trees)
    peak = peak * (1 + FRAGMENTS) + LIBRARIES
    per_tree, repeated = _passes(recipe, stage, sizes, trees)
    speed = machine.devices * assumed.utilization * _peak_flops(recipe, machine)
    seconds = {name: trees.count * flops / speed for name, flops in per_tree.items()}
    if "rollout" in seconds:
        seconds["rollout"] += _decoding_seconds(stage, sizes, machine, trees, formats(recipe, machine))
    return StagePlan(
        parts=parts,
        peak=peak,
        fits=peak <= machine.device.memory * GIB,
        tokens=trees.count * trees.tokens,
        repeated_tokens=trees.count * trees.group * (trees.trunk + trees.answer),
        flops=trees.count * sum(per_tree.values()),
        repeated_flops=trees.count * trees.group * sum(repeated.values()),
        seconds=seconds,
        steps=steps,
    )


# --- what a step is made of ---------------------------------------------------------------------------


def expected_trees(recipe: Recipe, stage: Sft | Grpo, assumed: Assumed) -> Trees:
    """The trees of one step with the assumed lengths, within the recipe's bounds."""
    images, longest = recipe.images, recipe.prompt.max_tokens
    lowest = (
        max(images.min_pixels, images.rl_min_pixels or 0) if isinstance(stage, Grpo) else images.min_pixels
    )
    image = min(max(assumed.image, lowest // PIXELS_A_TOKEN), images.max_pixels // PIXELS_A_TOKEN)
    image = min(image, max(0, longest - assumed.text))
    rl = isinstance(stage, Grpo)
    return Trees(
        count=stage.prompts_per_step if isinstance(stage, Grpo) else stage.batch_size,
        trunk=min(longest, assumed.text + image),
        patches=PATCHES_A_TOKEN * image,
        group=stage.group_size if isinstance(stage, Grpo) else 1,
        answer=min(assumed.answer, recipe.grpo.max_new_tokens) if rl else assumed.answer,
    )


def largest_tree(recipe: Recipe, stage: Sft | Grpo) -> Trees:
    """The longest prompt that is let in, its image as large as can be, every answer at its limit."""
    image = min(recipe.images.max_pixels // PIXELS_A_TOKEN, recipe.prompt.max_tokens)
    return Trees(
        count=1,
        trunk=recipe.prompt.max_tokens,
        patches=PATCHES_A_TOKEN * image,
        group=stage.group_size if isinstance(stage, Grpo) else 1,
        answer=stage.max_new_tokens if isinstance(stage, Grpo) else recipe.teacher.max_tokens,
    )


def possible_packs(recipe: Recipe, stage: Sft | Grpo, trees: Trees) -> list[Load]:
    """A full pack of expected trees, and the pack of the largest tree alone."""
    largest = largest_tree(recipe, stage)
    fit = max(1, min(trees.count, stage.pack_tokens // trees.tokens))
    return [
        Load(tokens=n * t.tokens, targets=n * t.group * t.answer, patches=n * t.patches)
        for n, t in ((fit, trees), (1, largest))
    ]


# --- memory -------------------------------------------------------------------------------------------


def _memory(
    recipe: Recipe, stage: Sft | Grpo, sizes: Sizes, machine: Machine, trees: Trees
) -> tuple[dict[str, float], float]:
    """The parts of one device's memory, and their sum at the worst moment, without libraries."""
    shards, form = machine.devices, formats(recipe, machine)
    trainable = sizes.total - sum(sizes.parameters[part] for part in stage.freeze)
    gradients = trainable * form.weight / shards
    weights = sizes.total * form.weight / shards
    optimizer = 2 * gradients
    how = Passing(
        element=form.compute, checkpointing=recipe.model.gradient_checkpointing, frozen=stage.freeze
    )
    held = [activations(sizes, load, how) for load in possible_packs(recipe, stage, trees)]
    several = trees.count * trees.tokens > stage.pack_tokens * shards
    update = max(update_peak(gradients, each, packs=2 if several else 1) for each in held)
    gathered = 0.0
    if shards > 1:
        layers = 2 * sizes.largest_layer * (2 * form.compute + form.reduce)
        gathered = layers + 2 * sizes.outside_layers * form.compute
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    parts["activations"] = max(each.kept + each.working for each in held)
    parts["gathered"] = gathered
    stays = weights + optimizer
    worst = update + gathered
    if isinstance(stage, Grpo):
        parts["reference"] = weights if stage.kl.active else 0.0
        parts["cache"] = _rollout_bytes(recipe, stage, sizes, machine, form)
        stays += parts["reference"]
        whole = sizes.total * form.compute if shards > 1 else 0
        worst = max(worst, parts["cache"] + whole)
    return parts, stays + worst


def _rollout_bytes(recipe: Recipe, stage: Grpo, sizes: Sizes, machine: Machine, form: Formats) -> float:
    """The local engine's cache at its limit (it grows by copying), and what sampling and prefill take."""
    text, largest = sizes.text, largest_tree(recipe, stage)
    width = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    token = 2 * width * text.num_hidden_layers * form.compute
    prompts = _live_prompts(stage, machine)
    rows = prompts * stage.group_size
    cache = 2 * token * (prompts * largest.trunk + rows * largest.answer)
    choosing = rows * text.vocab_size * (SAMPLING if stage.top_p == 1 else SAMPLING_TOP_P)
    prefill = min(max(PREFILL_TOKENS, largest.trunk), prompts * largest.trunk)
    patches = prefill * largest.patches // largest.trunk
    passing = (
        3
        * form.compute
        * max(
            prefill * (text.intermediate_size + text.hidden_size),
            patches * (sizes.vision.intermediate_size + sizes.vision.hidden_size),
        )
    )
    return float(cache + max(choosing, passing))


def _live_prompts(stage: Grpo, machine: Machine) -> int:
    """Prompts whose answers one device decodes at once: whole groups within max_rows."""
    own = math.ceil(stage.prompts_per_step / machine.devices)
    return min(own, max(1, stage.max_rows // stage.group_size))


# --- work and time ------------------------------------------------------------------------------------


def _passes(
    recipe: Recipe, stage: Sft | Grpo, sizes: Sizes, trees: Trees
) -> tuple[dict[str, float], dict[str, float]]:
    """Operations by phase of one tree, and of one answer with a prompt of its own."""
    again = 1 if recipe.model.gradient_checkpointing else 0
    tower = 1 if "vision_tower" in stage.freeze else 3 + again
    layers = (2 if "language_model" in stage.freeze else 3) + again
    forward = {"update": 0.0} | ({"reference": 0.0, "rollout": 0.0} if isinstance(stage, Grpo) else {})
    reference = 0
    if isinstance(stage, Grpo):
        recomputed = stage.optimizer_steps > 1 and stage.old_logprobs == "policy"
        reference = int(stage.kl.active) + int(recomputed)
    times = {"update": (layers, tower), "reference": (reference, reference), "rollout": (1, 1)}
    image = vision(sizes.vision, trees.patches) if trees.patches else 0.0
    once = language(sizes.text, trees.trunk, [trees.answer] * trees.group)
    alone = language(sizes.text, trees.trunk, [trees.answer])
    shared = {phase: times[phase][0] * once + times[phase][1] * image for phase in forward}
    repeated = {phase: times[phase][0] * alone + times[phase][1] * image for phase in forward}
    return shared, repeated


def _peak_flops(recipe: Recipe, machine: Machine) -> float:
    form = formats(recipe, machine)
    return machine.device.float32 if form.compute == FP32 else machine.device.bfloat16


def _decoding_seconds(
    stage: Sft | Grpo, sizes: Sizes, machine: Machine, trees: Trees, form: Formats
) -> float:
    """Decoding reads all weights for one token a row: steps times the longer of reading and launching."""
    assert isinstance(stage, Grpo), "only GRPO decodes"
    own = math.ceil(stage.prompts_per_step / machine.devices)
    waves = math.ceil(own / _live_prompts(stage, machine))
    layers = sizes.text.num_hidden_layers
    reading = sizes.parameters["language_model"] * form.compute / (machine.device.bandwidth * READING)
    launching = layers * LAYER_S if machine.gpus else 0.0
    return waves * trees.answer * max(reading, launching)
