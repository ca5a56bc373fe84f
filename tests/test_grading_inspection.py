"""Gold answers that no answer can match: named before anything is trained on them."""

import pytest

from rlcs.grading import GradePool
from rlcs.grading.inspection import gold_fault
from rlcs.records import Problem

THREE = ("10", "12 cm", "14")


@pytest.mark.parametrize(
    ("gold", "choices", "fault"),
    [
        ("D", THREE, "is no such option: the 3 choices are A to C"),
        ("(e)", THREE, "is no such option"),
        ("A, D", THREE, "is no such option"),
        ("E. 12", THREE, "is no such option"),
        ("B. 14", THREE, "is no such option"),
        ("0", THREE, "equals none of the 3 choices; an index from 0 or from 1"),
        ("2", THREE, "an index from 0 or from 1"),
        ("13", THREE, "equals none of the 3 choices"),
        ("yes", THREE, "equals none of the 3 choices"),
        (r"\frac{1}{", (), "its braces do not match"),
        (r"1}{2", (), "its braces do not match"),
        (r"\boxed{5", (), "the last box is not closed"),
        ("word " * 40, (), "no answer is marked"),
        (" ", (), "the answer is empty"),
    ],
)
def test_a_gold_answer_that_nothing_matches_is_named(gold, choices, fault):
    assert fault in gold_fault(gold, choices) and repr(gold[:60]) in gold_fault(gold, choices)


@pytest.mark.parametrize(
    ("gold", "choices"),
    [
        ("B", THREE), ("b", THREE), ("(B)", THREE), ("B. 12", THREE), ("(B) 12 cm", THREE), ("12", THREE),
        ("AC", THREE), ("A, C", THREE), ("A and C", THREE), ("<answer>C</answer>", THREE), ("14.0", THREE),
        ("1", ("1", "2")), ("\\frac12", ("0.5", "3")), ("AB", ("AB", "BC")), ("same", ("same", "same")),
        ("D", ("A", "D")), ("x=2", ("2", "3")), ("anything", ()), ("\\frac{1}{2}", ()), ("D", ()),
    ],
)  # fmt: skip
def test_a_gold_answer_that_something_matches_is_not(gold, choices):
    assert gold_fault(gold, choices) == ""


def test_the_pool_asks_whether_a_gold_answer_equals_itself():
    golds = [
        "5",
        r"\foo{\bar}^^",
        r"\int_0^1 x\,dx",
        "a right triangle",
        "<answer>5 cm</answer>",
        r"\{1,2\}",
        r"\text{}",
    ]
    problems = [Problem(id=str(i), source="s", question="?", answer=gold) for i, gold in enumerate(golds)]
    options = (r"3*\degree", r"6*\degree")
    problems += [Problem(id="option", source="s", question="?", answer=options[1], choices=options)]
    with GradePool(workers=1) as pool:
        faults = pool.gold_faults(problems)
    assert list(faults) == [(r"\foo{\bar}^^", ()), (r"\text{}", ())]
    assert "is empty" in faults[r"\text{}", ()]
    assert "cannot be read: it is not a formula" in faults[r"\foo{\bar}^^", ()]
