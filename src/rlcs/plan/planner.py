"""A recipe on a machine: memory, work and time of each training stage, and the memory of a measurement.

Memory is that of the fullest device at its worst moment: the largest pack that the recipe allows,
answers at their limit. Work and time are for the lengths that are assumed. Bytes follow from what
the code keeps; seconds follow from the machine's peaks and a stated utilisation, and are a guess.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlcs.evals.arms import CHUNK
from rlcs.plan.machine import GIB, Assumed, Machine
from rlcs.plan.memory import FP32, Load, Passing, activations, update_peak
from rlcs.plan.rollouts import Trees, decoding_seconds, live_prompts, rollout_bytes
from rlcs.plan.shapes import Sizes, Tower
from rlcs.plan.storage import formats, stored, trained_parts, trainers
from rlcs.plan.work import language, vision
from rlcs.recipe.schema import Recipe
from rlcs.recipe.stages import Grpo, Sft
from rlcs.train.sft import steps_of

LIBRARIES = 3 * GIB // 2
"""What a process holds before any model: the GPU's context and kernels, or Python with its libraries."""
FRAGMENTS = 0.05
"""Share of the memory in use that the allocator cannot hand out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """The memory of a stage. `parts` are bytes on one device; `peak` is their worst sum."""

    parts: Mapping[str, float]
    peak: float
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """Sizes in GB of 2**30 bytes."""
        return {
            "memory_gb": round(self.peak / GIB, 3),
            "fits": self.fits,
            "parts_gb": {name: round(size / GIB, 3) for name, size in self.parts.items()},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan(MemoryPlan):
    """One stage that trains.

    `tokens` and `flops` are of one step over all devices; `repeated_*` is what a trainer pays that
    repeats prompt and image for every answer. `steps` is None where the data decide.
    """

    tokens: int
    repeated_tokens: int
    flops: float
    repeated_flops: float
    seconds: Mapping[str, float]
    steps: int | None

    def to_json(self) -> dict[str, Any]:
        """The memory, and what a step is and takes."""
        step = sum(self.seconds.values())
        return MemoryPlan.to_json(self) | {
            "tokens_per_step": self.tokens,
            "tokens_per_step_repeated": self.repeated_tokens,
            "flops_per_step": self.flops,
            "flops_per_step_repeated": self.repeated_flops,
            "seconds_per_step": round(step, 3),
            "seconds_by_phase": {name: round(each, 3) for name, each in self.seconds.items()},
            "steps": self.steps,
            "hours": None if self.steps is None else round(step * self.steps / 3600, 2),
        }


def plan_stages(recipe: Recipe, sizes: Sizes, machine: Machine, assumed: Assumed) -> dict[str, MemoryPlan]:
    """The plan of each stage that trains, then of the measurement of an arm."""
    steps = steps_of(recipe.sft, assumed.demonstrations) if assumed.demonstrations else None
    return {
        "sft": _stage(recipe, recipe.sft, sizes, machine, assumed, steps),
        "grpo": _stage(recipe, recipe.grpo, sizes, machine, assumed, recipe.grpo.steps),
        "eval": _measurement(recipe, sizes, machine),
    }


def _stage(
    recipe: Recipe, stage: Sft | Grpo, sizes: Sizes, machine: Machine, assumed: Assumed, steps: int | None
) -> StagePlan:
    trees = expected_trees(recipe, stage, sizes.vision, assumed)
    parts, peak = _memory(recipe, stage, sizes, machine, trees)
    per_tree, repeated = _passes(recipe, stage, sizes, trees)
    speed = trainers(recipe, machine) * assumed.utilization * _peak_flops(recipe, machine)
    seconds = {name: trees.count * flops / speed for name, flops in per_tree.items()}
    if "rollout" in seconds:
        seconds["rollout"] += decoding_seconds(recipe, sizes, machine, trees)
    return StagePlan(
        **_in_all(parts, peak, machine),
        tokens=trees.count * trees.tokens,
        repeated_tokens=trees.count * trees.group * (trees.trunk + trees.answer),
        flops=trees.count * sum(per_tree.values()),
        repeated_flops=trees.count * trees.group * sum(repeated.values()),
        seconds=seconds,
        steps=steps,
    )


# --- what a step is made of ---------------------------------------------------------------------------


def expected_trees(recipe: Recipe, stage: Sft | Grpo, tower: Tower, assumed: Assumed) -> Trees:
    """The trees of one step with the assumed lengths, within the recipe's bounds."""
    images, longest = recipe.images, recipe.prompt.max_tokens
    rl = isinstance(stage, Grpo)
    lowest = (images.rl_min_pixels if rl else None) or images.min_pixels
    image = min(max(assumed.image, lowest // tower.side**2), images.max_pixels // tower.side**2)
    image = min(image, max(0, longest - assumed.text))
    return Trees(
        count=stage.prompts_per_step if isinstance(stage, Grpo) else stage.batch_size,
        trunk=min(longest, assumed.text + image),
        patches=tower.merge**2 * image,
        group=stage.group_size if isinstance(stage, Grpo) else 1,
        answer=min(assumed.answer, _longest_answer(recipe, stage)),
    )


def largest_tree(recipe: Recipe, stage: Sft | Grpo, tower: Tower) -> Trees:
    """The longest prompt that is let in, its image as large as can be, every answer at its limit."""
    image = min(recipe.images.max_pixels // tower.side**2, recipe.prompt.max_tokens)
    return Trees(
        count=1,
        trunk=recipe.prompt.max_tokens,
        patches=tower.merge**2 * image,
        group=stage.group_size if isinstance(stage, Grpo) else 1,
        answer=_longest_answer(recipe, stage),
    )


def _longest_answer(recipe: Recipe, stage: Sft | Grpo) -> int:
    """Of a rollout, or of a teacher; demonstrations that are given may be longer."""
    return stage.max_new_tokens if isinstance(stage, Grpo) else recipe.teacher.max_tokens


def possible_packs(stage: Sft | Grpo, trees: Trees, largest: Trees) -> list[Load]:
    """A full pack of expected trees, and the pack of the largest tree alone."""
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
    lies = stored(recipe, stage, sizes, machine)
    how = Passing(
        element=formats(recipe, machine).compute,
        checkpointing=recipe.model.gradient_checkpointing,
        trains=trained_parts(recipe, stage),
        adapters=recipe.lora.rank > 0,
    )
    largest = largest_tree(recipe, stage, sizes.vision)
    held = [activations(sizes, load, how) for load in possible_packs(stage, trees, largest)]
    several = trees.count * trees.tokens > stage.pack_tokens * trainers(recipe, machine)
    worst = max(update_peak(lies.gradients, each, packs=2 if several else 1) for each in held)
    parts = asdict(lies) | {"activations": max(each.kept + each.working for each in held)}
    worst += lies.gathered
    if isinstance(stage, Grpo):
        # The gradients of a step lie there until the next one begins.
        prompts = live_prompts(recipe, machine)
        parts["rollout"] = rollout_bytes(recipe, sizes, machine, largest, prompts=prompts, top_p=stage.top_p)
        rest = worst if recipe.rollout.engine == "vllm_server" else lies.gradients  # servers never sleep
        worst = max(worst, rest + parts["rollout"])
    return parts, lies.weights + lies.optimizer + lies.reference + worst


def _measurement(recipe: Recipe, sizes: Sizes, machine: Machine) -> MemoryPlan:
    """One arm: its whole model (adapters are merged, nothing has 4 bits), and every answer at its limit."""
    how = recipe.eval
    if recipe.model.dtype == "auto" and machine.gpus:  # which is so of a model that only answers
        model = recipe.model.model_copy(update={"dtype": "bfloat16"})
        recipe = recipe.model_copy(update={"model": model})
    largest = replace(largest_tree(recipe, recipe.grpo, sizes.vision), group=1, answer=how.max_new_tokens)
    own = sizes.total * formats(recipe, machine).weight / trainers(recipe, machine)
    moved = own if recipe.parallel.cpu_offload and machine.gpus else 0.0
    rows = min(how.max_rows, math.ceil(CHUNK / trainers(recipe, machine)))
    parts = {
        "weights": own - moved,
        "offloaded": moved,
        "rollout": rollout_bytes(recipe, sizes, machine, largest, prompts=rows, top_p=how.top_p),
    }
    return MemoryPlan(**_in_all(parts, parts["weights"] + parts["rollout"], machine))


def _in_all(parts: Mapping[str, float], worst: float, machine: Machine) -> dict[str, Any]:
    peak = worst * (1 + FRAGMENTS) + LIBRARIES
    return {"parts": parts, "peak": peak, "fits": peak <= machine.device.memory * GIB}


# --- work and time ------------------------------------------------------------------------------------


def _passes(
    recipe: Recipe, stage: Sft | Grpo, sizes: Sizes, trees: Trees
) -> tuple[dict[str, float], dict[str, float]]:
    """Operations by phase of one tree, and of one answer with a prompt of its own."""
    again = 1 if recipe.model.gradient_checkpointing else 0
    trains = trained_parts(recipe, stage)
    half = 2 + again  # what is frozen has gradients of its activations alone; where none are needed, none
    whole = half if recipe.lora.rank else half + 1
    layers = whole if "language_model" in trains else half
    tower = whole if "vision_tower" in trains else 1
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
