"""Answers: what is extracted, what is equal, and that no text takes long or earns by trickery."""

import time

import pytest

from plain_grading import grade
from rlcs.grading import health
from rlcs.grading.answers import compare
from rlcs.grading.extraction import extract
from rlcs.grading.latex import NoValueError, TooLargeError, exact
from rlcs.grading.normal import normalise
from rlcs.grading.rewards import Undecided, quick_grade
from rlcs.records import Grade, Problem

OPTIONS = ("10", "12", "14", "16")


def problem(answer: str, choices: tuple[str, ...] = ()) -> Problem:
    return Problem(id="p", source="test", question="?", answer=answer, choices=choices)


def verdict(given: str, gold: str, choices: tuple[str, ...] = ()) -> bool | None:
    return compare(given, gold, choices).correct


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"So \boxed{42}", "42"),
        (r"\boxed{41} no, \boxed{42}", "42"),
        (r"\boxed{\left\{\frac{a}{b}\right\}}", r"\left\{\frac{a}{b}\right\}"),
        (r"\boxed{\{1\}", None),  # an escaped brace closes nothing: the box is open
        (r"\boxed{5} then \boxed{6", None),
        (r"\boxed{ { 5 }", None),
        (r"{ stray \boxed{5} } }", "5"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"<think>\boxed{3}</think> It is \boxed{4}", "4"),
        (r"<think>\boxed{3}</think> It is 4", None),
        (r"<think>it is \boxed{3}", None),
        (r"reasoning \boxed{3}</think>\boxed{4}", "4"),
        ("the answer is 12", None),
        ("", None),
    ],
)
def test_strict_extraction(response: str, expected: str | None) -> None:
    found = extract(response)
    assert found.text == expected and found.why


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<answer>3</answer> and <answer>4</answer>", "4"),
        ("So the final answer is: 3.5. Done.", "3.5"),
        ("Hence\n**(B)**\n", "B"),
        ("A triangle has three sides", None),
        (r"The answer is 12. \boxed{12", None),
        (r"The answer is 11. \boxed{12}", "12"),
    ],
)
def test_fallbacks_only_without_a_box_and_only_when_allowed(response: str, expected: str | None) -> None:
    assert extract(response, allow_fallbacks=True).text == expected
    if "boxed" not in response:
        assert extract(response).text is None


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("−5", "-5"),
        ("2½", r"2\frac{1}{2}"),
        ("x²", "x^{2}"),
        ("2√3", r"2\sqrt{3}"),
        ("60^{\\circ}", "60°"),
        ("60º", "60°"),
        ("\uff15\u200b", "5"),
        (r"$\boxed{\dfrac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\textbf{\text{B}}", "B"),
        (r"\left( 1,\; 2 \right)", "( 1, 2 )"),
        ("3 × 4", r"3 \times 4"),
        ("\x0crac{1}{2}", r"\frac{1}{2}"),
        ("1{,}000", "1,000"),
    ],
)
def test_normalise(raw: str, plain: str) -> None:
    assert normalise(raw) == plain
    assert normalise(plain) == plain


RIGHT = [
    ("1,000", "1000"), ("5.0", "5"), ("0.5", r"\frac{1}{2}"), (r"2\frac{1}{2}", "2.5"), ("2 1/2", "2.5"),
    (r"1.2 \times 10^3", "1200"), ("016", "16"), (r"\frac{360}7", "360/7"), ("((((1))))", "1"),
    ("2^10", "1024"), (r"\frac{7^3}{2^{2} 13^2}", "343/676"),
    ("-2^2", "-4"), (r"\sqrt{16}", "4"), ("(3!)!", "720"),
    (r"5\text{ cm}", "5"), ("5 cm^2", "5 square centimeters"), ("60°", "60"), ("12 days", "12"),
    ("7 apples", "7"), ("69^\\circ", "69{degrees}"),
    (r"8\sqrt{3}", r"8\sqrt{3}{squareinches}"), ("50%", "0.5"), ("50", r"50\%"),
    ("35", "35掳"), ("x=5", "5"), ("5", "x = 5"), ("(1,2)", "( 1, 2 )"), (r"\{1,2\}", r"\{2,1\}"),
    ("2 or 3", "3, 2"), ("1:2", "1 : 2"), (r"\text{Rectangle}", "rectangle"), ("(B).", "B"),
    ("The answer is 5", "5"), ("中间", "中间"), ("S 23.5^\\circ W", "S 23.5 ^\\circ W"),
]  # fmt: skip
WRONG = [
    ("1 2", "12"), ("3.14", r"\pi"), ("0.333", "1/3"), ("1/2^{98}", "1/2^{99}"),
    ("5 m", "5 cm"), ("5 cm", "5 cm^2"),
    ("5 million", "5"), ("0.5%", "50%"), ("50", "0.5"), ("y=5", "x=5"), ("[1,2)", "(1,2)"),
    ("(2,1)", "(1,2)"), ("1,2,3", "1,2"), ("5 or 6", "5"),
    ("2:4", "1:2"), ("12:00", "1:00"), ("n=2,3,4", "n=1,2,3"),
    ("teal", "late"), ("no", "on"), ("birth", "birthday"), (r"\pm 2021", "2021"),
    ("5 because of symmetry", "5"), ("z", "X+Y=Z"), ("A, B", "B"), (" ", "5"),
    ("9**9**9**9", "5"), ("10**10**10", "5"), ("(10!)!", "5"),
    ("(1+x)**5000-(1+x)**4999", "2x"), ("nan", "5"), ("1/0", "0"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "gold"), RIGHT)
