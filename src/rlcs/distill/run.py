"""From rows to demonstrations: given responses are used as they are, the others are asked for.

Writes `kept.jsonl`, `rejected.jsonl` (id, response, why) and `stats.json` into the stage's folder,
each in one piece and the statistics last, so that a run that was stopped is simply run again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rlcs import tasks
from rlcs.data import Row
from rlcs.errors import UserError
from rlcs.files import atomic_write, read_jsonl, write_json
from rlcs.grading import GradePool
from rlcs.recipe.schema import Teacher
from rlcs.records import Demonstration, Grade, Problem, rollout_seed

GIVEN = "given"
"""The teacher's name of a response that came with the data."""


def run(rows: Sequence[Row], teacher: Teacher, *, folder: Path, seed: int) -> list[Demonstration]:
    """Demonstrations in the order of `rows`, at most one for each.

    A row with a response is kept as it is, whatever its grade (which is recorded and counted). For
    a row without one the teacher is asked up to `teacher.tries` times until its answer is right;
    wrong and unscored answers are rejected. With `teacher.keep == "all"` the first answer is kept,
    right or wrong. Raises UserError for a problem that the teacher does not know, or if nothing is
    left to learn from.
    """
    kept: dict[str, Demonstration] = {}
    rejected: list[Demonstration] = []
    asked = 0
    with GradePool() as pool:
        given = [(r.problem, r.response) for r in rows if r.response is not None]
        for (problem, response), grade in zip(given, pool.grade(given), strict=True):
            kept[problem.id] = Demonstration(problem=problem, response=response, teacher=GIVEN, grade=grade)
        for attempt in range(teacher.tries):
            missing = [row.problem for row in rows if row.problem.id not in kept]
            asked += len(missing)
            for answer in _ask(missing, teacher, pool, attempt=attempt, seed=seed):
                if teacher.keep == "all" or (answer.grade and answer.grade.correct):
                    kept[answer.problem.id] = answer
                else:
                    rejected.append(answer)
    demonstrations = [kept[row.problem.id] for row in rows if row.problem.id in kept]
    _write(folder / "kept.jsonl", (_kept_row(d) for d in demonstrations))
    _write(folder / "rejected.jsonl", (_rejected_row(d) for d in rejected))
    write_json(folder / "stats.json", _stats(len(rows), asked, demonstrations, rejected))
    if not demonstrations:
        raise UserError(
            f"none of {len(rows)} problems has a demonstration",
            where=str(folder),
            fix="see rejected.jsonl there; raise teacher.tries, or give rows with a `response`",
        )
    return demonstrations


def load_kept(rows: Iterable[Row], folder: Path) -> list[Demonstration]:
    """The demonstrations that a finished `run` on the same rows wrote into `folder`."""
    problems = {row.problem.id: row.problem for row in rows}
    loaded = []
    for row in read_jsonl(folder / "kept.jsonl"):
        if row["id"] not in problems:
            raise UserError(
                f"problem {row['id']!r} is no longer in the data",
                where=str(folder / "kept.jsonl"),
                fix="restore data.cold_start as it was, or start in a new run folder",
            )
        loaded.append(
            Demonstration(
                problem=problems[row["id"]],
                response=row["response"],
                teacher=row["teacher"],
                attempt=row["attempt"],
                grade=Grade(**row["grade"]),
            )
        )
    return loaded


def _ask(
    problems: Sequence[Problem], teacher: Teacher, pool: GradePool, *, attempt: int, seed: int
) -> list[Demonstration]:
    """One graded answer of the built-in teacher to each problem; its seed depends on no other answer."""
    answers = [
        (p, tasks.teach(p, seed=rollout_seed(seed, attempt, p.id, 0), wrong_share=teacher.wrong_share))
        for p in problems
    ]
    return [
        Demonstration(problem=problem, response=text, teacher=teacher.kind, attempt=attempt, grade=grade)
        for (problem, text), grade in zip(answers, pool.grade(answers), strict=True)
    ]


def _write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _kept_row(made: Demonstration) -> dict[str, object]:
    grade = made.grade or Grade(reward=None, correct=None)
    verdict = {name: getattr(grade, name) for name in ("reward", "correct", "extracted", "why")}
    return {
        "id": made.problem.id,
        "question": made.problem.question,
        "answer": made.problem.answer,
        "response": made.response,
        "teacher": made.teacher,
        "attempt": made.attempt,
        "grade": verdict,
    }


def _rejected_row(made: Demonstration) -> dict[str, object]:
    why = made.grade.why if made.grade else ""
    return {"id": made.problem.id, "response": made.response, "why": why, "attempt": made.attempt}


def _stats(
    problems: int, asked: int, kept: Sequence[Demonstration], rejected: Sequence[Demonstration]
) -> dict[str, object]:
    """Counts; `asked` answers were written by the teacher, `given` came with the data."""
    grades = [d.grade for d in (*kept, *rejected) if d.grade]
    return {
        "problems": problems,
        "given": sum(d.teacher == GIVEN for d in kept),
        "given_wrong": sum(
            d.teacher == GIVEN and d.grade is not None and d.grade.correct is False for d in kept
        ),
        "asked": asked,
        "kept": len(kept),
        "kept_wrong": sum(d.grade is not None and d.grade.correct is False for d in kept),
        "rejected": len(rejected),
        "unscored": sum(not grade.scored for grade in grades),
        "without_demonstration": problems - len(kept),
    }
