"""The final answer of a response: the last complete box, and what else counts where that is allowed."""

import pytest

from rlcs.grading.extraction import extract


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
        (r"\fbox{7}", "7"),
        (r"\framebox {7}", "7"),
        (r"Write it in \boxed at the end: \boxed{9}", "9"),
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
