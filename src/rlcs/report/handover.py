"""The models that SFT could hand over: what was measured of them, what each rule takes, and trials of RL."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlcs.report.load_run import Row, Run, number, part, text
from rlcs.train.handover import COLUMNS, choices

MEASURES = {
    "signal": "Groups with right and wrong answers",
    "entropy": "Entropy of answers, nats a token",
    "distinct": "Different final answers to a problem",
    "alike": "Likeness of answers to a problem",
    "format": "Answers in the right format",
    "loss": "Loss on held-out demonstrations",
    "mean_tokens": "Answer length, tokens",
}
"""Columns of validation.jsonl that have charts beside the accuracy, with their titles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A trial of RL after a round: its accuracy, and its gain with a step, with the 95% interval of that."""

    steps: int
    accuracy: float
    slope: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A measured step of SFT, the rules that take it, and its trials; `chosen` where it was handed over."""

    step: int
    values: Mapping[str, float | None]
    rules: tuple[str, ...]
    trials: tuple[Trial, ...]
    chosen: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class HandOver:
    """The candidates of one run, the rule of its recipe, why it chose as it did, and what that took."""

    run: str
    rule: str
    candidates: tuple[Candidate, ...]
    why: str
    cost: str

    @property
    def columns(self) -> list[str]:
        """The columns that rules go by, where they have values; the others have charts."""
        return [name for name in COLUMNS.values() if any(c.values[name] is not None for c in self.candidates)]


def handovers(runs: Sequence[Run]) -> list[HandOver]:
    """The hand-over of each run whose SFT was measured."""
    return [found for run in runs if (found := _handover(run)) is not None]


def _handover(run: Run) -> HandOver | None:
    rows = {
        int(step): {name: number(row, name) for name in COLUMNS.values()}
        for row in run.validation.get("sft", ())
        if (step := number(row, "step"))
    }
    if not rows or any(row["accuracy"] is None for row in rows.values()):
        return None
    taken, done = choices(rows), run.done.get("sft", {})
    candidates = tuple(
        Candidate(
            step=step,
            values=values,
            rules=tuple(rule for rule, choice in taken.items() if choice == step),
            trials=tuple(_trials(run.handover, step)),
            chosen=step == number(done, "step") and text(done, "rule") != "",
        )
        for step, values in sorted(rows.items())
    )
    return HandOver(
        run=run.folder.name,
        rule=text(done, "rule"),
        candidates=candidates,
        why=text(run.handover, "why"),
        cost=_cost(part(run.handover, "cost")),
    )


def _trials(handover: Row, step: int) -> Iterator[Trial]:
    rounds = handover.get("rounds")
    for each in rounds if isinstance(rounds, list) else ():
        standings = each.get("standings") if isinstance(each, dict) else None
        for row in standings if isinstance(standings, list) else ():
            if not isinstance(row, dict) or number(row, "step") != step:
                continue
            steps, accuracy, slope = number(each, "steps"), number(row, "accuracy"), row.get("slope")
            ends = [number({"value": end}, "value") for end in slope] if isinstance(slope, list) else []
            known = [end for end in ends if end is not None]
            if steps and accuracy is not None and len(known) == 3:
                yield Trial(steps=int(steps), accuracy=accuracy, slope=(known[0], known[1], known[2]))


def _cost(cost: Row) -> str:
    """What the choice took, in a sentence; empty where nothing was tried."""
    steps, share = number(cost, "steps"), number(cost, "share")
    if not steps or share is None:
        return ""
    answers = sum(number(cost, f"{name}_answers") or 0 for name in ("sft", "trials"))
    seconds = sum(number(cost, f"{name}_seconds") or 0 for name in ("sft", "trials"))
    count = f"{steps:,.0f} step{'' if steps == 1 else 's'} of RL ({share:.0%})"
    return f"The losers took {count}; to measure, {answers:,.0f} answers were sampled in {seconds:,.0f} s."
