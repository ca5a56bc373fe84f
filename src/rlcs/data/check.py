"""Looks at the gold answers of a source, and groups rows that cannot be used by their reasons."""

import re
from collections.abc import Iterable, Sequence

from rlcs.data.rows import BadRow, Row
from rlcs.grading import GradePool
from rlcs.grading.reading import read
from rlcs.records import Problem

_EXAMPLES = 5
_VARYING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\S*[/\\]\S*|\d+")
"""What differs between two rows with the same fault: quoted texts, paths, numbers."""


def unmatchable(rows: Iterable[Row]) -> list[BadRow]:
    """The rows to be answered whose gold answer is not right as an answer to itself, by all of our rule."""
    problems = [row.problem for row in rows if row.response is None]
    with GradePool() as pool:
        faults = pool.gold_faults(problems)
    found = ((problem, faults.get((problem.answer, problem.choices))) for problem in problems)
    return [BadRow(where=p.source, id=p.id, reason=fault) for p, fault in found if fault]


def kinds_of_golds(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    """The problems with a gold answer by what it is read as, the most frequent kind first."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.answer.strip():
            kind = read(problem.answer).kind + (" (with choices)" if problem.choices else "")
            kinds.setdefault(kind, []).append(problem)
    return dict(sorted(kinds.items(), key=lambda each: -len(each[1])))


def kind_lines(kinds: dict[str, list[Problem]]) -> list[str]:
    """A table of the kinds of gold answers: number of rows, and one example of each."""
    if not kinds:
        return []
    width = max(len("gold answers"), *map(len, kinds))
    lines = [f"{'gold answers':<{width}} {'rows':>8}  example"]
    for kind, problems in kinds.items():
        first = problems[0]
        lines.append(f"{kind:<{width}} {len(problems):>8,}  {first.answer[:60]}  (id {first.id})")
    return lines


def grouped(bad: Sequence[BadRow]) -> list[str]:
    """The first rows of each fault, a line each, and how many more have it."""
    groups: dict[str, list[BadRow]] = {}
    for row in bad:
        groups.setdefault(_VARYING.sub("", row.reason), []).append(row)
    lines: list[str] = []
    for rows in groups.values():
        lines += map(str, rows[:_EXAMPLES])
        if len(rows) > _EXAMPLES:
            lines.append(f"    and {len(rows) - _EXAMPLES:,} more rows with this fault")
    return lines
