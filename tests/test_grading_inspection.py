"""Gold answers that no answer can match: named before anything is trained on them."""

import pytest

from rlcs.grading import GradePool, reading
from rlcs.grading.inspection import equal_options, gold_fault
from rlcs.records import Problem

THREE = ("10", "12 cm", "14")


@pytest.mark.parametrize(
    ("gold", "choices", "fault"),
    [
        ("D", THREE, "names no option: the 3 choices are A to C"),
        ("(e)", THREE, "names no option"),
        ("A, D", THREE, "names no option"),
        ("E. 12", THREE, "names no option"),
        ("B. 14", THREE, "names no option"),
        ("0", THREE, "equals none of the 3 choices; an index from 0 or from 1"),
        ("2", THREE, "an index from 0 or from 1"),
        ("13", THREE, "equals none of the 3 choices"),
        ("yes", THREE, "equals none of the 3 choices"),
        (r"\frac{1}{", (), "its braces do not match"),
        (r"1}{2", (), "its braces do not match"),
        (r"\boxed{5", (), "the last box is not closed"),
        ("word " * 40, (), "no answer is marked"),
        (" ", (), "the answer is empty"),
        ("5", ("5cm", "5m", "7cm"), "fits several options: A, B. Write the letter instead"),
        (r"x = 2 \text{ or }", ("1", "x=2"), "equals none of the 2 choices"),
        *(
            (torn, (), "is not complete")
            for torn in (
                "x = 2 or",
                r"x = 2 \text{ or }",
                "5 and",
                "$x=$",
                "3 +",
                "3+",
                "3 *",
                "x >",
                "2 /",
                r"2 \cdot",
            )
        ),
        *(
            (gold, (), "an answer was left out")
            for gold in (
                "略",
                "证明略。",
                "（略）",
                "见解析",
                "Omitted.",
                r"\text{omitted}",
                "see solution",
                "See the proof.",
            )
        ),
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
        ("D", ("A", "D")), ("5", ("5", "5 cm")), ("x or", ("x or", "y")), ("A", ("10", "10", "14")),
        *((whole, ()) for whole in (
            "A+", "O-", "Na^+", "Cl^-", "C++", "0^+", "**5**", "<b>5</b>", "for", "x or y", "战略", "theta")),
        ("x=2", ("2", "3")), ("anything", ()), ("\\frac{1}{2}", ()), ("D", ()),
    ],
)  # fmt: skip
def test_a_gold_answer_that_something_matches_is_not(gold, choices):
    assert gold_fault(gold, choices) == ""


def test_options_that_are_written_alike_are_named():
    assert equal_options(("10", "10", "14")) == "A and B"
    assert equal_options(("A. $x$", "5", "C. x")) == "A and C"
    assert equal_options(("0.5", "1/2", "", "")) == equal_options(()) == ""


def test_the_pool_asks_whether_a_gold_answer_equals_itself():
    golds = [
        "5",
        r"\foo{\bar}^^",
        r"\int_0^1 x\,dx",
        "a right triangle",
        "<answer>5 cm</answer>",
        r"\{1,2\}",
        "1,000",
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


def test_plain_numbers_are_not_parsed_to_be_found_sound(monkeypatch):
    """A million of them are checked in seconds; every other gold answer is parsed."""
    parsed = []
    tokenise = reading.tokenise
    monkeypatch.setattr(reading, "tokenise", lambda text: parsed.append(text) or tokenise(text))
    golds = [*(f"{number}.25" for number in range(10_000, 10_300)), "77777.25 cm"]
    with GradePool(workers=1) as pool:
        problems = [Problem(id=gold, source="s", question="?", answer=gold) for gold in golds]
        assert pool.gold_faults(problems) == {}
    assert parsed and all("cm" in text for text in parsed)
