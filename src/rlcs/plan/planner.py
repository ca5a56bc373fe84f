"""Plans memory, work and time of each training stage, and the memory of a measurement.

Memory is the peak of the fullest device: with the largest pack that the recipe allows and answers at
their limit. Work and time are for the assumed lengths. Bytes follow from the tensors that the code
keeps; seconds from rates of the machine, measured or guessed (`plan.step_time`).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlcs.evals import CHUNK
from rlcs.plan.lengths import group_lengths
from rlcs.plan.machine import GIB, Assumed
from rlcs.plan.memory import Load, Passing, activations, update_peak
from rlcs.plan.passes import kept_bytes, update_times
from rlcs.plan.placement import Placement, stored, units_of
from rlcs.plan.rates import Speeds
from rlcs.plan.rollouts import VLLM_ASLEEP, rollout_bytes, sampled
from rlcs.plan.step_time import StepTime, step_time
from rlcs.plan.towers import Tower
from rlcs.plan.work import Trees, language, vision
from rlcs.recipe.schema import Eval, Images, Prompts
from rlcs.recipe.stages import Grpo, Sft

LIBRARIES = 3 * GIB // 2
"""Bytes of a process without any model: the GPU's context and kernels, or Python with its libraries."""
FRAGMENTS = 0.05
"""Memory lost to fragmentation, as a share of the memory in use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a plan knows beside the recipe: assumed lengths, and the rates of the machine.

    Without rates memory and work alone are planned, and a step has no phases.
    """

    assumed: Assumed
    speeds: Speeds | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """The memory of a stage. `parts` are bytes on one device; `peak` is their worst sum, of `limit`."""

    parts: Mapping[str, float]
    peak: float
    limit: float

    @property
    def fits(self) -> bool:
        """Whether the device has enough memory."""
        return self.peak <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Sizes in GB of 2**30 bytes."""
        return {
            "memory_gb": round(self.peak / GIB, 3),
            "fits": self.fits,
            "parts_gb": {name: round(size / GIB, 3) for name, size in self.parts.items()},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan(MemoryPlan):
    """One training stage.

    `tokens` and `flops` are of one step over all devices; `repeated_*` are those of a trainer that
    repeats prompt and image for every answer. `steps` is None where it depends on unknown data.
    """

    tokens: int
    repeated_tokens: int
    flops: float
    repeated_flops: float
    time: StepTime
    steps: int | None

    def to_json(self) -> dict[str, Any]:
        """The memory, and the work and time of a step."""
        step = self.time.seconds
        return MemoryPlan.to_json(self) | {
            "tokens_per_step": self.tokens,
            "tokens_per_step_repeated": self.repeated_tokens,
            "flops_per_step": self.flops,
            "flops_per_step_repeated": self.repeated_flops,
            "step": self.time.to_json(),
            "steps": self.steps,
            "hours": None if self.steps is None else round(step * self.steps / 3600, 2),
        }


def plan_training(
    placed: Placement,
    stage: Sft | Grpo,
    prompt: Prompts,
    images: Images,
    inputs: Inputs,
    *,
    longest_answer: int,
) -> StagePlan:
    """Plan one training stage whose answers have `longest_answer` tokens at most."""
    assumed = inputs.assumed
    if isinstance(stage, Grpo):
        count, group, lowest = stage.prompts_per_step, stage.group_size, images.rl_min_pixels
        steps: int | None = stage.steps
    else:
        count, group, lowest = stage.batch_size, 1, None
        steps = stage.num_steps(assumed.demonstrations) if assumed.demonstrations else None
    tower, device = placed.sizes.vision, placed.machine.device
    largest = largest_tree(images, tower, prompt=prompt.max_tokens, group=group, answer=longest_answer)
    trees = expected_trees(largest, tower, assumed, count=count, lowest=lowest or images.min_pixels)
    parts, peak = _memory(placed, stage, trees, largest, images)
    per_tree, repeated = _passes(placed, stage, trees)
    time = StepTime(phases=())
    if inputs.speeds is not None:
        time = step_time(placed, stage, trees, images, inputs.speeds, assumed)
    return StagePlan(
        parts=parts,
        peak=peak,
        limit=device.memory * GIB,
        tokens=trees.count * trees.tokens,
        repeated_tokens=trees.count * trees.group * (trees.trunk + trees.answer),
        flops=trees.count * sum(per_tree.values()),
        repeated_flops=trees.count * trees.group * sum(repeated.values()),
        time=time,
        steps=steps,
    )


def plan_measurement(placed: Placement, sampling: Eval, prompt: Prompts, images: Images) -> MemoryPlan:
    """Plan an arm's measurement: its whole model (adapters merged, no 4 bits), answers at their limit."""
    largest = largest_tree(
        images, placed.sizes.vision, prompt=prompt.max_tokens, group=1, answer=sampling.max_new_tokens
    )
    own = placed.sizes.total * placed.weight / placed.shards
    moved = own if placed.offloaded else 0.0
    rows = min(sampling.max_rows, math.ceil(CHUNK / placed.trainers))
    parts = {
        "weights": own - moved,
        "offloaded": moved,
        "rollout": rollout_bytes(placed, largest, prompts=rows, top_p=sampling.top_p),
    }
    peak = with_overhead(parts["weights"] + parts["rollout"])
    return MemoryPlan(parts=parts, peak=peak, limit=placed.machine.device.memory * GIB)


