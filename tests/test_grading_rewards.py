"""Grades of responses: hostile texts are wrong and quickly so, spraying does not pay, health shows gaming."""

import time

import pytest

from plain_grading import grade
from rlcs.grading import health
from rlcs.grading.rewards import Undecided, decimal_places, quick_grade
from rlcs.records import Problem

OPTIONS = ("10", "12", "14", "16")


def problem(answer: str, choices: tuple[str, ...] = ()) -> Problem:
    return Problem(id="p", source="test", question="?", answer=answer, choices=choices)


def test_spraying_boxes_does_not_pay() -> None:
    sprayed = " ".join(f"\\boxed{{{n}}}" for n in range(100))
    assert grade(problem("42"), sprayed, allow_fallbacks=False).correct is False
    assert grade(problem("99"), sprayed, allow_fallbacks=False).correct is True
    listed = "\\boxed{" + ", ".join(str(n) for n in range(100)) + "}"
    assert grade(problem("42"), listed, allow_fallbacks=True).correct is False
    letters = grade(problem("B", OPTIONS), r"\boxed{A, B, C, D}", allow_fallbacks=True)
    assert letters.correct is False


def test_without_a_gold_answer_a_response_is_unscored() -> None:
    result = grade(problem(" "), r"\boxed{ }", allow_fallbacks=False)
    assert not result.scored and "no gold answer" in result.why


def test_a_response_that_is_no_text_is_wrong() -> None:
    result = quick_grade(problem("5"), 5, allow_fallbacks=True)
    assert not isinstance(result, Undecided) and result.correct is False


HOSTILE = {
    "latex": "\\boxed{" + "\\frac{1}{2}+" * 8000 + "1}",
    "digits": "\\boxed{" + "9" * 100_000 + "}",
    "nested": "\\boxed{" + "(" * 4000 + "1" + ")" * 4000 + "}",
    "open boxes": "\\boxed{" * 20_000,
    "full boxes": "\\boxed{1}" * 20_000,
    "tags": "<answer>" * 20_000,
    "braces": "{" * 200_000,
    "sentences": "the answer is " * 20_000,
    "spaces": "the answer is" + " " * 200_000,
    "roots": "\\boxed{" + "\\sqrt" * 450 + "4}",
    "powers": "\\boxed{" + "2^" * 240 + "2}",
    "tuples": "\\boxed{" + "(" * 300 + "1" + ",1)" * 300 + "}",
    "long unit": "\\boxed{5 " + "a" * 9000 + "}",
    "ligatures": "\\boxed{" + "ﷺ" * 5000 + "}",
    "units": "\\boxed{" + "1 cm " * 390 + "}",
    "percents": "\\boxed{5" + "%" * 1900 + "}",
    "currencies": "\\boxed{" + "€" * 1900 + "5}",
    "bases": "\\boxed{" + "9" * 1900 + "_8}",
    "unions": "\\boxed{" + "[1,2]\\cup" * 200 + "[1,2]}",
    "signs": "\\boxed{" + "1\\pm" * 300 + "1}",
    "matrices": "\\boxed{" + "\\begin{pmatrix}" * 120 + "}",
    "long list": "\\boxed{" + ",".join(str(n) for n in range(500)) + "}",
    "sums": "\\boxed{" + "(x+1)" * 300 + "}",
    "towers": "\\boxed{" + "9^{" * 30 + "9" + "}" * 30 + "}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_wrong_and_quickly_so(name: str) -> None:
    started = time.perf_counter()
    for gold, choices in (("5", ()), ("B", OPTIONS), ("(1,2)", ()), (r"2\sqrt{13}", ()), ("x+1", ())):
        result = quick_grade(problem(gold, choices), HOSTILE[name], allow_fallbacks=True)
        assert isinstance(result, Undecided) or result.correct is False
    assert time.perf_counter() - started < 4.0  # about 0.3 s; a quadratic rule takes minutes


def test_decimal_places_of_a_row() -> None:
    assert [decimal_places(value) for value in (2, 2.0, 0, -1, "2", None, True, float("nan"), 100)] == [
        2, 2, 0, None, None, None, None, None, None,
    ]  # fmt: skip


def test_health_counts_what_a_gamed_reward_looks_like() -> None:
    honest = r"Row one has two red circles and row two has three, so \boxed{5}"
    looped = "and so on and so forth " * 20
    sprayed = r"\boxed{1} \boxed{2} \boxed{3"
    assert health([honest]) == {"boxes_per_answer": 1.0, "repeated_share": 0.0, "no_format_share": 0.0}
    assert health([honest, looped, sprayed, "a" * 500]) == {
        "boxes_per_answer": 1.0,
        "repeated_share": 0.5,
        "no_format_share": 0.75,
    }
    assert set(health([]).values()) == {0.0}