def test_equal_without_math_verify(given: str, gold: str) -> None:
    assert verdict(given, gold) is True


@pytest.mark.parametrize(("given", "gold"), WRONG)
def test_not_equal(given: str, gold: str) -> None:
    result = quick_grade(problem(gold), f"\\boxed{{{given}}}", allow_fallbacks=False)
    assert not (isinstance(result, Grade) and result.correct), result
    full = grade(problem(gold), f"\\boxed{{{given}}}", allow_fallbacks=False)
    assert full.correct is False and full.reward == 0.0 and full.why


@pytest.mark.parametrize(
    ("given", "gold", "right"),
    [
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        (r"24+4\pi", r"4\pi+24", True),
        ("x+1", "y+1", False),
    ],
)
def test_formulas_go_to_math_verify(given: str, gold: str, right: bool) -> None:
    assert verdict(given, gold) is None
    assert grade(problem(gold), f"\\boxed{{{given}}}", allow_fallbacks=False).correct is right


@pytest.mark.parametrize(
    ("given", "gold", "right"),
    [
        ("B", "B", True), ("b", "B", True), ("(B)", "B", True), ("B. 12", "B", True),
        (r"\text{(B) }12", "B", True), ("12", "B", True), ("B", "12", True), ("12 cm", "B", True),
        ("C", "B", False), ("10", "B", False),
        ("B. 14", "B", False), ("A, B", "B", False), ("C", "12", False), ("11", "B", False),
        ("E", "B", False),
    ],
)  # fmt: skip
def test_multiple_choice_by_letter_or_value(given: str, gold: str, right: bool) -> None:
    assert verdict(given, gold, OPTIONS) is right


def test_a_letter_is_read_as_a_letter_before_it_is_read_as_a_value() -> None:
    assert verdict("C", "B", ("B", "C", "D", "E")) is False
    assert verdict("120", "C", ("$60^{\\circ}$", "$90^{\\circ}$", "$120^{\\circ}$")) is True
    assert verdict("(B) 8/11", "B", ("A. 3/11", "B. 8/11")) is True


def test_spraying_boxes_does_not_pay() -> None:
    sprayed = " ".join(f"\\boxed{{{n}}}" for n in range(100))
    assert grade(problem("42"), sprayed, allow_fallbacks=False).correct is False
    assert grade(problem("99"), sprayed, allow_fallbacks=False).correct is True
    listed = "\\boxed{" + ", ".join(str(n) for n in range(100)) + "}"
    assert grade(problem("42"), listed, allow_fallbacks=True).correct is False


def test_without_a_gold_answer_a_response_is_unscored() -> None:
    result = grade(problem(" "), r"\boxed{ }", allow_fallbacks=False)
    assert not result.scored and "no gold answer" in result.why


@pytest.mark.parametrize("text", ["9**9**9**9", "2^{99999}", "(" * 200 + "1" + ")" * 200, "9" * 5000, "501!"])
def test_exact_arithmetic_refuses_what_is_too_large(text: str) -> None:
    with pytest.raises(TooLargeError):
        exact(text)


@pytest.mark.parametrize(
    "text", ["", "x", "1 2", "1/0", "\\frac{1}{0}", "\\sqrt{2}", "(1", "1)", "4^{1/2}", "()"]
)
def test_exact_arithmetic_knows_what_is_no_rational_number(text: str) -> None:
    with pytest.raises(NoValueError):
        exact(text)


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
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_wrong_and_quickly_so(name: str) -> None:
    started = time.perf_counter()
    for gold, choices in (("5", ()), ("B", OPTIONS), ("(1,2)", ()), (r"2\sqrt{13}", ())):
        result = quick_grade(problem(gold, choices), HOSTILE[name], allow_fallbacks=True)
        assert isinstance(result, Undecided) or result.correct is False
    assert time.perf_counter() - started < 4.0  # about 0.3 s; a quadratic rule takes minutes


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
