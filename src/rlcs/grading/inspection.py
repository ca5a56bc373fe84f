"""Names gold answers that no answer can match, and says why."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rlcs.grading.answers import decide
from rlcs.grading.choices import chosen, without_label
from rlcs.grading.compare import Verdict, same, yes
from rlcs.grading.extraction import extract
from rlcs.grading.golds import unwrap
from rlcs.grading.reading import MAX_CHARACTERS, is_plain_number, read, spelled
from rlcs.grading.values import Expression, Letters
from rlcs.records import option_letter

_LABELLED = re.compile(r"[(\[]?[A-Za-z](?:[)\]]?[.:]?|[)\].:]+ .*)")
_LEFT_OUT = re.compile(
    r"[(（]?(?:(?:证明|答案|解答|过程|图)?略|(?:详?见|参见|参考)(?:解析|解答|答案|详解)"
    r"|(?:(?:the )?(?:answer|proof|solution) (?:is )?)?omitted"
    r"|(?:see|refer to) (?:the )?(?:solution|answer|proof|explanation)s?)[)）]?[.。]?",
    re.IGNORECASE,
)
"""What stands where an answer was left out."""
_TORN = re.compile(
    r".*(?:(?<![A-Za-z\\])(?:and|or)|[=</]|(?<![a-z/])>|\s\*|[0-9a-z)}]\s*[+-]"
    r"|\\(?:cdot|times|div|pm|mp|le|ge|ne|approx|cup|cap|in))",
    re.DOTALL,
)
"""An answer that ends where something must follow: `x = 2 or`, `3 +`."""
_BRACES = re.compile(r"[{}\\<]")
"""What an answer has that is not the same inside of a box."""
_SHOWN = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Doubt:
    """A gold answer that math-verify must judge, or that is not right as an answer to itself.

    `verdict` is the one on itself, `parts` are the formulas that math-verify must be able to read.
    """

    verdict: Verdict
    parts: tuple[tuple[str, str], ...]


@lru_cache(maxsize=4096)
def inspect_gold(gold: str, choices: tuple[str, ...] = ()) -> str | Doubt | None:
    """Why no answer can match a gold answer, or what is in doubt about it; None: an answer can match it.

    With choices it is compared with itself, written with one more space so that it must be read; without
    any, what is read at all is the same as itself.
    """
    if not choices and is_plain_number(gold):
        return None
    if fault := gold_fault(gold, choices):
        return fault
    text = unwrap(gold).text or ""
    is_read = not choices and len(text) <= MAX_CHARACTERS and read(text).source
    verdict = yes("the same text") if is_read else decide(f"~{text}", gold, choices)
    parts = tuple(formulas_of(gold, choices))
    return Doubt(verdict=verdict, parts=parts) if parts or not verdict.correct else None


@lru_cache(maxsize=4096)
def gold_fault(gold: str, choices: tuple[str, ...] = ()) -> str:
    """Say why no answer can match a gold answer, or "": what is seen without math-verify."""
    if not choices and is_plain_number(gold):
        return ""
    found = unwrap(gold)
    named = f"the gold answer {gold[:_SHOWN]!r}"
    if found.text is None:
        return f"{named} cannot be used: {found.why}"
    if _BRACES.search(found.text) and extract(f"\\boxed{{{found.text}}}").text != found.text:
        return f"{named} cannot be read: its braces do not match"
    fault = _option_fault(found.text, choices) if choices else ""
    if not fault and found.text not in choices:
        text = spelled(found.text)
        if _LEFT_OUT.fullmatch(text):
            fault = "says that an answer was left out"
        elif _TORN.fullmatch(text):
            fault = "is not complete: something must follow its last sign or word"
    return f"{named} {fault}" if fault else ""


def _option_fault(gold: str, choices: Sequence[str]) -> str:
    options = [without_label(choice, index) for index, choice in enumerate(choices)]
    if gold in choices or chosen(gold, options) is not None:
        return ""
    wanted = read(gold)
    equal = [same(read(option), wanted).correct for option in options]
    fitting = [index for index, fits in enumerate(equal) if fits]
    if any(same(read(options[i]), read(options[fitting[0]])).correct is False for i in fitting):
        letters = ", ".join(map(option_letter, fitting))
        return f"fits several options: {letters}. Write the letter instead"
    if fitting:
        return ""
    if isinstance(wanted, Letters) or _LABELLED.fullmatch(gold):
        return f"names no option: the {len(choices)} choices are A to {option_letter(len(choices) - 1)}"
    if None in equal:
        return ""
    doubt = "; an index from 0 or from 1? Write the letter instead"
    is_index = gold.isdecimal() and int(gold) <= len(choices)
    return f"equals none of the {len(choices)} choices{doubt if is_index else ''}"


def equal_options(choices: Sequence[str]) -> str:
    """The letters of the first options that are written alike, such as `A and B`, or ""."""
    first: dict[str, int] = {}
    for index, choice in enumerate(choices):
        text = spelled(without_label(choice, index))
        if text and first.setdefault(text, index) != index:
            return f"{option_letter(first[text])} and {option_letter(index)}"
    return ""


def formulas_of(gold: str, choices: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What math-verify must be able to read in a gold answer: a formula beyond our own grammar.

    With choices nothing must be read: the letter of the option is an answer.
    """
    value = read(unwrap(gold).text or "")
    beyond = isinstance(value, Expression) and value.tree is None and not choices
    return [(value.source, value.source)] if beyond else []
