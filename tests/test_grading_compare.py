"""The comparison of values: the rule that decides for each pair of kinds, and that no pair raises."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcs.grading.compare import Verdict, same, same_name, same_when_rounded
from rlcs.grading.reading import read

RULES = [
    # gold, answer, right, rule
    ("5", "5.0", True, "the same number"),
    ("5", "6", False, "another number"),
    ("5", "5 kg", True, "the same text; a unit may be left off"),
    ("5", "5%", True, "the same number"),
    ("0.5", "0.5%", False, "another number"),
    ("5", "x", False, "another value"),
    ("5", "101_2", True, "the same number"),
    ("5", "110_2", False, "another number"),
    ("5", "5, 6", False, "several answers where one is asked"),
    ("5", "five", False, "the answer is read as text, the gold answer as number"),
    ("5", r"\{5\}", True, "the same number"),
    ("5", "5 = x", True, "the same text; a name may be left off"),
    ("5", "3 : 2", False, "the answer is read as ratio, the gold answer as number"),
    ("5 kg", "5", True, "the same text; a unit may be left off"),
    ("5 kg", "5 kilograms", True, "the same text"),
    ("5 kg", "5 g", False, "another unit: g against kg"),
    ("5 m", "5m", True, "the same text"),
    ("5 m", "5 n", False, "another value"),
    ("2x", "x + x", True, "an equal formula"),
    ("2x", "2", False, "another value"),
    ("2x", "2x = 0", False, "an equation where a value is asked"),
    ("AB = 5", "BA = 5", True, "the same text"),
    ("AB = CD", "CD = AB", True, "the same equation"),
    ("2x", "10^{10^{10}}", False, "another value"),
    ("ab", "two words", False, "the answer is read as text, the gold answer as expression"),
    ("x = 5", "y = 5", False, "a value of y, not of x"),
    ("x = 5", "2x = 10", False, "an equation that is not solved"),
    ("y = x + 1", "x - y + 1 = 0", True, "the same equation"),
    ("y = x + 1", "x - y + 2 = 0", False, "another equation"),
    ("x + y = 1", "2x + 2y = 2", True, "the same equation"),
    ("x + y = 1", "1 + y = 2 - x", True, "the same equation"),
    ("x + y = 1", "y = 1 - x", True, "the same equation"),
    ("x + y = 1", "y + x = 1", True, "the same relation"),
    ("x + y = 1", "x + z = 1", False, "another equation"),
    ("a + b", "a + b = 1", False, "another value"),
    ("x^2 + 3y = 1", "5", False, "a value where an equation or a relation is asked"),
    ("x + y = 1", r"x + y \ne 1", False, "another relation"),
    (r"a \perp b", r"b \perp a", True, "the same relation"),
    ("x > 1", r"(1, \infty)", True, "the same set of numbers"),
    ("x > 1", "x > 2", False, "another set of numbers"),
    ("x > 1", "y > 1", False, "a condition on another variable"),
    ("x > 1", "1", False, "the answer is read as number, the gold answer as set"),
    ("1, 2", "2, 1", True, "the same values"),
    ("1, 2", "1, 3", False, "3 is none of the answers"),
    ("1, 2", "1", False, "one answer where several are asked"),
    ("1, 2", "1, 2, 3", False, "3 answers, not 2"),
    ("1, 2", "[1, 2]", False, "other brackets: [] against none"),
    ("(1, 2)", "(1, 2.0)", True, "the same list"),
    ("(1, 2)", "(2, 1)", False, "another list: another number"),
    (r"\pm x", "-x, x", True, "the same values"),
    ("a=1, b=2", "b=2, a=1", True, "the same list"),
    ("a=1, b=2", "2, 1", False, "another list: another number"),
    ("a=1, b=2", "a=1, c=2", False, "no value of b"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1, 2)", True, "the same vector"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "1, 2", False, "other brackets: none against those of a vector"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "(1, 2, 3, 4)", False, "a matrix against a list"),
    (
        r"\begin{pmatrix}1&2\end{pmatrix}",
        r"\begin{bmatrix}1\\2\end{bmatrix}",
        False,
        "a matrix of another shape",
    ),
    ("1 : 2", "1 : 2.0", True, "the same ratio"),
    ("1 : 2", "2 : 4", False, "another ratio: another number"),
    ("1 : 2", "1 : 2 : 3", False, "a ratio of more or fewer parts"),
    ("101_2", "0101_2", True, "the same digits in the same base"),
    ("101_2", "101", True, "the same digits; the base may be left off"),
    ("101_2", "101_3", False, "other digits or another base"),
    ("101_2", "5", False, "the answer is read as number, the gold answer as number in a base"),
    ("May 5", "5 May", True, "the same date or range"),
    ("May 5", "May 6", False, "another date or range"),
    ("A, C", "CA", True, "the same letters"),
    ("A, C", "A", False, "other letters"),
    ("B", "(B) because", True, "the same letter"),
    ("B", "C. 12", False, "another letter"),
    ("Red ball", "the red ball.", True, "the same words"),
    ("Red ball", "blue ball", False, "other words"),
    ("rt", "t * r", True, "an equal formula"),
]


@pytest.mark.parametrize(("gold", "answer", "right", "why"), RULES)
def test_the_rule_that_decides(gold: str, answer: str, right: bool, why: str) -> None:
    verdict = same(read(answer), read(gold))
    assert (verdict.correct, verdict.why) == (right, why)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x", "x"), ("C", "Circumference"), (r"\angle ABC", r"m\angle ABC"), ("x_1", "x_{1}"),
        ("Area", "area"),
        (r"\text{Area}", "area"),
    ],
)  # fmt: skip
def test_names_of_the_same_thing(one: str, other: str) -> None:
    assert same_name(one, other) and same_name(other, one)


def test_names_of_different_things() -> None:
    assert not any(
        same_name(a, b) for a, b in itertools.combinations(["x", "y", "x_1", "x_2", "AB", "f(x)"], 2)
    )


def test_rounding_counts_for_plain_numbers_alone() -> None:
    assert same_when_rounded(read("2.718 m"), read("e = 2.72"), 2)
    assert not same_when_rounded(read("2.718"), read("2.8"), 1)
    assert not same_when_rounded(read("e"), read("2.72"), 2)


ANSWERS = sorted({text for gold, answer, *_ in RULES for text in (gold, answer)})


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(ANSWERS), st.sampled_from(ANSWERS), st.integers(0, 40), st.integers(0, 40))
def test_no_pair_of_values_raises(one: str, other: str, start: int, end: int) -> None:
    cut = one[: min(start, end)] + one[max(start, end) :] + other[:start]
    for answer, gold in itertools.permutations((one, other, cut), 2):
        verdict = same(read(answer), read(gold))
        assert isinstance(verdict, Verdict) and (verdict.why or verdict.correct is None)


@pytest.mark.parametrize("text", ANSWERS)
def test_every_value_equals_itself_with_other_spaces(text: str) -> None:
    assert same(read(f"  {text} "), read(text)).correct is True
