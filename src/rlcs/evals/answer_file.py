"""A file of answers, graded by a named rule: what `rlcs grade` does.

A row that cannot be graded (torn, wrong types, no gold answer, a gold answer that nothing can read)
is unscored: it is named with its line, counted, and never taken for a wrong answer.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlcs.errors import DataError
from rlcs.evals.intervals import wilson
from rlcs.grading.extraction import Extraction, extract
from rlcs.grading.official import mathvision, mathvista, wemath
from rlcs.grading.pool import GradePool
from rlcs.grading.rewards import Undecided, decimal_places, grade_extracted, quick_grade
from rlcs.records import Grade, Problem
from rlcs.storage import atomic_write, jsonl_lines, parse_object

DEADLINE_S = 2.0
"""Seconds for one formula; an answer that needs more is unscored."""

NO_GOLD = "no gold answer"


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerRow:
    """One line of an answer file; `fault` says why it cannot be graded, and then only `fields` counts."""

    line: int
    fields: Mapping[str, Any] = field(hash=False)
    response: str = ""
    answer: str = ""
    choices: tuple[str, ...] = ()
    extraction: str | None = None
    fault: str = ""

    @property
    def name(self) -> str:
        """`line 7 (id x)`, for people."""
        name = self.fields.get("id")
        return f"line {self.line}" + (f" (id {name})" if name is not None else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """What a rule says of one row: right, wrong, or unscored (None)."""

    prediction: str | None
    correct: bool | None
    why: str


def read_answers(path: Path) -> list[AnswerRow]:
    """Every line of a JSONL file. Raises DataError for no file, or when not one row can be graded."""
    rows = [_read_line(number, line) for number, line in jsonl_lines(path)]
    if all(row.fault and row.fault != NO_GOLD for row in rows):
        faults = "; ".join(f"line {row.line}: {row.fault}" for row in rows[:3])
        raise DataError(
            f"no row can be graded ({faults or 'the file is empty'})",
            where=str(path),
            fix='a row is {"id": "1", "response": "... \\\\boxed{5}", "answer": "5"}',
        )
    return rows


def _read_line(number: int, line: bytes) -> AnswerRow:
    try:
        fields = parse_object(line)
    except ValueError as error:
        return AnswerRow(line=number, fields={}, fault=str(error))
    try:
        extraction = fields.get("extraction")
        answer = _text(fields, "answer", numbers=True)
        row = AnswerRow(
            line=number,
            fields=fields,
            response=_text(fields, "response") if extraction is None or "response" in fields else "",
            answer=answer,
            choices=_choices(fields.get("choices")),
            extraction=None if extraction is None else _text(fields, "extraction", numbers=True),
            fault="" if answer.strip() else NO_GOLD,
        )
        places = fields.get("precision")
        if places is not None and decimal_places(places) is None:
            raise ValueError(
                f"'precision' must be a small whole number, not {json.dumps(fields['precision'])[:60]}"
            )
    except ValueError as error:
        return AnswerRow(line=number, fields=fields, fault=str(error))
    return row


def _text(fields: Mapping[str, Any], key: str, *, numbers: bool = False) -> str:
    if key not in fields:
        raise ValueError(f"no {key!r}: the row has {', '.join(fields) or 'nothing'}")
    value = fields[key]
    if value is None and key == "answer":
        return ""
    if not isinstance(value, str) and not (numbers and type(value) in (int, float)):
        raise ValueError(f"{key!r} must be a text, not {json.dumps(value)[:60]}")
    return str(value)


def _choices(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(choice) in (str, int, float) for choice in value):
        raise ValueError(f"'choices' must be a list of texts, not {json.dumps(value)[:60]}")
    return tuple(str(choice) for choice in value)


# --- the rules --------------------------------------------------------------------------------


def mark_by_mathvision(row: AnswerRow) -> Mark:
    """MATH-Vision's official rule; the gold answer of a row with choices is a letter."""
    if row.choices and not (len(row.answer) == 1 and 0 <= ord(row.answer) - ord("A") < len(row.choices)):
        raise ValueError(
            f"the gold answer {row.answer[:60]!r} is no letter of the {len(row.choices)} choices"
        )
    found = mathvision.extract(row.response) if row.extraction is None else row.extraction
    correct = mathvision.is_correct(found, row.answer, row.choices)
    return Mark(prediction=found, correct=correct, why=_official(correct, "MATH-Vision"))


def mark_by_mathvista(row: AnswerRow) -> Mark:
    """MathVista's official rule on the row's extraction; without one, on the shortcut's or on ours."""
    kind = _kind(row)
    found, source = row.extraction, "the stored extraction"
    if found is None:
        found, source = mathvista.shortcut(row.response, kind), "the official shortcut"
    if found is None:
        found, source = extract(row.response, allow_fallbacks=True).text or "", "our own extraction"
    prediction = mathvista.predict(found, kind)
    correct = prediction == row.answer
    return Mark(prediction=prediction, correct=correct, why=f"{_official(correct, 'MathVista')}, on {source}")


