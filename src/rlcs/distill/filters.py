"""Selects the answers to imitate: reasons to reject one, rules to choose among several. Pure functions."""

import re
import unicodedata
from collections.abc import Sequence

from rlcs.generation import Entry
from rlcs.grading import health
from rlcs.recipe.schema import Filters, Teacher

CUT = "cut off before its end"
_FOREIGN_SHARE, _FOREIGN_LETTERS = 0.01, 3
_LEAK = re.compile(
    r"\b(?:gold(?:[- ]standard)?|ground[- ]truth|reference|provided|expected) (?:answer|solution|label)\b"
    r"|\banswer key\b|\b(?:as|the) hint says\b",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"\\[A-Za-z]+")
_EAST_ASIAN = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO"})
_EVERYWHERE = frozenset(
    "LATIN GREEK MATHEMATICAL DOUBLE-STRUCK SCRIPT BLACK-LETTER FULLWIDTH MODIFIER SUPERSCRIPT SUBSCRIPT "
    "MICRO OHM KELVIN ANGSTROM PLANCK MASCULINE FEMININE".split()
)


def reason_to_reject(question: str, response: str, filters: Filters) -> str:
    """The reason why a right answer should not be imitated, or ""."""
    if len(response) < filters.min_chars:
        return f"shorter than {filters.min_chars} characters"
    if filters.max_chars is not None and len(response) > filters.max_chars:
        return f"longer than {filters.max_chars} characters"
    if filters.leaks and (leak := _LEAK.search(response)):
        return f"speaks of the {leak[0].lower()!r}"
    if filters.repetition and health([response])["repeated_share"]:
        return "repeats itself"
    if filters.mixed_languages and (script := _foreign_script(question, response)):
        return f"mixes languages: {script.lower()}"
    return ""


def _scripts(text: str) -> dict[str, int]:
    """Count letters by script, as Unicode names it; all East Asian scripts count as one."""
    counts: dict[str, int] = {}
    for letter in filter(str.isalpha, _FORMULA.sub(" ", text)):
        script = "LATIN" if letter.isascii() else unicodedata.name(letter, "?").split()[0]
        script = "CJK" if script in _EAST_ASIAN else script
        counts[script] = counts.get(script, 0) + 1
    return counts


def _foreign_script(question: str, response: str) -> str:
    """A script with many letters in the response that neither the question nor formulas use, or ""."""
    known = _EVERYWHERE | _scripts(question).keys()
    counts = _scripts(response)
    least = max(_FOREIGN_LETTERS, _FOREIGN_SHARE * sum(counts.values()))
    return next((script for script, n in counts.items() if script not in known and n >= least), "")


def choose(usable: Sequence[Entry], teacher: Teacher) -> list[Entry]:
    """Choose at most `max_kept` of the usable answers to one problem, given in the order of their indices."""
    if teacher.pick == "shortest":
        return sorted(usable, key=lambda answer: len(answer.response))[: teacher.max_kept]
    if teacher.pick == "diverse":
        return _least_alike(usable, teacher.max_kept)
    return list(usable[: teacher.max_kept])


def _least_alike(usable: Sequence[Entry], most: int) -> list[Entry]:
    """Choose the first answer, then repeatedly the one least similar to those chosen; equal texts once."""
    different = dict[str, Entry]()
    for answer in usable:
        different.setdefault(answer.response, answer)
    runs = {response: shingles(response) for response in different}
    rest = list(different)
    chosen = [rest.pop(0)] if rest else []
    while rest and len(chosen) < most:
        likeness = [max(overlap(runs[text], runs[other]) for other in chosen) for text in rest]
        chosen.append(rest.pop(likeness.index(min(likeness))))
    return [different[text] for text in chosen]


def shingles(text: str) -> set[tuple[str, ...]]:
    """The runs of three words in a text; of a shorter one all its words."""
    words = text.lower().split()
    return set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}


def overlap(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    """Jaccard similarity."""
    return len(a & b) / len(a | b)
