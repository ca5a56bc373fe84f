"""Measure a model on held-out problems: greedy or sampled answers, graded, with Wilson intervals.

Answers are written as they come, so that a stopped evaluation never asks twice.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcs.distributed import ALONE, World
from rlcs.engines.base import Engine, ask
from rlcs.errors import DataError, UserError
from rlcs.evals.intervals import wilson
from rlcs.grading import GradePool
from rlcs.model.chat import Chat
from rlcs.progress import Screen
from rlcs.recipe.schema import Eval
from rlcs.records import Grade, Problem, Rollout
from rlcs.signals import StopFlag
from rlcs.storage import append_jsonl, read_jsonl, write_json
from rlcs.train.batching import guessed_tokens, own_share

CHUNK = 256
"""Problems between two writes."""


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """Who asks and grades, and how."""

    engine: Engine
    chat: Chat
    pool: GradePool
    settings: Eval
    world: World = ALONE


def evaluate(
    examiner: Examiner,
    problems: Sequence[Problem],
    *,
    folder: Path,
    screen: Screen,
    stop: StopFlag,
) -> dict[str, object]:
    """Answer and grade what is not answered yet; writes predictions.jsonl and scores.json.

    A problem that cannot become a prompt counts as wrong and says why: leaving it out would make
    models look better than they are.
    """
    path = folder / "predictions.jsonl"
    world = examiner.world
    known = {problem.id: problem for problem in problems}
    digests = {name: problem.digest for name, problem in known.items()}
    rows = world.first(lambda: answers_so_far(path, digests))
    answered = {row["id"] for row in rows}
    left = [problem for problem in problems if problem.id not in answered]
    for start in range(0, len(left), CHUNK):
        world.check(stop, str(folder))
        some = left[start : start + CHUNK]
        new = _answer_together(examiner, some)
        if world.rank == 0:
            append_jsonl(path, new)
        rows += new
        done = len(problems) - len(left) + start + len(some)
        screen.advance(done, accuracy=sum(row["correct"] is True for row in rows) / len(rows))
    scores = score_rows([row for row in rows if row["id"] in known], known)
    world.first(lambda: write_json(folder / "scores.json", scores))
    return scores


def answers_so_far(path: Path, digests: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of predictions.jsonl. Raises UserError if one answers what its problem was before an edit."""
    rows = read_jsonl(path) if path.exists() else []
    for row in rows:
        digest = digests.get(row["id"])
        if digest and row.get("digest", digest) != digest:  # older rows have none
            raise UserError(
                f"the data changed: the answer to {row['id']!r} is to another question",
                where=str(path),
                fix="restore the data as it was, or choose another --out, or remove this file to ask anew",
            )
    return rows


def _answer_together(examiner: Examiner, problems: Sequence[Problem]) -> list[dict[str, object]]:
    """Every rank answers its share; all get the rows of all."""
    own = own_share([guessed_tokens(problem) for problem in problems], examiner.world)
    parts = examiner.world.gather(list(_answer(examiner, [problems[i] for i in own])))
    return [row for part in parts for row in part]


def _answer(examiner: Examiner, problems: Sequence[Problem]) -> Iterable[dict[str, object]]:
    chat, settings = examiner.chat, examiner.settings
    sampling = chat.sampling(
        temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens
    )
    answers = ask(examiner.engine, chat, problems, sampling)
    asked: list[tuple[Problem, Rollout]] = []
    for problem, answer in zip(problems, answers, strict=True):
        if isinstance(answer, DataError):
            yield prediction(problem, None, Grade(reward=0.0, correct=False, why=str(answer)))
        else:
            asked.append((problem, answer[1][0]))
    grades = examiner.pool.grade([(problem, rollout.text) for problem, rollout in asked])
    for (problem, rollout), grade in zip(asked, grades, strict=True):
        yield prediction(problem, rollout, grade)


def prediction(problem: Problem, rollout: Rollout | None, grade: Grade) -> dict[str, object]:
    """One row of predictions.jsonl."""
    return {
        "id": problem.id,
        "digest": problem.digest,
        "response": rollout.text if rollout else "",
        "extracted": grade.extracted,
        "correct": grade.correct,
        "why": grade.why,
        "tokens": len(rollout.ids) if rollout else 0,
        "stop": rollout.stop.value if rollout else "error",
    }


def score_rows(rows: Sequence[Mapping[str, object]], problems: Mapping[str, Problem]) -> dict[str, object]:
    """Accuracy with its Wilson interval, by family and level where the problems have them.

    Unscored answers count as not right here: a benchmark has no group to leave.
    """
    right = sum(row["correct"] is True for row in rows)
    low, high = wilson(right, len(rows))
    tokens = [int(str(row["tokens"])) for row in rows]
    return {
        "accuracy": right / max(1, len(rows)),
        "low": low,
        "high": high,
        "n": len(rows),
        "unscored": sum(row["correct"] is None for row in rows),
        "by_family": _by(rows, problems, "family"),
        "by_level": _by(rows, problems, "level"),
        "mean_tokens": sum(tokens) / max(1, len(tokens)),
        "truncated": sum(row["stop"] == "length" for row in rows) / max(1, len(rows)),
    }


def _by(
    rows: Sequence[Mapping[str, object]], problems: Mapping[str, Problem], key: str
) -> dict[str, dict[str, float]]:
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        value = problems[str(row["id"])].metadata.get(key)
        if value is not None:
            verdicts[str(value)].append(row["correct"] is True)
    return {
        name: {"accuracy": sum(each) / len(each), "n": len(each)} for name, each in sorted(verdicts.items())
    }
