"""Formulas: readings of school books in LaTeX and plain notation, and bounds on what is read."""

from fractions import Fraction

import pytest

from rlcs.grading.algebra import equal, exact, too_large
from rlcs.grading.formulas import NotAFormulaError, base_of, number_in_base, read_formula
from rlcs.grading.tokens import tokenise
from rlcs.grading.tree import Node


def formula(text: str) -> Node:
    return read_formula(tokenise(text))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"2\frac{1}{2}", "5/2"), ("2 1/2", "5/2"), ("-2 1/2", "-5/2"), (r"2 \cdot \frac12", "1"),
        (r"3\frac{5}{2}", "15/2"), (r"\frac{360}7", "360/7"), (r"\frac12", "1/2"), (r"\frac 3 4", "3/4"),
        (r"\frac{7^3}{2^{2} 13^2}", "343/676"), ("1/2/4", "1/8"), ("6/2(1+2)", "9"), ("((((1))))", "1"),
        ("-2^2", "-4"), ("(-2)^2", "4"), ("2^-1", "1/2"), ("2^10", "1024"), ("2^3^2", "512"), ("-(-3)", "3"),
        (r"\sqrt{16}", "4"), (r"\sqrt 9", "3"), ("sqrt(16)/2", "2"), (r"\sqrt[3]{27}", "3"), ("8^{1/3}", "2"),
        ("5!", "120"), ("(3!)!", "720"), (r"\binom{6}{2}", "15"), ("|3-5|", "2"),
        (r"\lfloor 7/2 \rfloor", "3"),
        (r"1.2 \times 10^3", "1200"), ("1.2e3", "1200"), ("016", "16"), (".5", "1/2"), ("7.", "7"),
        (r"\log_2 8", "3"), (r"\log_{10}{100}", "2"), ("ln(e)", "1"), (r"\sin 30°", "1/2"), ("12_3", "5"),
        (r"\lceil 2.1 \rceil", "3"), ("50%", "1/2"), ("cos(pi)", "-1"),
    ],
)  # fmt: skip
def test_rational_values(text: str, value: str) -> None:
    assert exact(formula(text)) == Fraction(value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("mv^2", r"m \cdot v^2"), ("1/2x", r"\frac{1}{2}x"), (r"\sin 2x", r"\sin(2x)"),
        ("2sin x", r"2\sin{x}"),
        ("x^10", "x^{10}"), ("a(x+1)", "ax+a"), (r"\sqrt2x", r"\sqrt{2}x"), ("sinx", r"\sin x"),
        (r"\frac{x}{a}", "x/a"), (r"3e^{a}", r"e^{a} \cdot 3"), ("exp(2)", "e^2"), ("pi/2", r"\frac{\pi}{2}"),
        (r"\sin^{-1} x", r"\arcsin x"), (r"\sin^2 x", r"(\sin x)^2"), (r"\mathrm{e}^2", "e^2"),
        ("2xy", "2yx"),
        (r"\frac ab", "a/b"), (r"{x+1 \over 2}", "(x+1)/2"), ("x_1+1", "1+x_{1}"), ("2theta", r"2\theta"),
        (r"\ln 2x", r"\ln(2x)"),
        ("f(x)+1", "1+f(x)"), ("3abc", "abc*3"), ("2a^2b", "2b*a^2"), (r"\log_2 n", r"\frac{\ln n}{\ln 2}"),
    ],
)  # fmt: skip
def test_the_same_formula_in_two_notations(one: str, other: str) -> None:
    assert equal(formula(one), formula(other)) is True


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2^{n}", "2^m"), ("10-4n", "6"), ("ab", "abc"), ("mv^2", "(mv)^2"),
        (r"\frac{1}{2}x", r"\frac{1}{2x}"),
        (r"\sin 2x", r"x\sin 2"), ("a_1", "a_2"), ("f(x)", "f(y)"), ("x'", "x"), ("X", "x"),
        ("C_5^2", "C_5^3"),
        (r"\overline{AB}", r"\overline{CD}"), (r"\log_2 3", r"\log_3 2"),
    ],
)  # fmt: skip
def test_formulas_that_differ(one: str, other: str) -> None:
    assert equal(formula(one), formula(other)) is not True


@pytest.mark.parametrize(
    "text",
    [
        "", "1 2", "(1", "1)", "()", "{}", "2^", "x +", "= 3", r"\frac{1}", r"\frac12.5", r"\frac24.5",
        r"\int x dx",
        "5 apples", "7 tenths", "1,2", "3'", "12_{3.5}", "29_8 + 1", r"\unknown", "(" * 200 + "1" + ")" * 200,
        "2^" * 100 + "2", r"\sin" * 100 + "1", r"\sqrt" * 100 + "4", "9" * 5000, "1e99999",
    ],
)  # fmt: skip
def test_what_is_no_formula(text: str) -> None:
    with pytest.raises(NotAFormulaError):
        formula(text)


@pytest.mark.parametrize("text", ["9**9**9**9", "2^{99999}", "501!", "(10!)!", "10^{10^{10}}"])
def test_exact_arithmetic_refuses_what_is_too_large(text: str) -> None:
    assert too_large(formula(text)) and exact(formula(text)) is None


@pytest.mark.parametrize(
    "text", ["x", "1/0", r"\frac{1}{0}", r"\sqrt{2}", "2^{1/2}", "pi", "e", "(-1)!", r"\infty"]
)
def test_exact_arithmetic_knows_what_is_no_rational_number(text: str) -> None:
    assert exact(formula(text)) is None


def test_bases_by_number_and_by_word() -> None:
    assert [base_of(tokenise(t)) for t in ("8", "eight", "(8)", "base 16", r"\text{two}")] == [8, 8, 8, 16, 2]
    assert [base_of(tokenise(t)) for t in ("1", "37", "n", "ab", "2 3", "")] == [None] * 6
    assert number_in_base("7F", 16) == 127 and number_in_base("10.1", 2) == Fraction(5, 2)
    assert number_in_base("19", 8) is None and number_in_base("1" * 300, 2) is None
