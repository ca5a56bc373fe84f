"""Plans every stage that a recipe's arms need, on one machine."""

from dataclasses import replace

from rlcs.plan.machine import Machine
from rlcs.plan.placement import Placement, place
from rlcs.plan.planner import Inputs, MemoryPlan, plan_measurement, plan_training
from rlcs.plan.shapes import Sizes
from rlcs.recipe.arms import RL_ARMS, stages_behind
from rlcs.recipe.schema import Recipe


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
        stages["grpo"] = plan_training(learner, grpo, *prompts, inputs, longest_answer=limit)
    return {**stages, "eval": plan_measurement(measured, recipe.eval, *prompts)}


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
