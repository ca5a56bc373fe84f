"""What to change when a recipe does not fit: changes that the planner has tried itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlcs.errors import RecipeError
from rlcs.plan.planner import MemoryPlan
from rlcs.recipe.schema import Recipe

MOST_GPUS = 1024
SMALLEST_PACK = 1024
FEWEST_ROWS = 8
OFFLOAD = "parallel.cpu_offload=true"
VLLM_SHARES = (0.6, 0.5, 0.4, 0.3)

Try = Callable[[Sequence[str], int], dict[str, MemoryPlan]]
"""Plans with more overrides (`key=value`) on a number of GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """`changes` (`key=value`) that make it fit here, None if nothing does; GPUs that make it fit as it is.

    `alters` are those of the changes that change what is learnt, not only what it costs.
    """

    changes: tuple[str, ...] | None
    alters: tuple[str, ...]
    gpus: int | None


def advise(recipe: Recipe, attempt: Try, gpus: int) -> Advice:
    """Take changes in order, harmless ones first, until it fits; then drop those that were not needed."""
    harmless, altering = _harmless(recipe, gpus), _altering(recipe, gpus)
    taken: list[str] = []
    changes: tuple[str, ...] | None = None

    def enough(changes: Sequence[str]) -> bool:
        try:
            return _fits(attempt(changes, gpus))
        except RecipeError:  # changes that need each other
            return False

    for change in (*harmless, *altering):
        taken.append(change)
        if enough(taken):
            changes = tuple(_needed(taken, enough))
            break
    alters = tuple(change for change in changes or () if change in altering)
    return Advice(changes=changes, alters=alters, gpus=_enough_gpus(attempt, gpus))


def _needed(taken: Sequence[str], enough: Callable[[Sequence[str]], bool]) -> list[str]:
    needed = list(taken)
    for change in taken:
        rest = [other for other in needed if other != change]
        if enough(rest):
            needed = rest
    # Of several values of one key the last one counts.
    return list({change.partition("=")[0]: change for change in needed}.values())


def _fits(plans: dict[str, MemoryPlan]) -> bool:
    return all(plan.fits for plan in plans.values())


def _enough_gpus(attempt: Try, gpus: int) -> int | None:
    more = 2 * gpus
    while 0 < more <= MOST_GPUS:
        if _fits(attempt((), more)):
            return more
        more *= 2
    return None


def _harmless(recipe: Recipe, gpus: int) -> list[str]:
    """Changes that cost time (or main memory) and nothing else."""
    changes = [] if recipe.model.gradient_checkpointing else ["model.gradient_checkpointing=true"]
    if not recipe.parallel.reshard_after_forward:
        changes.append("parallel.reshard_after_forward=true")
    changes += _halved("sft.pack_tokens", recipe.sft.pack_tokens, SMALLEST_PACK)
    changes += _halved("grpo.pack_tokens", recipe.grpo.pack_tokens, SMALLEST_PACK)
    if recipe.rollout.engine == "local":
        changes += _halved("grpo.max_rows", recipe.grpo.max_rows, FEWEST_ROWS)
        changes += _halved("eval.max_rows", recipe.eval.max_rows, FEWEST_ROWS)
    else:
        share = recipe.rollout.memory_share or 1.0
        changes += [f"rollout.memory_share={less}" for less in VLLM_SHARES if less < share]
    movable = gpus and not recipe.parallel.cpu_offload and not recipe.lora.four_bit
    return [*changes, OFFLOAD] if movable else changes


def _altering(recipe: Recipe, gpus: int) -> list[str]:
    """Changes after which something else is learnt."""
    changes = [] if recipe.lora.rank else ["lora.rank=32"]
    packable = gpus <= 1 and recipe.parallel.compute_dtype == "same" and not recipe.lora.four_bit
    # 4-bit weights do not train under torchrun.
    changes += ["parallel.cpu_offload=false", "lora.four_bit=true"] if packable else []
    changes += ["grpo.kl.kind=none"] if recipe.grpo.kl.active else []
    changes += _halved("grpo.max_new_tokens", recipe.grpo.max_new_tokens, 512)
    changes += _halved("grpo.group_size", recipe.grpo.group_size, 4)
    return changes + _halved("prompt.max_tokens", recipe.prompt.max_tokens, 512)


def _halved(key: str, value: int, least: int) -> list[str]:
    changes = []
    while value // 2 >= least:
        value //= 2
        changes.append(f"{key}={value}")
    return changes
