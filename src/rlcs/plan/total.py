"""The stages that a command runs, in their order, and what they come to: hours, GPU-hours, money, tokens."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlcs.distill.chains import Chain
from rlcs.plan.data_size import Rows, rows_of
from rlcs.plan.machine import Assumed, Machine
from rlcs.plan.price import Price
from rlcs.plan.rates import Basis
from rlcs.recipe.arms import ARMS, RL_ARMS, TRAINING_ORDER, stages_behind
from rlcs.recipe.handover import MOST_CANDIDATES
from rlcs.recipe.schema import Recipe, Teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One stage of a run: its hours (None: unknown), and a note on what they follow from."""

    name: str
    hours: float | None
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherWork:
    """Requests and tokens of the teacher at most, and their cost where the recipe names prices."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Total:
    """All stages of a command, `seeds` times, on so many GPUs (0: one CPU)."""

    items: tuple[Item, ...]
    arms: tuple[str, ...]
    gpus: int
    seeds: int
    price: Price | None
    teacher: TeacherWork | None
    basis: Basis

    @property
    def hours(self) -> float:
        """The hours of the stages whose hours are known."""
        return self.seeds * sum(item.hours or 0.0 for item in self.items)

    @property
    def gpu_hours(self) -> float:
        """The hours of all GPUs together."""
        return self.hours * self.gpus

    @property
    def amount(self) -> str:
        """Hours, GPU-hours and money in words."""
        least = "at least " if self.unknown else ""
        times = f"{self.seeds} seeds, " if self.seeds > 1 else ""
        parts = [f"{times}{least}{_short(self.hours)} hours"]
        if self.gpus:
            parts.append(f"{_short(self.gpu_hours)} GPU-hours")
        if self.price is not None:
            each = f"{self.price.of(1)} a GPU-hour" if self.gpus else f"{self.price.of(1)} an hour"
            parts.append(f"{self.price.of(self.gpu_hours or self.hours)} at {each}")
        return ", ".join(parts)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The stages whose hours are unknown."""
        return tuple(item.name for item in self.items if item.hours is None)

    def to_json(self) -> dict[str, Any]:
        """The total for scripts."""
        paid = None if self.price is None else round(self.price.amount * (self.gpu_hours or self.hours), 2)
        return {
            "arms": list(self.arms),
            "seeds": self.seeds,
            "stages": [{"name": i.name, "hours": _rounded(i.hours), "note": i.note} for i in self.items],
            "hours": _rounded(self.hours),
            "basis": self.basis,
            "gpu_hours": _rounded(self.gpu_hours),
            "cost": paid,
            "currency": self.price.currency if self.price else None,
            "unknown": list(self.unknown),
            "teacher": None if self.teacher is None else asdict(self.teacher),
        }

    def to_text(self) -> Iterator[str]:
        """The total as lines of text."""
        yield f"what runs, in this order (hours are {self.basis})"
        for item in self.items:
            hours = "unknown" if item.hours is None else f"{_short(item.hours)} h"
            yield f"  {item.name:<28}{hours:>10}   {item.note}"
        if self.teacher is not None:
            work = self.teacher
            cost = "no price is set" if work.cost is None else f"cost {work.cost:,.2f} (computed)"
            tokens = (
                f"{work.prompt_tokens / 1e6:,.1f} M prompt and {work.completion_tokens / 1e6:,.1f} M answer"
            )
            yield f"  teacher, at most: {work.requests:,} requests, {tokens} tokens (guessed); {cost}"
        yield f"total: {self.amount}"
        if self.unknown:
            yield f"  without {', '.join(self.unknown)}"


def total_of(
    recipe: Recipe,
    steps: Mapping[str, float],
    answers: Mapping[str, float],
    *,
    machine: Machine,
    assumed: Assumed,
    basis: Basis,
) -> Total:
    """Add up what a recipe runs.

    `steps` are seconds of a step by stage, `answers` of a measured answer; `basis` is how both are known.
    """
    data = recipe.data
    test = rows_of(data.test)
    measured = _hours(test.count, answers["eval"])
    note = _count(test, "problems")
    given = rows_of(data.cold_start, data.columns.response)
    items = [Item(name="measuring base", hours=measured, note=note)]
    if recipe.study.cold_starts:
        items.append(_cold_start(recipe.teacher, given))
    needed = [s for s in TRAINING_ORDER if any(s in stages_behind(arm) for arm in recipe.study.arms)]
    for stage in needed:
        if stage == "sft":
            items.append(_sft(recipe, given, assumed, steps["sft"], answers))
        else:
            items.append(_rl(recipe, stage, steps.get(stage, steps["grpo"]), answers))
        if stage in recipe.study.arms:
            items.append(Item(name=f"measuring {ARMS[stage].label}", hours=measured, note=note))
    work = _teacher_work(recipe.teacher, given, assumed) if recipe.study.cold_starts else None
    return Total(
        items=tuple(items),
        arms=recipe.study.arms,
        gpus=machine.gpus,
        seeds=1,
        price=None,
        teacher=work,
        basis=basis,
    )


