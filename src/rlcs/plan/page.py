"""The plan of a recipe, as JSON and as text."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from textwrap import wrap
from typing import Any

from rlcs.errors import RecipeError, UserError
from rlcs.plan.advice import TURNS, Advice, advise, possible_changes
from rlcs.plan.data_size import rows_of
from rlcs.plan.machine import GIB, Assumed, Machine
from rlcs.plan.measured import Rates
from rlcs.plan.planner import Inputs, MemoryPlan, StagePlan, answer_seconds
from rlcs.plan.rates import Speeds, device_warning, least_certain, speeds_of
from rlcs.plan.shapes import Sizes
from rlcs.plan.sizes import sizes_of
from rlcs.plan.stages import placed, plan_stages
from rlcs.plan.startup import start_time
from rlcs.plan.step_time import StepTime
from rlcs.plan.total import Total, demonstrations_of, total_of
from rlcs.recipe.loading import changed, load_recipe

COMPUTED = (
    "parameters",
    "parts",
    "memory_gb",
    "parts_gb",
    "tokens_per_step",
    "tokens_per_step_repeated",
    "flops_per_step",
    "flops_per_step_repeated",
    "steps",
)
"""Figures that follow from the model's shapes and the recipe; of all others stands beside them how they are
known."""

GUESSED_PARTS = ("asleep",)
"""Parts of the memory that are guessed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory and time of what a recipe runs on a machine; `advice` where it does not fit."""

    name: str
    sizes: Sizes
    machine: Machine
    assumed: Assumed
    stages: dict[str, MemoryPlan]
    advice: Advice | None
    total: Total
    speeds: Speeds
    start: StepTime
    faster: str
    warning: str = ""

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return self.advice is None

    def to_json(self) -> dict[str, Any]:
        """The plan for scripts."""
        return {
            "recipe": self.name,
            "model": self.sizes.name,
            "parameters": self.sizes.total,
            "parts": dict(self.sizes.parameters),
            "gpus": self.machine.gpus,
            "device": self.machine.device.name,
            "device_memory_gb": round(self.machine.device.memory, 3),
            "assumed": self.assumed.model_dump(),
            "basis": dict.fromkeys(COMPUTED, "computed")
            | {f"parts_gb.{n}": "guessed" for n in GUESSED_PARTS},
            "rates": {
                n: {"value": v, "basis": self.speeds.basis([n])} for n, v in self.speeds.values.items()
            },
            "warning": self.warning,
            "faster": self.faster,
            "fits": self.fits,
            "stages": {name: stage.to_json() for name, stage in self.stages.items()},
            "start": self.start.to_json(),
            "total": self.total.to_json(),
            "advice": None if self.advice is None else asdict(self.advice),
        }

    def to_text(self) -> str:
        """The plan for a person: whether it fits and how long it takes, then memory and steps by stage."""
        lines = [*_head(self), *_table(self), ""]
        lines += [self.faster, ""] if self.faster else []
        return "\n".join([*lines, *self.total.to_text(), *_advice(self)])

    @property
    def hint(self) -> str:
        """Where the rest stands, and how guesses become measurements."""
        measure = (
            "" if self.speeds.measured else "; real rates: `rlcs doctor --gpu --out FILE`, --measured FILE"
        )
        return f"every second of a step: --explain{measure}"

    def explanation(self, width: int = 100) -> str:
        """The work of a step, its seconds phase by phase, and the rates from which they follow."""
        return "\n".join([*_work(self), "", *_phases(self, width)])


def make_plan(
    name: str, overrides: Sequence[str], machine: Machine, assumed: Assumed, rates: Rates | None = None
) -> Plan:
    """Plan what a recipe's arms need. Raises RecipeError; ModelError for a model without configuration."""
    warning = "" if rates is None else device_warning(rates, machine.device)
    chosen = load_recipe(name, overrides).recipe
    sizes = sizes_of(chosen.model)
    given = rows_of(chosen.data.cold_start, chosen.data.columns.response)
    demonstrations = demonstrations_of(chosen, given, assumed)
    counted = assumed.model_copy(update={"demonstrations": demonstrations.count or 0})
    speeds = speeds_of(machine, assumed, rates)
    timed = Inputs(assumed=counted, speeds=speeds)

    def attempt(more: Sequence[str], gpus: int) -> dict[str, MemoryPlan]:
        without_time = Inputs(assumed=counted)
        return plan_stages(changed(chosen, more), sizes, replace(machine, gpus=gpus), without_time)

    stages = plan_stages(chosen, sizes, machine, timed)
    advice = None
    learner, measured = placed(chosen, sizes, machine)
    if not all(stage.fits for stage in stages.values()):
        changes = possible_changes(learner, chosen.prompt, chosen.sft, chosen.grpo, chosen.eval)
        advice = advise(changes, attempt, machine.gpus)
    steps = {name: s.time.seconds for name, s in stages.items() if isinstance(s, StagePlan)}
    each = {"eval": answer_seconds(measured, chosen.eval, chosen.prompt, chosen.images, assumed, speeds)}
    faster = ""
    if not advice and machine.gpus and chosen.rollout.engine != "vllm_colocated" and "grpo" in stages:
        with suppress(RecipeError, UserError):
            faster = _faster(plan_stages(changed(chosen, TURNS), sizes, machine, timed), steps["grpo"])
    basis = least_certain(s.time.basis for s in stages.values() if isinstance(s, StagePlan))
    total = total_of(chosen, steps, each, machine=machine, assumed=assumed, basis=basis)
    return Plan(
        name=chosen.name,
        sizes=sizes,
        machine=machine,
        assumed=assumed,
        stages=stages,
        advice=advice,
        total=total,
        speeds=speeds,
        faster=faster,
        start=start_time(learner, (given, *(rows_of(s) for s in (chosen.data.rl, chosen.data.test))), speeds),
        warning=warning,
    )


