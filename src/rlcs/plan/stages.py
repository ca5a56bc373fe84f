"""Plans every stage of a recipe on one machine."""

from dataclasses import replace

from rlcs.plan.machine import Assumed, Machine
from rlcs.plan.placement import Placement, place
from rlcs.plan.planner import MemoryPlan, plan_measurement, plan_training
from rlcs.plan.shapes import Sizes
from rlcs.recipe.schema import Model, Recipe


def plan_stages(
    recipe: Recipe, sizes: Sizes, machine: Machine, assumed: Assumed, *, trainers: int | None = None
) -> dict[str, MemoryPlan]:
    """The plans of SFT, GRPO and measurement (`eval`); `trainers` are the devices that train, if known.

    Raises UserError where no device is left to train.
    """
    prompts = (recipe.prompt, recipe.images)
    learner = placed(recipe, recipe.learner, sizes, machine, trainers=trainers)
    measured = placed(recipe, recipe.model, sizes, machine, trainers=trainers)
    grpo = recipe.grpo
    # Responses of given demonstrations may be longer than a teacher's.
    longest = recipe.teacher.max_tokens
    return {
        "sft": plan_training(learner, recipe.sft, *prompts, assumed, longest_answer=longest),
        "grpo": plan_training(learner, grpo, *prompts, assumed, longest_answer=grpo.max_new_tokens),
        "eval": plan_measurement(measured, recipe.eval, *prompts),
    }


def placed(
    recipe: Recipe, model: Model, sizes: Sizes, machine: Machine, *, trainers: int | None = None
) -> Placement:
    """A model of the recipe spread over the machine, as `place` does it."""
    spread = place(model, recipe.lora, recipe.parallel, recipe.rollout, sizes=sizes, machine=machine)
    return spread if trainers is None else replace(spread, trainers=trainers)
