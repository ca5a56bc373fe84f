"""Names gold answers that no answer can match, and says why."""

import re
from collections.abc import Sequence

from rlcs.grading.answers import compare
from rlcs.grading.extraction import extract
from rlcs.grading.golds import unwrap
from rlcs.grading.reading import read
from rlcs.grading.values import Expression
from rlcs.records import option_letter

_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:]?")
_LETTERS = re.compile(r"[A-Z](?:(?:[ ,;]|and)*[A-Z])+")
_SHOWN = 60


def gold_fault(gold: str, choices: Sequence[str] = ()) -> str:
    """Say why no answer can match a gold answer, or "": what is seen without math-verify."""
    found = unwrap(gold)
    named = f"the gold answer {gold[:_SHOWN]!r}"
    if found.text is None:
        return f"{named} cannot be used: {found.why}"
    if extract(f"\\boxed{{{found.text}}}").text != found.text:
        return f"{named} cannot be read: its braces do not match"
    fault = _option_fault(found.text, choices) if choices else ""
    return f"{named} {fault}" if fault else ""


def _option_fault(gold: str, choices: Sequence[str]) -> str:
    letters = [option_letter(index) for index in range(len(choices))]
    letter = _LETTER.fullmatch(gold)
    if gold in choices or (letter and letter[1].upper() in letters):
        return ""
    if any(compare(each, gold, choices).correct is not False for each in letters):
        return ""
    several = re.findall("[A-Z]", gold) if _LETTERS.fullmatch(gold) else []
    if several and set(several) <= set(letters):
        return ""
    if letter or several:
        return f"is no such option: the letters of the {len(choices)} choices are A to {letters[-1]}"
    if gold.isdecimal() and int(gold) <= len(choices):
        return (
            f"equals none of the {len(choices)} choices; an index from 0 or from 1? Write the letter instead"
        )
    return f"equals none of the {len(choices)} choices"


def formulas_of(gold: str) -> list[tuple[str, str]]:
    """What math-verify must be able to read in a gold answer: a formula beyond our own grammar."""
    value = read(unwrap(gold).text or "")
    return [(value.source, value.source)] if isinstance(value, Expression) and value.tree is None else []