def _faster(other: Mapping[str, MemoryPlan], now: float) -> str:
    """What the steps of RL would take with vLLM on all GPUs in turns, if that fits and saves a tenth."""
    stage = other["grpo"]
    if not isinstance(stage, StagePlan) or not all(plan.fits for plan in other.values()):
        return ""
    seconds = stage.time.seconds
    if seconds > 0.9 * now:
        return ""
    return f"faster: {TURNS[0]} would take {seconds:,.1f} s a step of grpo instead of {now:,.1f} s"


def _head(plan: Plan) -> Iterator[str]:
    machine, assumed = plan.machine, plan.assumed
    count = f"{machine.gpus} x " if machine.gpus else ""
    memory = f"{machine.device.memory:,.0f} GB"
    active, total = plan.sizes.active, plan.sizes.total
    some = f", {active / 1e9:.1f} G of them for a token" if active < total else ""
    yield f"{plan.name}: {plan.sizes.name}, {total:,} parameters{some}"
    yield f"on {count}{machine.device.name} with {memory}"
    peak = f"{max(stage.peak for stage in plan.stages.values()) / GIB:.1f} GB of {memory} at worst"
    yield f"it fits: {peak}" if plan.fits else f"it does not fit: {peak}; what would is at the end"
    minutes = max(1, round(plan.start.seconds / 60))
    yield f"{plan.total.amount} ({plan.total.basis}); the first answer is sampled after {minutes} min"
    yield (
        f"assumed: {assumed.text} text and {assumed.image} image tokens a prompt, {assumed.answer} an answer "
        f"(standard deviation {assumed.spread:.0%}): --assume"
    )
    if plan.warning:
        yield f"warning: {plan.warning}"
    yield ""


def _table(plan: Plan) -> Iterator[str]:
    names = list(plan.stages)
    yield f"{'':<34}" + "".join(f"{name:>14}" for name in names)

    def line(label: str, cells: Sequence[str], basis: str = "") -> str:
        text = f"{label:<34}" + "".join(f"{cell:>14}" for cell in cells)
        return f"{text:<{34 + 14 * len(names)}}   {basis}".rstrip()

    stages = list(plan.stages.values())
    for part in dict.fromkeys(part for stage in stages for part in stage.parts):
        sizes = [stage.parts.get(part) for stage in stages]
        if any(sizes):
            cells = ["" if size is None else f"{size / GIB:.2f} GB" for size in sizes]
            yield line(f"  {part}", cells, "guessed" if part in GUESSED_PARTS else "computed")
    peaks = [f"{stage.peak / GIB:.1f} GB" for stage in stages]
    yield line("memory of a device, at worst", peaks, "computed")
    yield line("fits", ["yes" if stage.fits else "NO" for stage in stages])
    trains = [stage for stage in stages if isinstance(stage, StagePlan)]
    basis = least_certain(stage.time.basis for stage in trains)
    yield line("seconds a step", [f"{stage.time.seconds:,.1f}" for stage in trains], basis)
    yield line("  GPUs idle", [f"{stage.time.idle:.1%}" for stage in trains], basis)
    yield line("steps", ["by the data" if s.steps is None else f"{s.steps:,}" for s in trains], "computed")
    hours = [stage.to_json()["hours"] for stage in trains]
    yield line("hours", ["" if value is None else f"{value:,.1f}" for value in hours], basis)


def _work(plan: Plan) -> Iterator[str]:
    """What a step computes, and what it would with every prompt repeated for each of its answers."""
    yield f"{'':<34}{'packed trees':>14}{'prompts repeated':>20}"
    for name, stage in plan.stages.items():
        if isinstance(stage, StagePlan):
            tokens, flops = _short(stage.tokens), _short(stage.flops)
            repeated = _short(stage.repeated_tokens), _short(stage.repeated_flops)
            yield f"{f'tokens a step of {name}':<34}{tokens:>14}{repeated[0]:>20}   computed"
            yield f"{f'operations a step of {name}':<34}{flops:>14}{repeated[1]:>20}   computed"


def _phases(plan: Plan, width: int) -> Iterator[str]:
    """The seconds of a step, one by one, and the rates from which they follow."""
    for name, stage in plan.stages.items():
        if isinstance(stage, StagePlan):
            yield f"a step of {name}: seconds, share in which GPUs work, how they are known"
            yield from stage.time.to_text(width)
            yield ""
    yield "from the start of the run to the engine's first answer, before any training"
    yield from plan.start.to_text(width)
    yield ""
    for basis in ("measured", "guessed"):
        values = plan.speeds.values.items()
        if rates := [f"{n}={v:.3g}" for n, v in values if plan.speeds.basis([n]) == basis]:
            yield from wrap(f"rates, {basis}: " + ", ".join(rates), width, subsequent_indent="  ")


def _advice(plan: Plan) -> Iterator[str]:
    if plan.advice is None:
        return
    yield ""
    yield "It does not fit. Tried:"
    if plan.advice.changes:
        yield "  here, with: " + " ".join(plan.advice.changes)
    else:
        yield "  here, no change of the recipe is enough"
    if plan.advice.alters:
        yield "  of these, " + ", ".join(plan.advice.alters) + " change what is learnt"
    if plan.advice.gpus:
        yield f"  as it is, with --gpus {plan.advice.gpus}"


def _short(number: float) -> str:
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"
