"""Grades a file of answers by a named rule, for `rlcs grade`.

A row that cannot be graded (invalid JSON, wrong types, a gold answer that is missing or unreadable) is
unscored: it is reported with its line number and counted apart from the wrong answers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlcs.cores import usable_cores
from rlcs.data.values import gold_text
from rlcs.errors import DataError
from rlcs.evals.intervals import wilson
from rlcs.grading.extraction import Extraction, extract
from rlcs.grading.official import mathvision, mathvista, wemath
from rlcs.grading.pool import GradePool
from rlcs.grading.rewards import Undecided, decimal_places, grade_extracted, quick_grade
from rlcs.records import Grade, Json, Problem, option_letter
from rlcs.storage import atomic_write, jsonl_lines, parse_object, read_json

DEADLINE_S = 2.0
"""Seconds for one formula; an answer that needs more is unscored."""

NO_GOLD = "no gold answer"
"""The fault of a row without a gold answer, which may yet be read."""

GOLD_KEYS = (
    *("answer", "choices", "options", "precision", "question_type", "answer_type"),
    *("question", "question_for_eval", "problem_version"),
)
"""What a file of gold answers adds to a row that lacks it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerRow:
    """One answer to grade; with a `fault`, the reason why it cannot be, response and answer are not set.

    `line` is the number of its line, or in a JSON list or object (`unit` is then `row`) its own number.
    """

    line: int
    unit: str = "line"
    fields: Mapping[str, Any] = field(hash=False)
    response: str = ""
    answer: str = ""
    choices: tuple[str, ...] = ()
    extraction: str | None = None
    fault: str = ""

    @property
    def name(self) -> str:
        """The row's name in messages, such as `line 7 (id x)`."""
        name = self.fields.get("id")
        return f"{self.unit} {self.line}" + (f" (id {name})" if name is not None else "")

    @property
    def problem(self) -> Problem:
        """The problem for the rlcs rule; `precision` is its tolerance in decimal places."""
        return Problem(
            id=f"line {self.line}",
            source="answers",
            question="?",
            answer=self.answer,
            choices=self.choices,
            metadata={"precision": self.fields.get("precision")},
        )


def read_answers(path: Path, golds: Path | None = None) -> list[AnswerRow]:
    """Read every row of a file: JSON Lines, a list, or an object of rows by id, as MathVista's script writes.

    What a row lacks of its question (`GOLD_KEYS`) is taken from the row of `golds` with its id. Raises
    DataError if there is no file or no row can be graded.
    """
    known = {} if golds is None else {_id_of(row.fields): row.fields for row in _read_rows(golds)}
    rows = [row if row.fault else _checked(_joined(row, known, golds)) for row in _read_rows(path)]
    if all(row.fault and row.fault != NO_GOLD for row in rows):
        faults = "; ".join(f"{row.unit} {row.line}: {row.fault}" for row in rows[:3])
        fix = 'write JSON Lines, a row is {"id": "1", "response": "... \\\\boxed{5}", "answer": "5"}'
        if any("answer" not in row.fields and "response" in row.fields for row in rows):
            fix += "; or name the benchmark's file with the gold answers: --golds FILE"
        raise DataError(f"no row can be graded ({faults or 'the file is empty'})", where=str(path), fix=fix)
    return rows


def _read_rows(path: Path) -> list[AnswerRow]:
    """The rows of a file, not yet looked at."""
    try:
        whole = read_json(path)
    except DataError:  # JSON Lines, or no file: that is said there
        whole = None
    if isinstance(whole, dict) and whole and all(isinstance(row, dict) for row in whole.values()):
        whole = [{"id": name, **row} for name, row in whole.items()]
    if isinstance(whole, list):
        return [_listed(number, row) for number, row in enumerate(whole, start=1)]
    return [_read_line(number, line) for number, line in jsonl_lines(path)]


def _listed(number: int, row: object) -> AnswerRow:
    if isinstance(row, dict):
        return AnswerRow(line=number, unit="row", fields=row)
    return AnswerRow(line=number, unit="row", fields={}, fault="a row must be a JSON object")


def _read_line(number: int, line: bytes) -> AnswerRow:
    try:
        return AnswerRow(line=number, fields=parse_object(line))
    except ValueError as error:
        return AnswerRow(line=number, fields={}, fault=str(error))


def _id_of(fields: Mapping[str, Any]) -> str:
    """The id of a row; MathVista calls it `pid`, MathVerse `sample_index`."""
    return str(next((fields[key] for key in ("id", "pid", "sample_index") if key in fields), ""))


