"""Makes demonstrations of rows: responses in the data are graded, the others are sampled from a teacher.

The stage's folder has `samples.jsonl` (all answers in the order of arrival) and, once every problem is
answered, `kept.jsonl`, `rejected.jsonl` (with reasons), `problems.jsonl` (with pass rates), `images/` and
`stats.json`. These follow the order of the rows and their samples. `given.jsonl` has the grades of responses
that the data already had.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlcs.data.difficulty import RATING
from rlcs.data.given import counts_of, grade_given, require_answerable, sentences, why_left_out
from rlcs.data.loading import Loaded, load, require_usable
from rlcs.data.problem_store import with_copies
from rlcs.data.rows import Row
from rlcs.distill.chains import Chain
from rlcs.distill.filters import choose
from rlcs.distill.schedule import Schedule, why_not
from rlcs.distill.teachers import open_teacher
from rlcs.errors import UserError
from rlcs.generation import Entry, SampleLog
from rlcs.grading import GradePool
from rlcs.progress import Screen
from rlcs.recipe.schema import Data, Images, Teacher
from rlcs.records import Demonstration, Grade, Problem, from_row, to_row
from rlcs.signals import StopFlag
from rlcs.storage import read_jsonl, write_json, write_jsonl

NOT_CHOSEN = "right, but others are kept"
_LOG = logging.getLogger("rlcs")
_SHOWN = 3
_BINS = 10


def run(
    rows: Sequence[Row],
    teacher: Teacher,
    *,
    folder: Path,
    seed: int,
    images: Images | None = None,
    view: Screen | None = None,
    stop: StopFlag | None = None,
) -> list[Demonstration]:
    """Make demonstrations in the order of `rows`, at most `teacher.max_kept` for each.

    A row with a response is kept unless its final answer is wrong and `teacher.keep` is `right`. For a row
    without one up to `teacher.max_samples` answers are sampled, until `teacher.enough_kept` of them can be
    kept; the answers of an earlier run into the same folder are reused. A teacher on a server sees images
    within the pixels of `images`. Raises DataError for a problem that the built-in teacher cannot answer,
    UserError if there is no demonstration or the teacher's budget is spent, Stopped when `stop` is set.
    """
    require_answerable(rows, teacher)
    missing = {row.problem.id: row.problem for row in rows if row.response is None}
    chain = None
    if teacher.who != "builtin":
        chain = Chain(teacher.chain, folder=teacher.templates, form=teacher.format)
    digests = {name: problem.digest for name, problem in missing.items()}
    images = images or Images()
    settings = _answer_settings(teacher, chain, images, seed)
    with (
        GradePool() as pool,
        SampleLog(folder / "samples.jsonl", digests, settings=settings, may_change=True) as log,
    ):
        given = grade_given(rows, path=folder / "given.jsonl", view=view, stop=stop)
        for line in sentences(rows, given, teacher):
            _LOG.info(line)
            if view is not None:
                view.say(line)
        schedule = Schedule(missing, teacher, chain=chain, log=log, pool=pool)
        if missing:
            with open_teacher(teacher, missing, images, seed=seed, logs=folder / "rollout") as sampler:
                schedule.run(sampler, view=view, stop=stop)
    if stop is not None:
        stop.check(str(folder))
    if over := schedule.over_budget:
        fix = "every answer is kept: with a higher budget the same command goes on"
        raise UserError(f"the teacher's budget is reached: {over}", where=str(folder), fix=fix)
    for errors, outcome in (
        (schedule.failed, "were not answered; the same command asks them again"),
        (schedule.refused, "are left out: they cannot be answered"),
    ):
        if errors and view is not None:
            view.say(f"{len(errors):,} samples {outcome}")
            for error in list(dict.fromkeys(errors.values()))[:_SHOWN]:
                view.say(f"  {error}")
    kept = _sort(rows, given, schedule, teacher, folder=folder)
    if not kept:
        raise UserError(
            f"none of {len(rows)} problems has a demonstration",
            where=str(folder),
            fix="see rejected.jsonl there; raise teacher.max_samples, or give rows with a `response`",
        )
    return kept


def load_rows(data: Data, *, decode_limit: int, all_anew: bool) -> Loaded:
    """Read the rows of `data.cold_start`; `all_anew` drops the responses that some have. Raises DataError."""
    loaded = load(data.cold_start, data, decode_limit=decode_limit, role="rl" if all_anew else "cold_start")
    require_usable(loaded, data)
    if all_anew:
        loaded = replace(loaded, rows=tuple(replace(row, response=None) for row in loaded.rows))
    return loaded


def load_kept(rows: Iterable[Row], folder: Path) -> list[Demonstration]:
    """Read the demonstrations that a finished `run` on the same rows wrote into `folder`."""
    problems = {row.problem.id: row.problem for row in rows}
    loaded = []
    for row in read_jsonl(folder / "kept.jsonl"):
        name = row.get("problem_id", row["id"])
        digest = problems[name].digest if name in problems else None
        if row.get("digest", digest) != digest or digest is None:
            raise UserError(
                f"problem {name!r} is no longer in the data{' as it was' if digest else ''}",
                where=str(folder / "kept.jsonl"),
                fix="restore data.cold_start as it was, or start in a new run folder",
            )
        loaded.append(
            Demonstration(
                problem=problems[name],
                response=row["response"],
                teacher=row["teacher"],
                attempt=row["attempt"],
                grade=from_row(Grade, row["grade"]),
            )
        )
    return loaded


def _answer_settings(teacher: Teacher, chain: Chain | None, images: Images, seed: int) -> dict[str, object]:
    """The settings that answers depend on; those that select among answers may change within a folder."""
    facts: dict[str, object] = {"teacher": teacher.who, "chain": teacher.chain, "format": teacher.format}
    if chain is None:
        return {**facts, "wrong_share": teacher.wrong_share, "seed": seed}
    sampling = {name: getattr(teacher, name) for name in ("model", "temperature", "top_p", "max_tokens")}
    templates = hashlib.sha256(chain.sources.encode()).hexdigest()[:16]
    if teacher.who == "endpoint":
        sent = teacher.request.model_dump(include={"omit", "extra"}, mode="json")
        facts |= {**sent, "max_pixels": images.max_pixels}
    return {**facts, **sampling, "templates": templates, "seed": seed}


def _sort(
    rows: Sequence[Row],
    given: Mapping[str, Demonstration],
    schedule: Schedule,
    teacher: Teacher,
    *,
    folder: Path,
) -> list[Demonstration]:
    """Choose among the answers and write the files of the folder, the statistics last."""
    kept: list[Demonstration] = []
    kept_rows, rejected, problems, seen = [], list[dict[str, Any]](), [], list[Entry]()
    for problem in (row.problem for row in rows):
        columns = _columns(problem, folder)
        answers = schedule.answers(problem)
        reasons = [why_not(problem, answer, teacher) for answer in answers]
        chosen = choose([a for a, why in zip(answers, reasons, strict=True) if not why], teacher)
        made = [_kept(problem, a, teacher) for a in chosen]
        if problem.id in given:
            why = why_left_out(given[problem.id], teacher)
            made = [] if why else [given[problem.id]]
            rejected += [_rejected_given(given[problem.id], why)] if why else []
        seen += answers
        kept += made
        kept_rows += [_kept_row(each, columns, alone=len(made) == 1) for each in made]
        rejected += [
            _rejected_row(answer, why or NOT_CHOSEN)
            for answer, why in zip(answers, reasons, strict=True)
            if answer not in chosen
        ]
        problems.append(_problem_row(problem, columns, answers))
    write_jsonl(folder / "kept.jsonl", kept_rows)
    write_jsonl(folder / "rejected.jsonl", rejected)
    write_jsonl(folder / "problems.jsonl", problems)
    stats = _stats(problems, kept, rejected, seen) | counts_of(given) | schedule.spent()
    write_json(folder / "stats.json", stats)
    return kept


def _kept(problem: Problem, answer: Entry, teacher: Teacher) -> Demonstration:
    return Demonstration(
        problem=problem,
        response=answer.response,
        teacher=teacher.model or teacher.who,
        attempt=answer.sample.index,
        grade=answer.grade,
    )


def _columns(problem: Problem, folder: Path) -> dict[str, object]:
    """Make the columns of a problem that `data.loading` reads; its images are copied into `folder`."""
    # An image that has been deleted meanwhile has no path: loading reports its row as a bad one.
    images = [ref.path for ref in with_copies(problem, folder).images]
    choices = {"choices": list(problem.choices)} if problem.choices else {}
    history = {"history": [to_row(turn) for turn in problem.history]} if problem.history else {}
    return {**history, "question": problem.question, "images": images, **choices, "answer": problem.answer}


def _problem_row(problem: Problem, columns: Mapping[str, object], answers: Sequence[Entry]) -> dict[str, Any]:
    """Make a row of `problems.jsonl`; unscored answers do not count in its pass rate."""
    further = {name: value for name, value in problem.metadata.items() if name not in RATING}
    row: dict[str, Any] = {**further, "id": problem.id, **columns}
    scored = [answer.grade.correct for answer in answers if answer.grade.correct is not None]
    if scored:
        rate = round(sum(scored) / len(scored), 4)
        row |= {"samples": len(scored), "right": sum(scored), "pass_rate": rate}
    return row


def _kept_row(kept: Demonstration, columns: Mapping[str, object], *, alone: bool) -> dict[str, object]:
    problem = kept.problem
    return {
        **problem.metadata,
        "id": problem.id if alone else f"{problem.id}#{kept.attempt}",
        "problem_id": problem.id,
        "digest": problem.digest,
        **columns,
        "response": kept.response,
        "teacher": kept.teacher,
        "attempt": kept.attempt,
        "grade": to_row(kept.grade or Grade(reward=None, correct=None)),
    }


def _rejected_row(answer: Entry, why: str) -> dict[str, Any]:
    sample = answer.sample
    facts = {"response": answer.response, "why": why, "attempt": sample.index}
    return {"id": sample.id, **facts, "correct": answer.grade.correct}


def _rejected_given(given: Demonstration, why: str) -> dict[str, Any]:
    return {
        "id": given.problem.id, "response": given.response, "why": why, "attempt": 0, "correct": False,
        "teacher": given.teacher,
    }  # fmt: skip


def _stats(
    problems: Sequence[Mapping[str, Any]],
    kept: Sequence[Demonstration],
    rejected: Sequence[Mapping[str, Any]],
    answers: Sequence[Entry],
) -> dict[str, object]:
    """Count results: `asked` answers were sampled from the teacher; `counts_of` adds the given ones."""
    rates = [problem["pass_rate"] for problem in problems if "pass_rate" in problem]
    wrong = [d for d in kept if d.grade is not None and d.grade.correct is False]
    verdicts = [answer.grade.correct for answer in answers]
    right = verdicts.count(True)
    reasons = Counter("wrong" if row["correct"] is False else row["why"] for row in rejected)
    bins = Counter(min(_BINS - 1, int(rate * _BINS)) for rate in rates)
    return {
        "problems": len(problems),
        "asked": len(answers),
        "right": right,
        "pass_rate": right / max(1, len(answers)),
        "kept": len(kept),
        "kept_wrong": len(wrong),
        "rejected": len(rejected),
        "unscored": verdicts.count(None),
        "without_demonstration": len(problems) - len({d.problem.id for d in kept}),
        "reasons": dict(sorted(reasons.items())),
        "pass_rates": [bins[index] for index in range(_BINS)],
    }
