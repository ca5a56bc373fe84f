"""Plans every stage that a recipe's arms need, on one machine."""

from dataclasses import replace

from rlcs.plan.machine import Machine
from rlcs.plan.placement import Placement, place
from rlcs.plan.planner import (
    FRAGMENTS,
    Inputs,
    MemoryPlan,
    StagePlan,
    plan_measurement,
    plan_training,
)
from rlcs.plan.shapes import Sizes
from rlcs.plan.sizes import sizes_of
from rlcs.plan.step_time import StepTime
from rlcs.recipe.arms import RL_ARMS, stages_behind
from rlcs.recipe.schema import Recipe

_NEVER = 10**9


def plan_stages(
    recipe: Recipe, sizes: Sizes, machine: Machine, inputs: Inputs, *, trainers: int | None = None
) -> dict[str, MemoryPlan]:
    """The plans of SFT and GRPO, where arms need them, and of measurement (`eval`).

    Raises UserError where no device is left to train.
    """
    learner, measured = placed(recipe, sizes, machine, trainers=trainers)
    needed = {stage for arm in recipe.study.arms for stage in stages_behind(arm)}
    prompts = recipe.prompt, recipe.images
    grpo = recipe.grpo.model_copy(update={"overlap": recipe.overlap})
    stages: dict[str, MemoryPlan] = {}
    if "sft" in needed:  # responses of given demonstrations may be longer than a teacher's
        longest = recipe.teacher.max_tokens
        stages["sft"] = plan_training(learner, recipe.sft, *prompts, inputs, longest_answer=longest)
    if needed & {*RL_ARMS}:
        limit = grpo.max_new_tokens
        plan = plan_training(learner, grpo, *prompts, inputs, longest_answer=limit)
        if grpo.teacher.model and not grpo.teacher.base_url:
            plan = _with_teacher(plan, recipe, learner)
        stages["grpo"] = plan
    if "mixed" in needed:
        shown = recipe.sft.model_copy(
            update={
                "batch_size": grpo.also.sft_batch_size * grpo.optimizer_steps,
                "pack_tokens": grpo.pack_tokens,
                "freeze": grpo.freeze,
                "save_every": _NEVER,  # that is counted for the stage as a whole
            }
        )
        longest = recipe.teacher.max_tokens
        own = plan_training(learner, shown, *prompts, inputs, longest_answer=longest)
        stages["mixed"] = _with_demonstrations(plan, own)
    return {**stages, "eval": plan_measurement(measured, recipe.eval, *prompts)}


def _with_teacher(plan: StagePlan, recipe: Recipe, learner: Placement) -> StagePlan:
    """The plan with the teacher that is loaded beside the policy, over the same devices."""
    model = recipe.model.model_copy(update={"name": recipe.grpo.teacher.model})
    size = sizes_of(model).total * learner.weight / learner.shards
    name = "offloaded" if learner.offloaded else "teacher"
    more = 0.0 if learner.offloaded else size * (1 + FRAGMENTS)
    parts = {**plan.parts, name: plan.parts.get(name, 0.0) + size}
    return replace(plan, parts=parts, peak=plan.peak + more)


def _with_demonstrations(plan: StagePlan, own: StagePlan) -> StagePlan:
    """The plan of the mixed arm, each step of which learns from demonstrations too, in packs of `own`."""
    more = max(0.0, own.parts["activations"] - plan.parts["activations"])
    phases = [replace(phase, name=f"demonstrations: {phase.name}") for phase in own.time.phases]
    return replace(
        plan,
        parts={**plan.parts, "activations": plan.parts["activations"] + more},
        peak=plan.peak + more * (1 + FRAGMENTS),
        tokens=plan.tokens + own.tokens,
        repeated_tokens=plan.repeated_tokens + own.repeated_tokens,
        flops=plan.flops + own.flops,
        repeated_flops=plan.repeated_flops + own.repeated_flops,
        time=StepTime(phases=(*plan.time.phases, *phases)),
    )


def placed(
    recipe: Recipe, sizes: Sizes, machine: Machine, *, trainers: int | None = None
) -> tuple[Placement, Placement]:
    """The model as it trains, and as it is measured; `trainers` are the devices that train, if known."""
    spread = recipe.lora, recipe.parallel, recipe.rollout
    learner = place(recipe.learner, *spread, sizes=sizes, machine=machine)
    measured = place(recipe.model, *spread, sizes=sizes, machine=machine)
    if trainers is None:
        return learner, measured
    return replace(learner, trainers=trainers), replace(measured, trainers=trainers)
