"""Questions in several steps over the quantities of a family.

A plan reads `kind|quantity|quantity...`. The kinds suit every family with countable or measurable things.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from rlcs.data.puzzles.family import Solution, listed

KINDS: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {
        1: ("add", "subtract"),
        2: ("double_add", "add_three"),
        3: ("times_add", "double_add_subtract"),
    }
)
"""Kinds of question by level: one step, two steps, then two or three steps of which one is harder."""

_FORMS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "add": ("What is {} plus {}?", "+"),
        "subtract": ("What is {} minus {}?", "-"),
        "double_add": ("What is double {} plus {}?", "*+"),
        "add_three": ("What is {} plus {} plus {}?", "++"),
        "times_add": ("What is {} times {} plus {}?", "*+"),
        "double_add_subtract": ("What is double {} plus {} minus {}?", "*+-"),
    }
)
"""The text of each kind, and the signs between its numbers from left to right; a double starts with 2."""


class Worksheet:
    """Calculates, and records each equation as a line."""

    def __init__(self) -> None:
        """Start with an empty sheet."""
        self.lines: list[str] = []

    def work(self, left: int, sign: str, right: int) -> int:
        """Calculate `left sign right` and record the equation; signs are + - *."""
        value = {"+": left + right, "-": left - right, "*": left * right}[sign]
        self.lines.append(f"{left}{sign}{right}={value}")
        return value

    def chain(self, numbers: Sequence[int], signs: str) -> int:
        """Calculate numbers with signs between them, from left to right."""
        total = numbers[0]
        for sign, number in zip(signs, numbers[1:], strict=True):
            total = self.work(total, sign, number)
        return total

    def total(self, numbers: Sequence[int]) -> int:
        """Add some numbers, one equation for each but the first."""
        return self.chain(numbers, "+" * (len(numbers) - 1))


def words(plan: str, phrase: Callable[[str], str]) -> str:
    """Write the question of a plan; `phrase` turns a quantity into words such as "the red bar"."""
    kind, *quantities = plan.split("|")
    return _FORMS[kind][0].format(*map(phrase, quantities))


def solve(plan: str, quantities: Mapping[str, int], reading: str) -> Solution:
    """Solve a plan: list the quantities in the question, then calculate."""
    kind, *names = plan.split("|")
    sheet = Worksheet()
    answer = _calculate(kind, [quantities[name] for name in names], sheet)
    return Solution(reading=reading, steps=(listed(quantities, names), *sheet.lines), answer=answer)


def _calculate(kind: str, values: Sequence[int], sheet: Worksheet) -> int:
    doubled = kind.startswith("double")
    return sheet.chain([2, *values] if doubled else values, _FORMS[kind][1])


def draw(rng: random.Random, level: int, quantities: Mapping[str, int]) -> str | None:
    """Draw a plan of this level over some of the quantities; None if the answer is below zero."""
    kind = rng.choice(KINDS[level])
    chosen = rng.sample(sorted(quantities), _FORMS[kind][0].count("{}"))
    answer = _calculate(kind, [quantities[name] for name in chosen], Worksheet())
    return "|".join((kind, *chosen)) if answer >= 0 else None
