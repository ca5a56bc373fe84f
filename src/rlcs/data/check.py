"""Looks at the gold answers of a source, and groups rows that cannot be used by their reasons."""

import re
from collections.abc import Iterable, Sequence

from rlcs.data.rows import BadRow, Row
from rlcs.grading import GradePool
from rlcs.grading.inspection import equal_options
from rlcs.grading.reading import read
from rlcs.records import Problem

_EXAMPLES = 5
"""Rows of each fault that are shown."""
_MIN_SHOWN = 12
"""Characters of an example that are shown, however narrow the terminal is."""
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


def option_notes(problems: Iterable[Problem]) -> tuple[str, ...]:
    """What is odd in choices and yet can be graded: two options that are written alike."""
    alike = [(problem, letters) for problem in problems if (letters := equal_options(problem.choices))]
    if not alike:
        return ()
    problem, letters = alike[0]
    return (f"rows with two equal options: {len(alike):,}, e.g. {letters} of row {problem.id}",)


def kind_lines(kinds: dict[str, list[Problem]], *, columns: int = 80) -> list[str]:
    """A table of the kinds of gold answers: number of rows, and one example of each, cut to `columns`."""
    if not kinds:
        return []
    width = max(len("gold answers"), *map(len, kinds))
    lines = [f"{'gold answers':<{width}} {'rows':>8}  example"]
    for kind, problems in kinds.items():
        start, name = f"{kind:<{width}} {len(problems):>8,}  ", f"  (id {_shortened(problems[0].id)})"
        example = _shortened(problems[0].answer, max(_MIN_SHOWN, columns - len(start) - len(name)))
        lines.append(start + example + name)
    return lines


def _shortened(text: str, most: int = 40) -> str:
    """One line of a text, its first characters if it is too long."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


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
