"""Which step of a measured stage each rule would end with: pure functions of the rows of `validation.jsonl`.

Steps are those of training: the model before the first one is measured, but never chosen.
"""

from collections.abc import Mapping
from typing import Any

from rlcs.recipe.handover import Rule

Rows = Mapping[int, Mapping[str, Any]]
"""The measurements of a stage by step."""

COLUMNS: Mapping[Rule, str] = {
    "best_pass_1": "accuracy",
    "best_pass_k": "pass_at_k",
    "most_signal": "signal",
}
"""Rules by validation, and the column of a row whose largest value each of them takes."""


def ranking(rule: Rule, rows: Rows) -> list[int]:
    """The measured steps from the one that a rule by validation takes down; of equals the earlier first.

    Empty for the other rules, and where the rule's column was not measured.
    """
    column = COLUMNS.get(rule)
    values = {step: row.get(column) for step, row in rows.items() if step and column}
    known = {step: value for step, value in values.items() if value is not None}
    return sorted(known, key=lambda step: (-known[step], step))


def choices(rows: Rows) -> dict[Rule, int]:
    """The step that each rule but `probe` would take; nothing before the first measurement of training."""
    last: dict[Rule, int] = {"last": max(rows)} if any(rows) else {}
    return last | {rule: order[0] for rule in COLUMNS if (order := ranking(rule, rows))}


def kept_steps(rule: Rule, rows: Rows) -> set[int]:
    """The steps whose checkpoints are needed at the end, as far as is known now; that of the last apart.

    `probe` tries what the rules by validation take. What one of them takes at the end was the best so far
    when it was measured, so that its checkpoint is there.
    """
    rules = tuple(COLUMNS) if rule == "probe" else (rule,)
    return {order[0] for each in rules if (order := ranking(each, rows))}
