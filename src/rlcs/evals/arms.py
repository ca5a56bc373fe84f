"""Measure a model on held-out problems: greedy or sampled answers, graded, with Wilson intervals.

Answers are written as they come, so that a stopped evaluation never asks twice.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcs.distributed import ALONE, World
from rlcs.engines.base import Engine, ask
from rlcs.errors import DataError, UserError
from rlcs.evals.scores import arm_scores
from rlcs.grading import GradePool
from rlcs.model.chat import Chat
from rlcs.progress import Screen
from rlcs.recipe.schema import Eval
from rlcs.records import Grade, ImageRef, Problem, Rollout
from rlcs.signals import StopFlag
from rlcs.storage import append_jsonl, atomic_write, open_image, read_jsonl, write_json
from rlcs.train.batching import guessed_tokens, own_share

CHUNK = 256
"""Problems between two writes."""

GALLERY_PIXELS = 640
"""Longer side of the images kept for the report."""


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
    scores = arm_scores([row for row in rows if row["id"] in known], known)
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


def write_problems(problems: Sequence[Problem], folder: Path, *, decode_limit: int, gallery: int) -> None:
    """Write what the report shows: problems.jsonl, and small PNGs of the first `gallery` * 8 problems."""
    rows = []
    for number, problem in enumerate(problems):
        images = []
        if number < gallery * 8:
            images = [_thumbnail(ref, folder, decode_limit) for ref in problem.images]
        rows.append(
            {
                "id": problem.id,
                "question": problem.question,
                "answer": problem.answer,
                "choices": list(problem.choices),
                "family": problem.metadata.get("family"),
                "level": problem.metadata.get("level"),
                "images": [name for name in images if name],
            }
        )
    (folder / "problems.jsonl").unlink(missing_ok=True)
    append_jsonl(folder / "problems.jsonl", rows)


def _thumbnail(ref: ImageRef, folder: Path, decode_limit: int) -> str:
    """Write one image as PNG and return its path from `folder`; empty if it cannot be read."""
    name = f"images/{ref.sha256[:16]}.png"
    if not (folder / name).exists():
        try:
            image = open_image(ref, limit=decode_limit)
        except DataError:
            return ""
        image.thumbnail((GALLERY_PIXELS, GALLERY_PIXELS))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        atomic_write(folder / name, buffer.getvalue())
    return name