def demonstrations_of(recipe: Recipe, rows: Rows, assumed: Assumed) -> Rows:
    """The demonstrations that SFT trains on: as assumed, or from the rows of the cold start."""
    if assumed.demonstrations:
        return Rows(count=assumed.demonstrations, basis="assumed")
    most = recipe.data.max_demonstrations or math.inf
    if rows.count is None or rows.answered:
        return rows if rows.count is None or rows.count <= most else replace(rows, count=int(most))
    kept = rows.count * recipe.teacher.max_kept
    if recipe.teacher.who == "builtin" and recipe.teacher.keep == "right":
        kept = round(kept * (1 - recipe.teacher.wrong_share))
    return Rows(count=int(min(kept, most)), basis=f"{rows.basis}, at most; guessed")


def _cold_start(teacher: Teacher, rows: Rows) -> Item:
    name = "cold start"
    if rows.answered or teacher.who == "builtin":
        who = "answers are given" if rows.answered else "the built-in teacher, seconds"
        return Item(name=name, hours=0.0, note=who)
    return Item(name=name, hours=None, note=f"{_count(rows, 'problems')}, by the teacher's speed")


def _sft(recipe: Recipe, rows: Rows, assumed: Assumed, step: float, answers: Mapping[str, float]) -> Item:
    shown = demonstrations_of(recipe, rows, assumed)
    if shown.count is None:
        return Item(name=ARMS["sft"].stage, hours=None, note="say how many: --assume demonstrations=N")
    steps = recipe.sft.num_steps(shown.count)
    checks = _validations(recipe, recipe.validation.sft_every, steps, answers)
    note = f"{steps:,} steps (computed) of {_count(shown, 'demonstrations')}"
    return Item(name=ARMS["sft"].stage, hours=(steps * step + checks) / 3600, note=note)


def _rl(recipe: Recipe, arm: str, step: float, answers: Mapping[str, float]) -> Item:
    assert arm in RL_ARMS, arm
    steps = recipe.grpo.steps
    checks = _validations(recipe, recipe.validation.grpo_every, steps, answers)
    note = f"{steps:,} steps (the recipe's)"
    if arm == "sft_grpo" and recipe.sft.handover.rule == "probe":
        handover = recipe.sft.handover
        checks += (MOST_CANDIDATES + sum(handover.rounds)) * _measured(recipe) * answers["eval"]
        note += f", at most {handover.most_steps:,} of them in trials that lose"
    return Item(name=ARMS[arm].stage, hours=(steps * step + checks) / 3600, note=note)


def _validations(recipe: Recipe, every: int, steps: int, answers: Mapping[str, float]) -> float:
    """Seconds of measuring while a stage trains: before it, every so many steps, and after it."""
    if not every:
        return 0.0
    return (2 + (steps - 1) // every) * _measured(recipe) * answers["eval"]


def _measured(recipe: Recipe) -> int:
    """Answers of one measurement while a stage trains."""
    return recipe.validation.problems * recipe.validation.samples


def _teacher_work(teacher: Teacher, rows: Rows, assumed: Assumed) -> TeacherWork | None:
    """What the teacher is asked at most: every sample of every problem; None where it is not asked."""
    if teacher.who == "builtin" or rows.answered or rows.count is None:
        return None
    turns = Chain(teacher.chain, folder=teacher.templates, form=teacher.format).length
    requests = rows.count * teacher.max_samples * turns
    answer = min(assumed.answer, teacher.max_tokens)
    prompt = requests * (assumed.text + assumed.image) + rows.count * teacher.max_samples * answer * (
        turns - 1
    )
    return TeacherWork(
        requests=requests,
        prompt_tokens=prompt,
        completion_tokens=requests * answer,
        cost=teacher.cost(prompt, requests * answer),
    )


def _hours(count: int | None, seconds: float) -> float | None:
    return None if count is None else count * seconds / 3600


def _count(rows: Rows, what: str) -> str:
    return f"unknown {what}" if rows.count is None else f"{rows.count:,} {what} ({rows.basis})"


def _rounded(hours: float | None) -> float | None:
    return None if hours is None else round(hours, 3)


def _short(hours: float) -> str:
    return f"{hours:,.2f}" if hours < 10 else f"{hours:,.0f}"
