"""Sets of numbers: one form for intervals, inequalities, unions and complements."""

import pytest

from rlcs.grading import regions
from rlcs.grading.reading import read
from rlcs.grading.regions import as_pieces, complement, intersection, same_pieces, union
from rlcs.grading.values import Piece

SAME = [
    ("x > 2", r"(2, \infty)"), (r"x \ge 2", r"[2, +\infty)"), ("2 > x", r"(-\infty, 2)"),
    ("2 <= x", r"[2,\infty)"),
    (r"-1 \le x < 4", "[-1, 4)"), ("4 > x >= -1", "[-1,4)"), (r"\{x \mid x \ge 1\}", r"[1,\infty)"),
    (r"\{x : 0 < x < 1\}", "(0,1)"), (r"x \in (0, 1)", "(0,1)"),
    ("x<-1 or x>1", r"(-\infty,-1) \cup (1,\infty)"),
    ("x<-1或x>1", r"(1,\infty)\cup(-\infty,-1)"), ("x>0 and x<3", "(0, 3)"), ("x>0, x<=3", "(0,3]"),
    (r"\mathbb{R}", r"(-\infty,\infty)"), ("all real numbers", r"\mathbb{R}"),
    (r"x \neq 2", r"\mathbb{R}\setminus\{2\}"),
    (r"(-\infty,0)\cup(0,\infty)", r"\mathbb{R} \setminus \{0\}"), (r"\emptyset", r"\{\}"),
    ("[1,2] U [2,3]", "[1,3]"),
    (r"(0,2)\cup(1,3)", "(0,3)"), (r"(0,2)\cap(1,3)", "(1,2)"), (r"[0,5]\setminus(1,2)", r"[0,1]\cup[2,5]"),
    (r"(0,1)\cup\{1\}", "(0,1]"), (r"(0, \sqrt{2})", r"0 < x < \sqrt 2"), ("[a, b)", r"a \le x < b"),
    (r"0<\alpha<1", "(0,1)"), ("(0.5, 2)", r"(\frac12, 2)"), ("1<x<2", "1<y<2"),
]  # fmt: skip
OTHER = [
    ("x > 2", "x < 2"), ("x > 2", r"x \ge 2"), ("(1,2)", "[1,2)"), ("(1,2)", "(1,3)"),
    ("x<-1 or x>1", "-1<x<1"),
    (r"\mathbb{R}", r"\mathbb{R}\setminus\{0\}"), (r"(0,1)\cup(1,2)", "(0,2)"), (r"\emptyset", r"\{0\}"),
    (r"(-\infty, 3)", r"(-\infty, 3]"), (r"(0,\sqrt2)", r"(0,\sqrt3)"), ("[a,b]", "[b,a]"),
]  # fmt: skip


def same(one: str, other: str) -> bool | None:
    pieces = [as_pieces(read(text)) for text in (one, other)]
    assert pieces[0] is not None and pieces[1] is not None, (one, other)
    return same_pieces(pieces[0], pieces[1])


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_set_of_numbers(one: str, other: str) -> None:
    assert same(one, other) is True and same(other, one) is True


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_another_set_of_numbers(one: str, other: str) -> None:
    assert same(one, other) is False and same(other, one) is False


@pytest.mark.parametrize("text", ["5", "(1,2,3)", "[1,2,3]", "x = 2", "cat, dog", "(1, cat)", "1:2"])
def test_what_is_no_set_of_numbers(text: str) -> None:
    assert as_pieces(read(text)) is None


def pieces(text: str) -> list[Piece]:
    return list(as_pieces(read(text)) or ())


def test_the_complement_of_a_complement_is_the_set() -> None:
    for text in ("[0,1)", r"(-\infty,0]\cup(1,2)", r"\{3\}", r"\mathbb{R}", r"\emptyset", r"(5,\infty)"):
        once = complement(pieces(text))
        assert complement(once) == pieces(text)
        assert intersection(once, pieces(text)) == []
        assert union([*once, *pieces(text)]) == [regions.whole_line()]
