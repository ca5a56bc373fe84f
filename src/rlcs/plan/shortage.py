"""Says what to change where memory ran out: changes of the recipe with their arithmetic, cheapest first."""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from operator import attrgetter

from rlcs.errors import RecipeError
from rlcs.evals import CHUNK
from rlcs.plan.advice import possible_changes
from rlcs.plan.machine import GIB, Assumed, Machine
from rlcs.plan.memory import Passing, language_layer, token_keeps
from rlcs.plan.placement import Placement
from rlcs.plan.planner import Inputs, MemoryPlan, with_overhead
from rlcs.plan.shapes import Sizes
from rlcs.plan.sizes import sizes_of
from rlcs.plan.stages import placed, plan_stages
from rlcs.recipe.arms import RL_ARMS
from rlcs.recipe.loading import changed
from rlcs.recipe.schema import Recipe

STORED = ("weights", "gradients", "optimizer", "reference")
PARTS: Mapping[str, tuple[str, ...]] = {
    "loading": ("weights", "reference"),
    "sampling": (*STORED, "rollout"),
    "training": (*STORED, "gathered", "activations"),
}
"""The parts of a plan that one kind of work needs at once."""
LEAST_SAVED = 0.01
"""Changes that save a smaller share of the memory are left out."""
MOST_CHANGES = 7
COSTS = {
    "model.gradient_checkpointing": "about a third more time",
    "sft.pack_tokens": "more, smaller passes",
    "grpo.pack_tokens": "more, smaller passes",
    "grpo.max_rows": "more rounds of sampling",
    "eval.max_rows": "more rounds of sampling",
    "rollout.memory_share": "fewer answers at once",
    "parallel.reshard_after_forward": "weights are gathered twice a pass",
    "parallel.cpu_offload": "main memory holds them: far slower, and with torchrun only",
    "images.max_pixels": "large images lose detail",
    "lora.rank": "adapters are trained instead of all weights: other results",
    "lora.four_bit": "weights are rounded to 4 bits: other results",
    "grpo.kl.kind": "no reference model: other results",
    "grpo.max_new_tokens": "longer answers are cut: other results",
    "grpo.group_size": "fewer answers a problem: other results",
    "prompt.max_tokens": "longer prompts are left out",
}
"""What a change costs."""


def shortage_advice(recipe: Recipe, where: str, machine: Machine, *, trainers: int) -> str:
    """What to change in a recipe whose memory ran out at `where`, as OutOfMemory names it; "" if unknown.

    Raises RlcsError where the recipe cannot be planned.
    """
    stage, work = _kind(where)
    if not stage:
        return ""
    sizes = sizes_of(recipe.model)
    inputs = Inputs(assumed=Assumed())
    parts = _parts(plan_stages(recipe, sizes, machine, inputs, trainers=trainers)[stage], work)
    listed = " + ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    device = f"of the {_size(machine.device.memory * GIB)} of a device" if machine.gpus else "of main memory"
    total = f"with libraries and fragments {_size(with_overhead(sum(parts.values())))} {device}"
    lines = [f"planned for the longest prompts and answers: {listed}, {total}"]
    for change, other in _changes(recipe, sizes, machine, trainers):
        after = _parts(plan_stages(other, sizes, machine, inputs, trainers=trainers)[stage], work)
        if sum(parts.values()) - sum(after.values()) < LEAST_SAVED * sum(parts.values()):
            continue
        key = change.partition("=")[0]
        model = placed(other, sizes, machine, trainers=trainers)[stage == "eval"]
        notes = [_arithmetic(key, work, other, model), COSTS.get(key, "")]
        lines.append(
            f"  {change} (now {_shown(attrgetter(key)(recipe))}): {_difference(parts, after)} "
            f"({'; '.join(filter(None, notes))})"
        )
    lines[0] += (
        ". To need less:" if lines[1:] else ". No key makes it less: take a smaller model, or more memory"
    )
    return "\n     ".join(lines[: 1 + MOST_CHANGES])


def _kind(where: str) -> tuple[str, str]:
    """The stage of a plan, and the kind of work (of PARTS), at a place that OutOfMemory names."""
    first, last = where.split(": ")[0], where.split(": ")[-1]
    if first.startswith(("eval", "preflight")) or (first == "sft" and last == "sampling"):
        return "eval", "loading" if last == "loading" else "sampling"
    stage = "grpo" if first in RL_ARMS else "sft" if first == "sft" else ""
    return stage, {"loading": "loading", "rollout": "sampling", "sampling": "sampling"}.get(last, "training")


def _parts(plan: MemoryPlan, work: str) -> dict[str, float]:
    return {name: plan.parts.get(name, 0.0) for name in PARTS[work]}


