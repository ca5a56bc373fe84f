"""Questions in several steps over quantities that a family can name and measure.

A plan reads `kind|quantity|quantity...`. The same kinds serve every family whose images hold
countable or measurable things.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

KINDS: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {
        1: ("add", "subtract"),
        2: ("double_add", "add_three"),
        3: ("times_add", "double_add_subtract"),
    }
)
"""Kinds of question by level: one, two, then two or three steps of which one is hard."""

_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "add": "What is {} plus {}?",
        "subtract": "What is {} minus {}?",
        "double_add": "What is double {} plus {}?",
        "add_three": "What is {} plus {} plus {}?",
        "times_add": "What is {} times {} plus {}?",
        "double_add_subtract": "What is double {} plus {} minus {}?",
    }
)


class Worksheet:
    """Calculates and keeps each equation as a line."""

    def __init__(self) -> None:
        """Start with an empty sheet."""
        self.lines: list[str] = []

    def work(self, left: int, sign: str, right: int) -> int:
        """The result of `left sign right`, with the equation written down; signs are + - *."""
        value = {"+": left + right, "-": left - right, "*": left * right}[sign]
        self.lines.append(f"{left}{sign}{right}={value}")
        return value


def places(kind: str) -> int:
    """How many quantities a kind of question is about."""
    return _WORDS[kind].count("{}")


def words(plan: str, phrase: Callable[[str], str]) -> str:
    """The question of a plan; `phrase` turns a quantity into words such as "the red bar"."""
    kind, *quantities = plan.split("|")
    return _WORDS[kind].format(*map(phrase, quantities))


def calculate(kind: str, values: Sequence[int], sheet: Worksheet) -> int:
    """The answer to a kind of question, step by step on the sheet."""
    if kind == "add":
        return sheet.work(values[0], "+", values[1])
    if kind == "subtract":
        return sheet.work(values[0], "-", values[1])
    if kind == "add_three":
        return sheet.work(sheet.work(values[0], "+", values[1]), "+", values[2])
    if kind == "times_add":
        return sheet.work(sheet.work(values[0], "*", values[1]), "+", values[2])
    total = sheet.work(sheet.work(2, "*", values[0]), "+", values[1])
    return total if kind == "double_add" else sheet.work(total, "-", values[2])


def draw(rng: random.Random, level: int, quantities: Mapping[str, int]) -> str | None:
    """Draw a plan of this level over some of the quantities; None if the answer is below zero."""
    kind = rng.choice(KINDS[level])
    chosen = rng.sample(sorted(quantities), places(kind))
    answer = calculate(kind, [quantities[name] for name in chosen], Worksheet())
    return "|".join((kind, *chosen)) if answer >= 0 else None