def answer_seconds(
    placed: Placement,
    sampling: Eval,
    prompt: Prompts,
    images: Images,
    assumed: Assumed,
    speeds: Speeds,
) -> float:
    """Seconds of one answer in a measurement, where CHUNK problems are answered together."""
    tower = placed.sizes.vision
    largest = largest_tree(images, tower, prompt=prompt.max_tokens, group=1, answer=sampling.max_new_tokens)
    trees = expected_trees(largest, tower, assumed, count=CHUNK, lowest=images.min_pixels)
    groups = group_lengths(CHUNK, 1, mean=trees.answer, limit=sampling.max_new_tokens, spread=assumed.spread)
    one = sampled(placed, groups, trees, speeds, max_rows=sampling.max_rows)
    return (one.prefill + one.decode) / CHUNK


# --- the trees of a step ------------------------------------------------------------------------------


def largest_tree(images: Images, tower: Tower, *, prompt: int, group: int, answer: int) -> Trees:
    """A tree with the longest allowed prompt, the largest image, and every answer at its limit."""
    image = min(tower.tokens(images.max_pixels), prompt)
    return Trees(count=1, trunk=prompt, patches=tower.merge**2 * image, group=group, answer=answer)


def expected_trees(largest: Trees, tower: Tower, assumed: Assumed, *, count: int, lowest: int) -> Trees:
    """The `count` trees of one step with the assumed lengths; images have `lowest` pixels at least."""
    least = tower.whole(max(assumed.image, tower.tokens(lowest)))
    image = min(least, largest.patches // tower.merge**2)
    image = min(image, max(0, largest.trunk - assumed.text))
    return replace(
        largest,
        count=count,
        trunk=min(largest.trunk, assumed.text + image),
        patches=tower.merge**2 * image,
        answer=min(assumed.answer, largest.answer),
    )


# --- memory -------------------------------------------------------------------------------------------


def _memory(
    placed: Placement, stage: Sft | Grpo, trees: Trees, largest: Trees, images: Images
) -> tuple[dict[str, float], float]:
    """The parts of one device's memory, and its peak."""
    how = Passing(
        element=placed.compute,
        checkpointing=placed.checkpointing,
        trains=placed.trains(stage.freeze),
        adapters=placed.lora.rank > 0,
        experts="experts" not in stage.freeze,
    )
    held = stored(placed, stage.freeze, reference=isinstance(stage, Grpo) and stage.kl.active)
    full = max(1, min(trees.count, stage.pack_tokens // trees.tokens))
    packs = [(full, trees), (1, largest)]  # a full pack of expected trees, and the largest alone
    loads = [
        Load(tokens=n * t.tokens, targets=n * t.group * t.answer, patches=n * t.patches) for n, t in packs
    ]
    passes = [activations(placed.sizes, load, how) for load in loads]
    several = trees.count * trees.tokens > stage.pack_tokens * placed.trainers
    units = units_of(placed, stage.freeze)
    worst = max(update_peak(held.gradients, one, packs=2 if several else 1, units=units) for one in passes)
    parts = asdict(held) | {
        "gathered": units.gathered + units.layer + units.waiting,
        "activations": max(one.kept + one.working for one in passes),
    }
    if placed.rollout.engine == "vllm_colocated" and placed.machine.gpus:
        parts["asleep"] = float(VLLM_ASLEEP)
        worst += VLLM_ASLEEP
    if isinstance(stage, Grpo):
        parts["features"] = kept_bytes(placed, stage, trees, images)
        worst += parts["features"]
        # Whole groups within max_rows are decoded at once.
        own = math.ceil(stage.prompts_per_step / placed.trainers)
        prompts = min(own, max(1, stage.max_rows // stage.group_size))
        parts["rollout"] = rollout_bytes(placed, largest, prompts=prompts, top_p=stage.top_p)
        # Gradients stay until the next step begins; servers keep their memory at all times.
        rest = worst if placed.rollout.engine == "vllm_server" else held.gradients
        worst = max(worst, rest + parts["rollout"])
    return parts, with_overhead(held.weights + held.optimizer + held.reference + worst)


def with_overhead(worst: float) -> float:
    """The memory in use with that of libraries, and what is lost to fragmentation."""
    return worst * (1 + FRAGMENTS) + LIBRARIES


# --- work -----------------------------------------------------------------------------------------------


def _passes(placed: Placement, stage: Sft | Grpo, trees: Trees) -> tuple[dict[str, float], dict[str, float]]:
    """Operations by phase of one tree, and of one answer whose prompt is computed for it alone."""
    sizes = placed.sizes
    times: dict[str, tuple[float, float]] = {"update": update_times(placed, stage.freeze)}
    if isinstance(stage, Grpo):
        # The first optimiser step needs no old logprobs.
        recomputed = 1 - 1 / stage.optimizer_steps if stage.old_logprobs == "policy" else 0.0
        reference = int(stage.kl.active) + recomputed
        times |= {"reference": (reference, reference), "rollout": (1, 1)}
    image = vision(sizes.vision, trees.patches) if trees.patches else 0.0
    once = language(sizes, trees.trunk, [trees.answer] * trees.group)
    alone = language(sizes, trees.trunk, [trees.answer])
    shared = {phase: layers * once + tower * image for phase, (layers, tower) in times.items()}
    repeated = {phase: layers * alone + tower * image for phase, (layers, tower) in times.items()}
    return shared, repeated
