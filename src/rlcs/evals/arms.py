"""Measures a model on held-out problems: one answer each, graded and written as it comes."""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rlcs.distributed import ALONE, World
from rlcs.errors import DataError
from rlcs.evals.scores import arm_scores
from rlcs.generation import EngineSampler, SampleLog
from rlcs.grading import GradePool
from rlcs.progress import Screen
from rlcs.records import Grade, ImageRef, Problem, Request, Sample
from rlcs.signals import StopFlag
from rlcs.storage import append_jsonl, atomic_write, open_image, write_json
from rlcs.train.batching import guessed_tokens, own_share

CHUNK = 256
"""Problems between two writes."""

GALLERY_PIXELS = 640
"""Longer side of the images kept for the report."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """The model that answers, the pool that grades, and the ranks that share the problems."""

    sampler: EngineSampler
    pool: GradePool
    world: World = ALONE


def evaluate(
    evaluator: Evaluator,
    problems: Sequence[Problem],
    *,
    folder: Path,
    screen: Screen,
    stop: StopFlag,
) -> dict[str, Any]:
    """Answer and grade what is not answered yet; write predictions.jsonl and scores.json.

    Raises UserError if an answer on disk is to what its problem was before an edit; Stopped, with every
    chunk that was answered on disk, when `stop` is set.
    """
    world, known = evaluator.world, {problem.id: problem for problem in problems}
    log = SampleLog(folder / "predictions.jsonl", {name: p.digest for name, p in known.items()})
    with ExitStack() as files:  # of rank 0 alone
        answered = world.first(lambda: {name for name, *_ in files.enter_context(log).entries})
        left = [problem for problem in problems if problem.id not in answered]
        for start in range(0, len(left), CHUNK):
            world.check(stop, str(folder))
            some = left[start : start + CHUNK]
            graded = _on_all_ranks(partial(_answers, evaluator), some, world)
            if world.rank == 0:
                for sample, grade in graded:
                    log.add(sample, asdict(grade))
            right = sum(entry.added["correct"] is True for entry in log.entries.values())
            done = len(problems) - len(left) + start + len(some)
            screen.advance(done, accuracy=right / max(1, len(log.entries)))
    return world.first(partial(_write_scores, folder, log, known))


def _write_scores(folder: Path, log: SampleLog, problems: Mapping[str, Problem]) -> dict[str, Any]:
    scores = arm_scores(list(log.entries.values()), problems)
    write_json(folder / "scores.json", scores)
    return scores


def _on_all_ranks(
    work: Callable[[Sequence[Problem]], list[T]], problems: Sequence[Problem], world: World
) -> list[T]:
    """The results of all ranks, each of which works on its share of the problems."""
    own = own_share([guessed_tokens(problem) for problem in problems], world)
    return [result for part in world.gather(work([problems[i] for i in own])) for result in part]


def _answers(evaluator: Evaluator, problems: Sequence[Problem]) -> list[tuple[Sample, Grade]]:
    """Samples with their grades.

    A problem without an answer (its prompt is too long, say) counts as wrong and says why: leaving it out
    would make models look better than they are.
    """
    samples = {each.id: each for each in evaluator.sampler.batch([Request.of(p) for p in problems])}
    answered = [problem for problem in problems if not samples[problem.id].error]
    grades = evaluator.pool.grade([(problem, samples[problem.id].text) for problem in answered])
    by_id = {problem.id: grade for problem, grade in zip(answered, grades, strict=True)}
    graded = []
    for problem in problems:
        sample = samples[problem.id]
        wrong = Grade(reward=0.0, correct=False, why=sample.error)
        graded.append((replace(sample, retryable=False), by_id.get(problem.id, wrong)))
    return graded


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
