r"""MathVista's official rule (`evaluation/calculate_score.py` of lupantech/MathVista).

It scores an *extraction*, which the official script gets from a language model unless `shortcut` suffices.
A multiple-choice answer is always mapped to some choice, the nearest by edit distance, so that an empty
extraction can be right by luck.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlcs.records import Json, option_letter

_LETTER = re.compile(r"\(([a-zA-Z])\)")
_QUOTED = re.compile(r'The answer is "(.*)"\.')


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of question; `answer_type` is text, integer, float (to `precision` places) or list."""

    question_type: str
    answer_type: str
    choices: tuple[str, ...] = ()
    precision: int | None = None


def shortcut(response: str, kind: Kind) -> str | None:
    """Extract as the official script does without a language model; None where it would use one."""
    if response == "" or (kind.question_type == "multi_choice" and response in kind.choices):
        return response
    try:
        if kind.answer_type == "integer":
            return str(int(response))
        if kind.answer_type == "float":
            return str(float(response))
    except ValueError:
        pass
    quoted = _QUOTED.search(response)
    return quoted[1] if quoted else None


def predict(extraction: Json, kind: Kind) -> str | None:
    """Convert an extraction to the form of the gold answers; None if that is impossible."""
    if kind.question_type == "multi_choice":
        return _choice(str(extraction).strip(), kind.choices)
    text = str(extraction)
    try:
        if kind.answer_type == "integer":
            return str(int(float(text)))
        if kind.answer_type == "float":
            return str(round(float(text), kind.precision))
    except (ValueError, OverflowError):
        return None
    return text


def _choice(text: str, choices: Sequence[str]) -> str:
    if letter := _LETTER.search(text):
        text = letter[1].upper()
    letters = [option_letter(index) for index in range(len(choices))]
    if text in letters:
        return choices[letters.index(text)]
    return min(choices, key=lambda choice: edit_distance(choice, text))


def edit_distance(pattern: str, text: str) -> int:
    """Compute the Levenshtein distance, in one pass over `text` with a column as bits (Myers 1999)."""
    if not pattern:
        return len(text)
    positions: dict[str, int] = {}
    for index, char in enumerate(pattern):
        positions[char] = positions.get(char, 0) | 1 << index
    full, last = (1 << len(pattern)) - 1, 1 << (len(pattern) - 1)
    up, down, distance = full, 0, len(pattern)
    for char in text:
        equal = positions.get(char, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right, left = down | (full & ~(diagonal | up)), up & diagonal
        distance += (1 if right & last else 0) - (1 if left & last else 0)
        right, left = (right << 1 | 1) & full, (left << 1) & full
        up, down = left | (full & ~(diagonal | right)), right & diagonal
    return distance
