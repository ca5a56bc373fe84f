"""docs/reference/grading.md is the policy: every row of its tables is graded as it says."""

import re
from pathlib import Path

import pytest

from plain_grading import grade
from rlcs.records import Problem

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "grading.md"


def cases(title: str) -> list[tuple[str, str, str, tuple[str, ...], str]]:
    section = PAGE.read_text(encoding="utf-8").partition(f"## {title}")[2].partition("\n## ")[0]
    rows = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 5 and cells[4] != "verdict":
            gold, answer, choices = (re.sub(r"^`|`$", "", cell) for cell in cells[1:4])
            options = tuple(option.strip() for option in choices.split(";")) if choices else ()
            rows.append((cells[0], gold, answer, options, cells[4]))
    return rows


POLICIES = cases("Policies")
DECIDED = cases("Cases decided by hand")


def test_the_table_is_read() -> None:
    assert len(POLICIES) > 70 and len(DECIDED) == 9
    topics = {re.split("[: ]", topic)[0] for topic, *_ in POLICIES}
    assert {"percent", "units", "degrees", "sets", "intervals", "mixed", "words"} <= topics
    assert {verdict for *_, verdict in POLICIES} == {"right", "wrong"}


@pytest.mark.parametrize(("topic", "gold", "answer", "choices", "verdict"), POLICIES + DECIDED)
def test_policy(topic: str, gold: str, answer: str, choices: tuple[str, ...], verdict: str) -> None:
    problem = Problem(id="p", source="test", question="?", answer=gold, choices=choices)
    result = grade(problem, f"\\boxed{{{answer}}}", allow_fallbacks=False)
    assert result.correct is (verdict == "right"), f"{topic}: {result.why}"
    assert result.why