def _joined(row: AnswerRow, golds: Mapping[str, Mapping[str, Any]], path: Path | None) -> AnswerRow:
    """The row with what it lacks of its question."""
    if path is None:
        return row
    gold = golds.get(_id_of(row.fields))
    if gold is None:
        return row if "answer" in row.fields else replace(row, fault=f"{path.name} has no row with this id")
    more = {key: gold[key] for key in GOLD_KEYS if key in gold and key not in row.fields}
    return replace(row, fields={**row.fields, **more})


def _checked(row: AnswerRow) -> AnswerRow:
    """The row with its answer, gold answer and choices, or its fault."""
    fields = row.fields
    if row.fault:
        return row
    try:
        extraction = fields.get("extraction")
        several = isinstance(fields.get("answer"), list)
        answer = gold_text(fields["answer"]) if several else _text(fields, "answer", numbers=True)
        places = fields.get("precision")
        if places is not None and decimal_places(places) is None:
            raise ValueError(
                f"'precision' must be a small whole number, not {json.dumps(fields['precision'])[:60]}"
            )
        return replace(
            row,
            response=_text(fields, "response") if extraction is None or "response" in fields else "",
            answer=answer,
            choices=_choices(fields.get("choices") or fields.get("options")),
            extraction=None if extraction is None else _text(fields, "extraction", numbers=True),
            fault="" if answer.strip() else NO_GOLD,
        )
    except ValueError as error:
        return replace(row, fault=str(error))


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


def grade_by_mathvision(row: AnswerRow) -> Grade:
    """Grade by MATH-Vision's official rule; the gold answer of a row with choices is a letter."""
    if row.choices and row.answer not in map(option_letter, range(len(row.choices))):
        raise ValueError(
            f"the gold answer {row.answer[:60]!r} is no letter of the {len(row.choices)} choices"
        )
    extracted = mathvision.extract(row.response) if row.extraction is None else row.extraction
    correct = mathvision.is_correct(extracted, row.answer, row.choices)
    return _official("MATH-Vision", extracted, correct=correct)


def grade_by_mathvista(row: AnswerRow) -> Grade:
    """Grade by MathVista's official rule.

    The extraction is the row's; without one that of the official shortcut, or else that of rlcs.
    """
    kind = _kind(row)
    extracted, source = row.extraction, "the stored extraction"
    if extracted is None:
        extracted, source = mathvista.shortcut(row.response, kind), "the official shortcut"
    if extracted is None:
        extracted, source = extract(row.response, allow_fallbacks=True).text or "", "our own extraction"
    prediction = mathvista.predict(extracted, kind)
    return _official("MathVista", prediction, correct=prediction == row.answer, note=f", on {source}")


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


def grade_by_wemath(row: AnswerRow) -> Grade:
    """Grade by We-Math's official rule; gold answers are letters from A to H."""
    if row.answer not in tuple("ABCDEFGH"):
        raise ValueError(f"the gold answer {row.answer[:60]!r} is no letter from A to H")
    extracted = wemath.extract(row.response) if row.extraction is None else row.extraction
    return _official("We-Math", extracted, correct=extracted == row.answer)


def _official(benchmark: str, extracted: str | None, *, correct: bool, note: str = "") -> Grade:
    why = f"{'right' if correct else 'wrong'} by {benchmark}'s official rule{note}"
    return Grade(reward=float(correct), correct=correct, extracted=extracted, why=why)


OFFICIAL_RULES: Mapping[str, Callable[[AnswerRow], Grade]] = MappingProxyType(
    {"mathvision": grade_by_mathvision, "mathvista": grade_by_mathvista, "wemath": grade_by_wemath}
)
MATHVERSE = "mathverse"
"""The rule that asks a judge."""
RULES = ("rlcs", *OFFICIAL_RULES, MATHVERSE)
"""The names of all rules."""


def grade_officially(row: AnswerRow, rule: str) -> Grade:
    """Grade by a benchmark's official rule; a row that the rule cannot judge is unscored, with the reason."""
    if isinstance(row.fields.get("answer"), list) and not row.fault:
        return _unscored("a list of gold answers: official rules compare with one text")
    try:
        return OFFICIAL_RULES[rule](row) if not row.fault else _unscored(row.fault)
    except ValueError as error:
        return _unscored(str(error))


def _unscored(why: str, extracted: str | None = None) -> Grade:
    return Grade(reward=None, correct=None, extracted=extracted, why=why)


def grade_by_rlcs(rows: Sequence[AnswerRow], pool: GradePool) -> list[Grade]:
    """Grade rows by the rlcs rule, in order."""
    gradable = [row for row in rows if not row.fault]
    faults = pool.gold_faults([row.problem for row in gradable])
    settled = iter(pool.settle([_quick(row, allow_fallbacks=pool.allow_fallbacks) for row in gradable]))
    grades = []
    for row in rows:
        grade = _unscored(row.fault) if row.fault else next(settled)
        fault = faults.get((row.answer, row.choices))
        if fault and not row.fault and not grade.correct:
            grade = _unscored(fault, grade.extracted)
        grades.append(grade)
    return grades


