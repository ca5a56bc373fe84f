r"""Grades a response without math-verify, and measures signs that the reward is being gamed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlcs.grading.answers import compare
from rlcs.grading.compare import Verdict
from rlcs.grading.extraction import BOXED, Extraction, extract
from rlcs.records import Grade, Problem

_PIECE = re.compile(r"\w{1,8}|[^\w\s]")
_BOX = re.compile(r"\\boxed\s*\{")
_NGRAM = 8
_MIN_NGRAMS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Undecided:
    """A response whose verdict needs math-verify on `formulas` = (prediction, gold)."""

    extracted: str
    formulas: tuple[str, str]
    by: str = ""
    """How the answer was extracted, if not from a box."""
    answer_value: str = ""
    gold_value: str = ""

    def grade(self, compared: Grade) -> Grade:
        """Make the grade of the response from math-verify's grade of the formulas."""
        return replace(
            compared,
            extracted=self.extracted,
            why=self.by + compared.why,
            answer_value=self.answer_value,
            gold_value=self.gold_value,
        )


def quick_grade(problem: Problem, response: object, *, allow_fallbacks: bool) -> Grade | Undecided:
    """Grade all that needs no math-verify; fast, and without exceptions for any response."""
    if not isinstance(response, str):
        return Verdict(correct=False, why="the response is not a text").grade()
    extraction = extract(response, allow_fallbacks=allow_fallbacks)
    if extraction.text is None and problem.answer.strip():
        return Verdict(correct=False, why=extraction.why).grade()
    return grade_extracted(problem, extraction)


def grade_extracted(problem: Problem, extraction: Extraction) -> Grade | Undecided:
    """Grade an extracted answer.

    `problem.metadata["precision"]`, if it is a number of decimal places, is the tolerance.
    """
    if not problem.answer.strip():
        return Verdict(correct=None, why="the problem has no gold answer").grade(extraction.text)
    places = decimal_places(problem.metadata.get("precision"))
    text, by = extraction.text or "", "" if extraction.why == BOXED else f"{extraction.why}: "
    verdict = compare(text, problem.answer, problem.choices, places=places)
    if verdict.correct is None:
        return Undecided(
            extracted=text,
            formulas=verdict.formulas,
            by=by,
            answer_value=verdict.answer_value,
            gold_value=verdict.gold_value,
        )
    return verdict.grade(text, by=by)


def decimal_places(value: object) -> int | None:
    """Read a number of decimal places, such as 2 or 2.0; None for anything else (-1, "two", NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(100):
        return None
    return int(value)


def health(texts: Sequence[str]) -> dict[str, float]:
    r"""Measure signs of a gamed reward or a collapsing policy; all 0.0 without texts.

    `boxes_per_answer`: mean number of `\boxed{` in a text, closed or not.
    `repeated_share`: share of texts in which more than half of all runs of 8 pieces (words, or
    parts of long ones) occurred before. `no_format_share`: share of texts without an answer that a
    strict reward would read.
    """
    total = max(1, len(texts))
    return {
        "boxes_per_answer": sum(len(_BOX.findall(text)) for text in texts) / total,
        "repeated_share": sum(_is_repetitive(text) for text in texts) / total,
        "no_format_share": sum(extract(text).text is None for text in texts) / total,
    }


def _is_repetitive(text: str) -> bool:
    pieces = _PIECE.findall(text)
    ngrams = list(zip(*(pieces[shift:] for shift in range(_NGRAM)), strict=False))
    return len(ngrams) >= _MIN_NGRAMS and len(set(ngrams)) < len(ngrams) / 2
