"""Which answers are imitated: reasons to reject one, and rules to choose among several. Pure functions."""

import re
import unicodedata
from collections.abc import Sequence

from rlcs.generation import Entry
from rlcs.grading import health
from rlcs.recipe.schema import Filters, Teacher

CUT = "cut at max_tokens"
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
    """Why a right answer should not be imitated, or ""."""
    if len(response) < filters.min_chars:
        return f"shorter than {filters.min_chars} characters"
    if filters.max_chars is not None and len(response) > filters.max_chars:
        return f"longer than {filters.max_chars} characters"
    if filters.leaks and (found := _LEAK.search(response)):
        return f"speaks of the {found[0].lower()!r}"
    if filters.repetition and health([response])["repeated_share"]:
        return "repeats itself"
    if filters.mixed_languages and (script := _foreign_script(question, response)):
        return f"mixes languages: {script.lower()}"
    return ""


def _scripts(text: str) -> dict[str, int]:
    """Letters by script, as Unicode names it; the scripts of one East Asian text count as one."""
    counts: dict[str, int] = {}
    for letter in filter(str.isalpha, _FORMULA.sub(" ", text)):
        script = "LATIN" if letter.isascii() else unicodedata.name(letter, "?").split()[0]
        script = "CJK" if script in _EAST_ASIAN else script
        counts[script] = counts.get(script, 0) + 1
    return counts


def _foreign_script(question: str, response: str) -> str:
    """A script of the response that is neither the question's nor of formulas, if it has some weight."""
    known = _EVERYWHERE | _scripts(question).keys()
    counts = _scripts(response)
    least = max(_FOREIGN_LETTERS, _FOREIGN_SHARE * sum(counts.values()))
    return next((script for script, n in counts.items() if script not in known and n >= least), "")


def choose(usable: Sequence[Entry], teacher: Teacher) -> list[Entry]:
    """At most `max_kept` of the usable answers to one problem, which come in the order of their indices."""
    if teacher.pick == "shortest":
        return sorted(usable, key=lambda one: len(one.response))[: teacher.max_kept]
    if teacher.pick == "diverse":
        return _least_alike(usable, teacher.max_kept)
    return list(usable[: teacher.max_kept])


def _least_alike(usable: Sequence[Entry], most: int) -> list[Entry]:
    """The first, then each time the one that is least like any chosen one; equal texts only once."""
    left = {one.response: one for one in reversed(usable)}
    rest = [one for one in usable if left[one.response] is one]
    chosen = rest[:1]
    rest = rest[1:]
    shingles = {one.response: _shingles(one.response) for one in left.values()}
    while rest and len(chosen) < most:
        likeness = [max(_overlap(shingles[o.response], shingles[c.response]) for c in chosen) for o in rest]
        chosen.append(rest.pop(likeness.index(min(likeness))))
    return chosen


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}


def _overlap(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    """Jaccard similarity."""
    return len(a & b) / len(a | b)