def _quick(row: AnswerRow, *, allow_fallbacks: bool) -> Grade | Undecided:
    if row.extraction is None:
        return quick_grade(row.problem, row.response, allow_fallbacks=allow_fallbacks)
    return grade_extracted(row.problem, Extraction(text=row.extraction, why="the stored extraction"))


# --- the file ---------------------------------------------------------------------------------


JudgeRows = Callable[[Sequence[AnswerRow]], list[Grade]]
"""Grades rows, in order, by asking a model."""
Graded = list[tuple[AnswerRow, Grade]]
"""Rows with their grades, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """The graded rows of a file, and how many are right, wrong and unscored."""

    rule: str
    graded: Graded = field(repr=False)

    def count(self, correct: bool | None) -> int:
        """The number of rows with this verdict; None counts the unscored ones."""
        return sum(grade.correct is correct for _, grade in self.graded)

    @property
    def unscored(self) -> list[str]:
        """`line 7 (id x): why` of every unscored row."""
        return [f"{row.name}: {grade.why}" for row, grade in self.graded if grade.correct is None]

    @property
    def by_version(self) -> dict[str, tuple[int, int]]:
        """Right and scored rows of each `problem_version`, where rows have one (MathVerse)."""
        versions: dict[str, list[bool]] = {}
        for row, grade in self.graded:
            if grade.correct is not None and "problem_version" in row.fields:
                versions.setdefault(str(row.fields["problem_version"]), []).append(grade.correct)
        return {name: (sum(each), len(each)) for name, each in sorted(versions.items())}

    @property
    def accuracy(self) -> float | None:
        """The share of right answers among the scored ones; None if none was scored."""
        scored = len(self.graded) - self.count(None)
        return self.count(True) / scored if scored else None

    def to_json(self) -> dict[str, object]:
        """The counts, the accuracy and its 95% Wilson interval, for `--json`."""
        right, wrong, unscored = (self.count(verdict) for verdict in (True, False, None))
        low, high = wilson(right, right + wrong)
        counts = {"right": right, "wrong": wrong, "unscored": unscored, "rows": len(self.graded)}
        scores = {"accuracy": self.accuracy, "low": low, "high": high, "by_version": self.by_version}
        return {"rule": self.rule, **counts, **scores}


def grade_rows(
    rows: Sequence[AnswerRow], *, rule: str, allow_fallbacks: bool, judge: JudgeRows | None = None
) -> Graded:
    """Grade rows by a rule. Raises DataError for an unknown rule, or for `mathverse` without a judge."""
    if rule not in RULES:
        raise DataError(f"unknown rule {rule!r}", where="--rule", fix=f"use {', '.join(RULES)}")
    if rule == MATHVERSE:
        if judge is None:
            fix = "give a file and --judge-model, and --judge-url where a server runs it"
            raise DataError("a language model scores MathVerse", where="--rule mathverse", fix=fix)
        return list(zip(rows, judge(rows), strict=True))
    if rule != "rlcs":
        return [(row, grade_officially(row, rule)) for row in rows]
    workers = min(usable_cores(), len(rows))
    with GradePool(workers=workers, deadline_s=DEADLINE_S, allow_fallbacks=allow_fallbacks) as pool:
        return list(zip(rows, grade_by_rlcs(rows, pool), strict=True))


def grade_file(
    path: Path,
    out: Path | None,
    *,
    rule: str,
    golds: Path | None = None,
    allow_fallbacks: bool = True,
    judge: JudgeRows | None = None,
) -> Tally:
    """Grade the rows of a file by a rule; write them to `out`, if it is given, with their verdicts.

    `golds` is a file with the questions that the rows answer, where they lack it.

    Raises DataError for a file that cannot be read, for an unknown rule, or if `out` is the file itself.
    """
    if out is not None and out.exists() and out.resolve() == path.resolve():
        raise DataError("this would overwrite the answers", where=str(out), fix="write to another file")
    graded = grade_rows(read_answers(path, golds), rule=rule, allow_fallbacks=allow_fallbacks, judge=judge)
    if out is not None:
        lines = ({**(row.fields or {"line": row.line}), **verdict_fields(grade)} for row, grade in graded)
        atomic_write(out, "".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in lines))
    return Tally(rule=rule, graded=graded)


def verdict_fields(grade: Grade) -> dict[str, Json]:
    """What a graded row says of its verdict."""
    verdict = {"prediction": grade.extracted, "correct": grade.correct, "why": grade.why}
    return {**verdict, "answer_value": grade.answer_value, "gold_value": grade.gold_value}
