"""docs/reference/grading.md is the policy: every row of its tables is graded as it says."""

import re
from fractions import Fraction
from pathlib import Path

import pytest

from plain_grading import grade
from rlcs.grading.reading import read
from rlcs.grading.values import Items, Named, Number, Value
from rlcs.records import Problem

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "grading.md"


def table(title: str, columns: int) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line[1:-1].split("|")] for line in section.splitlines() if line[:1] == "|"
    ]
    return [row for row in rows[2:] if len(row) == columns]


def cases(title: str) -> list[tuple[str, str, str, tuple[str, ...], str]]:
    rows = []
    for topic, *values, verdict in table(title, 5):
        gold, answer, choices = (re.sub(r"^`|`$", "", value) for value in values)
        options = tuple(option.strip() for option in choices.split(";")) if choices else ()
        rows.append((topic, gold, answer, options, verdict))
    return rows


def is_right(gold: str, answer: str, choices: tuple[str, ...] = ()) -> bool | None:
    problem = Problem(id="p", source="test", question="?", answer=gold, choices=choices)
    result = grade(problem, f"\\boxed{{{answer}}}", allow_fallbacks=False)
    assert result.why
    return result.correct


def code(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


def examples(cell: str) -> list[tuple[str, str]]:
    """The pairs of a cell `gold` ← `answer`, `answer`; `gold` ← `answer`."""
    pairs = []
    for each in cell.split("; ") if cell else []:
        gold, answers = each.split(" ← ")
        pairs += [(code(gold)[0], answer) for answer in code(answers)]
    return pairs


def kinds_in_the_code() -> set[str]:
    number = Number(source="1", value=Fraction(1))
    named = Named(source="x=1", name="x", value=number)
    several = [(brackets, number) for brackets in ("", "{}", "()")] + [("", named)]
    kinds = {Items(source="", brackets=brackets, items=(item,)).kind for brackets, item in several}
    classes: list[type[Value]] = [Value, *Value.__subclasses__()]
    return kinds | {each.KIND for each in classes}


KINDS = {kind: code(cell) for kind, cell, _ in table("Kinds of values", 3)}
PAIRS = [
    (
        gold,
        answers.split(", "),
        rule,
        *map(examples, [*re.split("<br>right: | · wrong: ", rule), "", ""][1:3]),
    )
    for gold, answers, rule in table("Which values are equal", 3)
]
POLICIES = cases("Policies")
DECIDED = cases("Cases decided by hand")


def test_every_kind_is_described_and_its_examples_are_of_it() -> None:
    assert set(KINDS) == kinds_in_the_code()
    assert [(each, kind) for kind, cell in KINDS.items() for each in cell if read(each).kind != kind] == []
    assert all(len(cell) >= 2 for cell in KINDS.values())


def test_every_pair_of_kinds_stands_in_the_table_once() -> None:
    found = [(gold, answer) for gold, answers, *_ in PAIRS for answer in answers]
    assert sorted(found) == sorted(
        (gold, answer) for gold in kinds_in_the_code() for answer in kinds_in_the_code()
    )


@pytest.mark.parametrize(("gold_kind", "kinds", "rule", "right", "wrong"), PAIRS)
def test_pair_of_kinds(
    gold_kind: str, kinds: list[str], rule: str, right: list[tuple[str, str]], wrong: list[tuple[str, str]]
) -> None:
    never = rule.startswith("never")
    for verdict, pairs in ((True, right), (False, wrong)):
        assert {read(gold).kind for gold, _ in pairs} == (set() if never else {gold_kind})
        assert {read(answer).kind for _, answer in pairs} == (set() if never else set(kinds))
        assert [pair for pair in pairs if is_right(*pair) is not verdict] == []
    values = [(gold, answer) for gold in KINDS[gold_kind] for kind in kinds for answer in KINDS[kind]]
    assert not never or [pair for pair in values if is_right(*pair) is not False] == []


def test_a_set_of_one_counts_as_its_member() -> None:
    single = [each for kind in ("number", "quantity", "expression", "matrix") for each in KINDS[kind]]
    assert [each for each in single if "," not in each and not is_right(each, f"\\{{{each}\\}}")] == []


def test_the_table_is_read() -> None:
    assert len(POLICIES) > 150 and len(DECIDED) == 9
    topics = {re.split("[: ]", topic)[0] for topic, *_ in POLICIES}
    wanted = (
        "percent units variables degrees numbers mixed braces bases sets tuples named environments intervals"
    )
    wanted += " relations equations plus-minus ratios names words formulas dates ranges wrapped choices"
    assert set(wanted.split()) <= topics
    assert {verdict for *_, verdict in POLICIES} == {"right", "wrong"}


@pytest.mark.parametrize(("topic", "gold", "answer", "choices", "verdict"), POLICIES + DECIDED)
def test_policy(topic: str, gold: str, answer: str, choices: tuple[str, ...], verdict: str) -> None:
    assert is_right(gold, answer, choices) is (verdict == "right"), topic
