"""Measures a model on held-out problems: samples one answer to each, grades it and writes it down."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlcs.distributed import ALONE, World
from rlcs.evals.scores import arm_scores
from rlcs.generation import EngineSampler, SampleLog
from rlcs.grading.reward import Grader
from rlcs.progress import Screen
from rlcs.records import Grade, Problem, Request, Sample, to_row
from rlcs.signals import StopFlag
from rlcs.storage import write_json
from rlcs.train.batching import guessed_tokens, shared

CHUNK = 256
"""Problems that are answered between two writes."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """The sampler of the model, the grader, and the ranks that share the problems."""

    sampler: EngineSampler
    grader: Grader
    world: World = ALONE


def evaluate(
    evaluator: Evaluator,
    problems: Sequence[Problem],
    *,
    folder: Path,
    screen: Screen,
    stop: StopFlag,
) -> dict[str, Any]:
    """Answer and grade the problems without an answer in `folder`; write predictions.jsonl and scores.json.

    Raises UserError if a problem was edited after its answer was written; Stopped, with every finished chunk
    on disk, when `stop` is set.
    """
    world, known = evaluator.world, {problem.id: problem for problem in problems}
    log = SampleLog(folder / "predictions.jsonl", {name: p.digest for name, p in known.items()})
    with ExitStack() as files:  # of rank 0 alone
        answered = world.first(lambda: {name for name, *_ in files.enter_context(log).entries})
        left = [problem for problem in problems if problem.id not in answered]
        for start in range(0, len(left), CHUNK):
            world.check(stop, str(folder))
            chunk = left[start : start + CHUNK]
            graded = shared(partial(_answers, evaluator), chunk, guessed_tokens, world)
            if world.rank == 0:
                for sample, grade in graded:
                    log.add(sample, to_row(grade))
            right = sum(entry.added["correct"] is True for entry in log.entries.values())
            done = len(problems) - len(left) + start + len(chunk)
            screen.advance(done, accuracy=right / max(1, len(log.entries)))
    return world.first(partial(_write_scores, folder, log, known))


def _write_scores(folder: Path, log: SampleLog, problems: Mapping[str, Problem]) -> dict[str, Any]:
    scores = arm_scores(list(log.entries.values()), problems)
    write_json(folder / "scores.json", scores)
    return scores


def _answers(evaluator: Evaluator, problems: Sequence[Problem]) -> list[tuple[Sample, Grade]]:
    """Answer problems and grade the answers, in the order of the problems.

    A problem without an answer (its prompt is too long, say) counts as wrong, with the reason: leaving it
    out would raise the accuracy.
    """
    known = {problem.id: problem for problem in problems}
    answered = {each.id: each for each in evaluator.sampler.batch([Request.of(each) for each in problems])}
    samples = [answered[problem.id] for problem in problems]
    answers = [(known[sample.id], sample.text) for sample in samples if not sample.error]
    grades = iter(evaluator.grader.grade(answers))
    return [
        (
            replace(sample, retryable=False),
            Grade(reward=0.0, correct=False, why=sample.error) if sample.error else next(grades),
        )
        for sample in samples
    ]
