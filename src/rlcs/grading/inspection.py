"""Names gold answers that no answer can match, and says why."""

import re
from collections.abc import Sequence

from rlcs.grading.choices import chosen, without_label
from rlcs.grading.compare import same
from rlcs.grading.extraction import extract
from rlcs.grading.golds import unwrap
from rlcs.grading.reading import read
from rlcs.grading.values import Expression, Letters
from rlcs.records import option_letter

_LABELLED = re.compile(r"[(\[]?[A-Za-z](?:[)\]]?[.:]?|[)\].:]+ .*)")
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
    options = [without_label(choice, index) for index, choice in enumerate(choices)]
    if gold in choices or chosen(gold, options) is not None:
        return ""
    wanted = read(gold)
    equal = {same(read(option), wanted).correct for option in options}
    if True in equal:
        return ""
    if isinstance(wanted, Letters) or _LABELLED.fullmatch(gold):
        return f"is no such option: the {len(choices)} choices are A to {option_letter(len(choices) - 1)}"
    if None in equal:
        return ""
    doubt = "; an index from 0 or from 1? Write the letter instead"
    is_index = gold.isdecimal() and int(gold) <= len(choices)
    return f"equals none of the {len(choices)} choices{doubt if is_index else ''}"


def formulas_of(gold: str, choices: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What math-verify must be able to read in a gold answer: a formula beyond our own grammar.

    With choices nothing must be read: the letter of the option is an answer.
    """
    value = read(unwrap(gold).text or "")
    beyond = isinstance(value, Expression) and value.tree is None and not choices
    return [(value.source, value.source)] if beyond else []
