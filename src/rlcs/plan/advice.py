"""Advice for a recipe that does not fit: changes of which the planner has tried that they suffice."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from rlcs.errors import RecipeError, UserError
from rlcs.plan.placement import Placement
from rlcs.plan.planner import MemoryPlan
from rlcs.recipe.schema import Eval, Prompts
from rlcs.recipe.stages import Grpo, Sft

MOST_GPUS = 1024
SMALLEST_PACK = 1024
FEWEST_ROWS = 8
OFFLOAD = "parallel.cpu_offload=true"
TURNS = ("rollout.engine=vllm_colocated", "rollout.servers=1", "rollout.devices=[]", "rollout.urls=[]")
"""All GPUs sample with vLLM and train in turns."""
VLLM_SHARES = (0.6, 0.5, 0.4, 0.3)

Try = Callable[[Sequence[str], int], dict[str, MemoryPlan]]
"""Plans the stages with more overrides (`key=value`) on a number of GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """Changes (`key=value`) in the order in which they are tried.

    The `harmless` ones cost only time or main memory; the `altering` ones change the result of training.
    """

    harmless: tuple[str, ...]
    altering: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """`changes` (`key=value`) that make a recipe fit, None if none do; `gpus` on which it fits unchanged.

    `alters` are those of the changes that change the result of training.
    """

    changes: tuple[str, ...] | None
    alters: tuple[str, ...]
    gpus: int | None


def advise(changes: Changes, attempt: Try, gpus: int) -> Advice:
    """Add changes in order, harmless ones first, until the recipe fits; then drop the unneeded ones."""
    taken: list[str] = []
    needed: tuple[str, ...] | None = None

    def enough(changes: Sequence[str]) -> bool:
        try:
            return _fits(attempt(changes, gpus))
        except RecipeError:  # changes that need each other
            return False

    for change in (*changes.harmless, *changes.altering):
        taken.append(change)
        if enough(taken):
            needed = tuple(_needed(taken, enough))
            break
    alters = tuple(change for change in needed or () if change in changes.altering)
    return Advice(changes=needed, alters=alters, gpus=_enough_gpus(attempt, gpus))


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
        with suppress(UserError):  # parallel.shard_size does not divide every number
            if _fits(attempt((), more)):
                return more
        more *= 2
    return None


def possible_changes(placed: Placement, prompt: Prompts, sft: Sft, grpo: Grpo, measurement: Eval) -> Changes:
    """Every change of a recipe that may save memory, those with the least effect first."""
    rollout, lora, parallel, gpus = placed.rollout, placed.lora, placed.parallel, placed.machine.gpus
    harmless = [] if placed.checkpointing else ["model.gradient_checkpointing=true"]
    harmless += [] if parallel.reshard_after_forward else ["parallel.reshard_after_forward=true"]
    harmless += _halved("sft.pack_tokens", sft.pack_tokens, SMALLEST_PACK)
    harmless += _halved("grpo.pack_tokens", grpo.pack_tokens, SMALLEST_PACK)
    if rollout.engine == "local":
        harmless += _halved("grpo.max_rows", grpo.max_rows, FEWEST_ROWS)
        harmless += _halved("eval.max_rows", measurement.max_rows, FEWEST_ROWS)
    else:
        share = rollout.share or 1.0
        harmless += [f"rollout.memory_share={less}" for less in VLLM_SHARES if less < share]
    harmless += [OFFLOAD] if gpus and not parallel.cpu_offload and not lora.four_bit else []
    altering = [] if lora.rank else ["lora.rank=32"]
    # 4-bit weights do not train under torchrun.
    packable = gpus <= 1 and parallel.compute_dtype == "same" and not lora.four_bit
    altering += ["parallel.cpu_offload=false", "lora.four_bit=true"] if packable else []
    altering += ["grpo.kl.kind=none"] if grpo.kl.active else []
    altering += _halved("grpo.max_new_tokens", grpo.max_new_tokens, 512)
    altering += _halved("grpo.group_size", grpo.group_size, 4)
    altering += _halved("prompt.max_tokens", prompt.max_tokens, 512)
    return Changes(harmless=tuple(harmless), altering=tuple(altering))


def _halved(key: str, value: int, least: int) -> list[str]:
    changes = []
    while value // 2 >= least:
        value //= 2
        changes.append(f"{key}={value}")
    return changes
