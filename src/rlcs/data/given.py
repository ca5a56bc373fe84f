"""Grades demonstrations that the data already has, before they are imitated.

A response is compared with its gold answer by the rule of `grading`, whatever else the recipe's reward has.
Its final answer may stand in a box, in `<answer>` tags, after "the answer is" or `####`, or be the whole
response. What cannot be compared is kept: where the gold answer was taken out of the response itself, where
`data.answers=as_given` leaves gold answers to others, and where the grader reached no verdict in time.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlcs.data import puzzles
from rlcs.data.check import grouped, places
from rlcs.data.rows import BadRow, Row
from rlcs.errors import DataError
from rlcs.grading import GradePool
from rlcs.grading.golds import unwrap
from rlcs.progress import Screen
from rlcs.recipe.schema import Teacher
from rlcs.records import Demonstration, Grade, from_row_or_none, to_row
from rlcs.signals import StopFlag
from rlcs.storage import append_jsonl, read_jsonl

GIVEN = "given"
"""The teacher's name of a response that the data already had."""
UNCHECKED = "not checked: there is no gold answer beside the response to compare"
_CHUNK = 1000
_REPORT_EVERY_S = 10.0
_SHOWN = 60


def grade_given(
    rows: Sequence[Row],
    *,
    path: Path | None = None,
    view: Screen | None = None,
    stop: StopFlag | None = None,
) -> dict[str, Demonstration]:
    """Grade the rows with a response; return them by problem id.

    Grades are kept in the file `path`, so that a start that was stopped goes on. Raises Stopped.
    """
    given = [row for row in rows if row.response is not None]
    grades = {_key(row): Grade(reward=None, correct=None, why=UNCHECKED) for row in given if not row.gradable}
    grades |= _known(path)
    left = [row for row in given if _key(row) not in grades]
    shown = time.monotonic()
    with GradePool(workers=0, allow_fallbacks=True) as pool:
        for start in range(0, len(left), _CHUNK):
            if stop is not None:
                stop.check(str(path.parent if path else ""))
            chunk = left[start : start + _CHUNK]
            graded = dict(zip(map(_key, chunk), _grade(chunk, pool), strict=True))
            if path is not None:
                append_jsonl(path, [{"key": key, "grade": to_row(grade)} for key, grade in graded.items()])
            grades |= graded
            if view is not None and time.monotonic() - shown > _REPORT_EVERY_S:
                shown = time.monotonic()
                view.say(f"graded {start + len(chunk):,} of {len(left):,} given demonstrations")
    return {
        row.problem.id: Demonstration(
            problem=row.problem, response=row.response or "", teacher=GIVEN, grade=grades[_key(row)]
        )
        for row in given
    }


def _grade(rows: Sequence[Row], pool: GradePool) -> list[Grade]:
    grades = pool.grade([(row.problem, row.response or "") for row in rows])
    unmarked = [
        (index, rf"\boxed{{{whole}}}")
        for index, (row, grade) in enumerate(zip(rows, grades, strict=True))
        if grade.correct is False and grade.extracted is None and (whole := unwrap(row.response or "").text)
    ]
    again = pool.grade([(rows[index].problem, text) for index, text in unmarked])
    right = {index: grade for (index, _), grade in zip(unmarked, again, strict=True) if grade.correct}
    return [right.get(index, grade) for index, grade in enumerate(grades)]


def _key(row: Row) -> str:
    """A hash of all that the grade depends on."""
    facts = f"{row.problem.id}\n{row.problem.digest}\n{row.gradable}\n{row.response}"
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def _known(path: Path | None) -> dict[str, Grade]:
    """The grades of an earlier start; those without a verdict are graded again."""
    if path is None or not path.exists():
        return {}
    read = ((row.get("key"), from_row_or_none(Grade, row.get("grade") or {})) for row in read_jsonl(path))
    return {str(key): grade for key, grade in read if grade is not None and grade.scored}


def why_left_out(demonstration: Demonstration, teacher: Teacher) -> str:
    """The reason why a given demonstration is not imitated, or "": its final answer is wrong."""
    grade = demonstration.grade
    if teacher.keep == "all" or grade is None or grade.correct is not False:
        return ""
    if grade.extracted is None:
        return f"the response has no final answer: {grade.why}"
    gold = demonstration.problem.answer
    return f"the final answer {grade.extracted[:_SHOWN]!r} is not the gold answer {gold[:_SHOWN]!r}"


def counts_of(given: Mapping[str, Demonstration]) -> dict[str, int]:
    """How many given demonstrations there are, are wrong, were not scored and could not be checked."""
    grades = [each.grade for each in given.values() if each.grade is not None]
    counts = Counter(grade.correct if grade.why != UNCHECKED else "unchecked" for grade in grades)
    return {
        "given": len(given),
        "given_wrong": counts[False],
        "given_unscored": counts[None],
        "given_unchecked": counts["unchecked"],
    }


def sentences(rows: Sequence[Row], given: Mapping[str, Demonstration], teacher: Teacher) -> list[str]:
    """What became of the given demonstrations, for a screen; nothing if all are right."""
    counts = counts_of(given)
    wrong = [r for r in rows if (d := given.get(r.problem.id)) and d.grade and d.grade.correct is False]
    lines = []
    if wrong:
        done = "trained on all the same (teacher.keep=all)" if teacher.keep == "all" else "left out"
        first = ", ".join(places([row.refused("") for row in wrong]))
        lines.append(
            f"{len(wrong):,} of {len(given):,} demonstrations {done}: "
            f"their final answer is not the gold answer (first: {first})"
        )
    if counts["given_unscored"]:
        lines.append(f"{counts['given_unscored']:,} demonstrations kept without a verdict of the grader")
    if counts["given_unchecked"]:
        lines.append(f"{counts['given_unchecked']:,} of {len(given):,} demonstrations {UNCHECKED}")
    return lines


def unanswerable(rows: Sequence[Row], teacher: Teacher) -> list[BadRow]:
    """The problems without a response that the built-in teacher does not know; other teachers take all."""
    if teacher.who != "builtin":
        return []
    return [
        row.refused("no response, and the built-in teacher does not know this problem")
        for row in rows
        if row.response is None and not puzzles.is_builtin(row.problem)
    ]


def require_answerable(rows: Sequence[Row], teacher: Teacher) -> None:
    """Raise DataError if there are rows without a response that the built-in teacher does not know."""
    if unknown := unanswerable(rows, teacher):
        raise DataError(
            f"{len(unknown):,} of {len(rows):,} rows are no demonstrations\n    "
            + "\n    ".join(grouped(unknown)),
            where=rows[0].problem.source,
            fix="give each a `response`, or name a teacher: teacher.base_url and teacher.model",
        )