def _changes(recipe: Recipe, sizes: Sizes, machine: Machine, trainers: int) -> Iterator[tuple[str, Recipe]]:
    """Changes of one key each, with the recipe that they make, those that cost least first."""
    learner = placed(recipe, sizes, machine, trainers=trainers)[0]
    possible = possible_changes(learner, recipe.prompt, recipe.sft, recipe.grpo, recipe.eval)
    fewer_pixels = f"images.max_pixels={recipe.images.max_pixels // 2}"
    seen = set[str]()
    for change in (*possible.harmless, fewer_pixels, *possible.altering):
        key = change.partition("=")[0]
        if key not in seen:
            seen.add(key)
            with suppress(RecipeError):  # changes that need each other
                yield change, changed(recipe, [change])


def _difference(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """The parts that a change makes smaller, before and after."""
    least = LEAST_SAVED * sum(before.values())
    names = [name for name in before if before[name] - after[name] > least]
    old, new = (sum(sizes[name] for name in names) for sizes in (before, after))
    return f"{', '.join(names)} {_size(old)} -> {_size(new)}"


def _arithmetic(key: str, work: str, recipe: Recipe, learner: Placement) -> str:
    """How the memory after a change is computed, where a formula says it."""
    section, _, name = key.partition(".")
    if name in ("max_rows", "max_new_tokens") and work == "sampling":
        return _cache(section, recipe, learner)
    if key == "images.max_pixels":
        tower = learner.sizes.vision
        tokens = tower.tokens(recipe.images.max_pixels)
        return f"{tokens:,} tokens of {tower.side} x {tower.side} pixels in the largest image"
    if key == "rollout.memory_share":
        return f"{recipe.rollout.memory_share} x {_size(learner.machine.device.memory * GIB)}"
    if work != "training":
        return ""
    stage = recipe.sft if section == "sft" else recipe.grpo
    how = Passing(
        element=learner.compute,
        checkpointing=learner.checkpointing,
        trains=learner.trains(stage.freeze),
        adapters=learner.lora.rank > 0,
        experts="experts" not in stage.freeze,
    )
    hidden, a_token = learner.sizes.hidden, token_keeps(learner.sizes, how)
    if name == "pack_tokens":
        kept = f"{stage.pack_tokens:,} tokens x {a_token:,} bytes = {_size(stage.pack_tokens * a_token)}"
        return f"the language model keeps {kept}"
    if name == "gradient_checkpointing":
        input_, layers = hidden * learner.compute, learner.sizes.layers
        whole = sum(n * language_layer(layer, hidden, how) for layer, n in layers.items())
        mean, count = whole // layers.total(), layers.total()
        return f"a token keeps {input_:,} bytes in each of {count} layers, not {mean:,}"
    if name in ("max_new_tokens", "group_size"):
        grpo = recipe.grpo
        tree = f"({recipe.prompt.max_tokens:,} + {grpo.group_size} x {grpo.max_new_tokens:,}) tokens"
        size = (recipe.prompt.max_tokens + grpo.group_size * grpo.max_new_tokens) * a_token
        return f"the language model keeps {tree} x {a_token:,} bytes = {_size(size)} of the largest tree"
    return ""


def _cache(section: str, recipe: Recipe, learner: Placement) -> str:
    """The local engine's keys and values: each prompt once, each answer; twice, as they grow by copying."""
    if section == "eval":
        prompts = min(recipe.eval.max_rows, math.ceil(CHUNK / learner.trainers))
        answers, longest = prompts, recipe.eval.max_new_tokens
    else:
        own = math.ceil(recipe.grpo.prompts_per_step / learner.trainers)
        prompts = min(own, max(1, recipe.grpo.max_rows // recipe.grpo.group_size))
        answers, longest = prompts * recipe.grpo.group_size, recipe.grpo.max_new_tokens
    tokens = f"{prompts:,} prompts x {recipe.prompt.max_tokens:,} + {answers:,} answers x {longest:,} tokens"
    kept, e = learner.sizes.cache, learner.compute
    a_token, a_row = kept.token_bytes(e), kept.row_bytes(e)
    size = 2 * (prompts * recipe.prompt.max_tokens + answers * longest) * a_token
    states = 2 * (prompts + answers) * a_row
    shown = f"keys and values: 2 x ({tokens}) x {a_token:,} bytes = {_size(size)}"
    more = f", states: 2 x {prompts + answers:,} rows x {a_row:,} bytes = {_size(states)}"
    return shown + more if a_row else shown


def _size(size: float) -> str:
    return f"{size / GIB:,.1f} GB" if size >= GIB / 10 or not size else f"{size / 2**20:,.1f} MB"


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