def _kind(row: AnswerRow) -> mathvista.Kind:
    question, answer = (row.fields.get(key) for key in ("question_type", "answer_type"))
    if question not in ("multi_choice", "free_form") or answer not in ("text", "integer", "float", "list"):
        raise ValueError(f"no MathVista question_type and answer_type: {question!r} and {answer!r}")
    if question == "multi_choice" and row.answer not in row.choices:
        raise ValueError(f"the gold answer {row.answer[:60]!r} is none of the {len(row.choices)} choices")
    return mathvista.Kind(
        question_type=question,
        answer_type=answer,
        choices=row.choices,
        precision=decimal_places(row.fields.get("precision")),
    )


def mark_by_wemath(row: AnswerRow) -> Mark:
    """We-Math's official rule; gold answers are letters from A to H."""
    if row.answer not in tuple("ABCDEFGH"):
        raise ValueError(f"the gold answer {row.answer[:60]!r} is no letter from A to H")
    found = wemath.extract(row.response) if row.extraction is None else row.extraction
    correct = found == row.answer
    return Mark(prediction=found, correct=correct, why=_official(correct, "We-Math"))


def _official(correct: bool, benchmark: str) -> str:
    return f"{'right' if correct else 'wrong'} by {benchmark}'s official rule"


OFFICIAL_RULES: Mapping[str, Callable[[AnswerRow], Mark]] = MappingProxyType(
    {"mathvision": mark_by_mathvision, "mathvista": mark_by_mathvista, "wemath": mark_by_wemath}
)
RULES = ("rlcs", *OFFICIAL_RULES)
"""The names of the rules: ours first."""


def mark_officially(row: AnswerRow, rule: str) -> Mark:
    """The mark of a benchmark's official rule; what it cannot judge is unscored and says why."""
    if row.fault:
        return _unscored(row.fault)
    try:
        return OFFICIAL_RULES[rule](row)
    except ValueError as error:
        return _unscored(str(error))


def _unscored(why: str) -> Mark:
    return Mark(prediction=None, correct=None, why=why)


def mark_by_rlcs(rows: Sequence[AnswerRow], pool: GradePool) -> list[Mark]:
    """Marks by our own rule, in order; `precision` in a row is its tolerance in decimal places."""
    good = [row for row in rows if not row.fault]
    unreadable = pool.unreadable([_problem(row) for row in good])
    grades = iter(pool.settle([_quick(row, allow_fallbacks=pool.allow_fallbacks) for row in good]))
    marks = []
    for row in rows:
        if row.fault:
            marks.append(_unscored(row.fault))
            continue
        grade = next(grades)
        mark = Mark(prediction=grade.extracted, correct=grade.correct, why=grade.why)
        fault = unreadable.get((row.answer, row.choices))
        if fault and not grade.correct:
            mark = Mark(prediction=grade.extracted, correct=None, why=fault)
        marks.append(mark)
    return marks


def _problem(row: AnswerRow) -> Problem:
    return Problem(
        id=f"line {row.line}",
        source="answers",
        question="?",
        answer=row.answer,
        choices=row.choices,
        metadata={"precision": row.fields.get("precision")},
    )


def _quick(row: AnswerRow, *, allow_fallbacks: bool) -> Grade | Undecided:
    if row.extraction is None:
        return quick_grade(_problem(row), row.response, allow_fallbacks=allow_fallbacks)
    return grade_extracted(_problem(row), Extraction(text=row.extraction, why="the stored extraction"))


# --- the file ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """What a graded file comes to."""

    rule: str
    right: int
    wrong: int
    unscored: tuple[str, ...]
    """`line 7 (id x): why` of every unscored row."""

    @property
    def accuracy(self) -> float | None:
        """The share of right answers among those that were scored; None when none was."""
        scored = self.right + self.wrong
        return self.right / scored if scored else None

    def to_json(self) -> dict[str, object]:
        """One object for scripts."""
        low, high = wilson(self.right, self.right + self.wrong)
        return {
            "rule": self.rule,
            "rows": self.right + self.wrong + len(self.unscored),
            "right": self.right,
            "wrong": self.wrong,
            "unscored": len(self.unscored),
            "accuracy": self.accuracy,
            "low": low,
            "high": high,
        }


def grade_file(path: Path, out: Path, *, rule: str, allow_fallbacks: bool = True) -> Tally:
    """Grade FILE by a rule and write its rows to `out` with `prediction`, `correct` and `why`.

    Raises DataError for a file that cannot be read, an unknown rule, or `out` being the file itself.
    """
    if rule not in RULES:
        raise DataError(f"unknown rule {rule!r}", where="--rule", fix=f"use {', '.join(RULES)}")
    if out.exists() and out.resolve() == path.resolve():
        raise DataError("this would overwrite the answers", where=str(out), fix="write to another file")
    rows = read_answers(path)
    if rule == "rlcs":
        with GradePool(
            workers=os.cpu_count() or 1, deadline_s=DEADLINE_S, allow_fallbacks=allow_fallbacks
        ) as p:
            marks = mark_by_rlcs(rows, p)
    else:
        marks = [mark_officially(row, rule) for row in rows]
    lines = [
        {**(row.fields or {"line": row.line}), **asdict(mark)} for row, mark in zip(rows, marks, strict=True)
    ]
    atomic_write(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return Tally(
        rule=rule,
        right=sum(mark.correct is True for mark in marks),
        wrong=sum(mark.correct is False for mark in marks),
        unscored=tuple(
            f"{row.name}: {mark.why}" for row, mark in zip(rows, marks, strict=True) if mark.correct is None
        ),
    )
