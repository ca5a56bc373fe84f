"""Measures a model on held-out problems: samples one answer to each, grades it and writes it down."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlcs.distributed import ALONE, World
from rlcs.errors import RlcsError
from rlcs.evals import CHUNK
from rlcs.evals.scores import arm_scores
from rlcs.generation import EngineSampler, SampleLog
from rlcs.grading.reward import Grader, advice
from rlcs.progress import Screen
from rlcs.records import Grade, Problem, Request, Sample, to_row
from rlcs.signals import StopFlag
from rlcs.storage import read_jsonl, write_json, write_jsonl
from rlcs.train.batching import guessed_tokens, shared


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

    Answers in `folder` that are not scored are graded again, as the cause may be gone. Raises UserError if a
    problem was edited after its answer was written; RlcsError where no answer is scored; Stopped, with every
    finished chunk on disk, when `stop` is set.
    """
    world, known = evaluator.world, {problem.id: problem for problem in problems}
    path, digests = folder / "predictions.jsonl", {name: p.digest for name, p in known.items()}
    kept = world.first(lambda: _take_unscored(path, digests))
    log = SampleLog(path, digests)
    with ExitStack() as files:  # of rank 0 alone
        answered = world.first(lambda: {name for name, *_ in files.enter_context(log).entries})
        left = [problem for problem in problems if problem.id not in answered]
        for start in range(0, len(left), CHUNK):
            world.check(stop, str(folder))
            chunk = left[start : start + CHUNK]
            graded = shared(partial(_answers, evaluator, kept), chunk, guessed_tokens, world)
            if world.rank == 0:
                for sample, grade in graded:
                    log.add(sample, to_row(grade))
            world.first(partial(_require_scores, log, folder))
            verdicts = Counter(entry.added["correct"] for entry in log.entries.values())
            done = len(problems) - len(left) + start + len(chunk)
            accuracy = verdicts[True] / max(1, verdicts.total())
            screen.advance(done, accuracy=accuracy, not_scored=verdicts[None])
    return world.first(partial(_write_scores, folder, log, known))


def _take_unscored(path: Path, digests: Mapping[str, str]) -> dict[str, Sample]:
    """Take the answers without a score out of the log, and return them by problem."""
    if not path.exists():
        return {}
    with SampleLog(path, digests) as log:
        taken = {e.sample.id: e.sample for e in log.entries.values() if e.added["correct"] is None}
    if taken:
        write_jsonl(path, [row for row in read_jsonl(path) if row["id"] not in taken])
    return taken


def _require_scores(log: SampleLog, folder: Path) -> None:
    """Raise RlcsError with the most frequent reason if there are answers, and not one is scored."""
    answers = [entry.grade for entry in log.entries.values() if not entry.sample.error]
    reasons = Counter(grade.why for grade in answers if grade.correct is None)
    if answers and len(answers) == reasons.total():
        [(why, count)] = reasons.most_common(1)
        raise RlcsError(
            f"none of the {len(answers):,} answers in {folder} is scored; {count:,} of them: {why}",
            where="grpo.reward",
            fix=advice(why),
        )


def _write_scores(folder: Path, log: SampleLog, problems: Mapping[str, Problem]) -> dict[str, Any]:
    scores = arm_scores(list(log.entries.values()), problems)
    write_json(folder / "scores.json", scores)
    return scores


def _answers(
    evaluator: Evaluator, kept: Mapping[str, Sample], problems: Sequence[Problem]
) -> list[tuple[Sample, Grade]]:
    """Answer problems without a `kept` answer and grade all answers, in the order of the problems.

    A problem without an answer (its prompt is too long, say) counts as wrong, with the reason: leaving it
    out would raise the accuracy.
    """
    requests = [Request.of(each) for each in problems if each.id not in kept]
    answered = {**kept, **{each.id: each for each in evaluator.sampler.batch(requests)}}
    return grade_samples(evaluator, [(problem, answered[problem.id]) for problem in problems])


def grade_samples(
    evaluator: Evaluator, answered: Sequence[tuple[Problem, Sample]]
) -> list[tuple[Sample, Grade]]:
    """Grade a model's answers in order; one that it could not give is wrong, with the reason."""
    samples = [sample for _, sample in answered]
    answers = [(problem, sample.text) for problem, sample in answered if not sample.error]
    grades = iter(evaluator.grader.grade(answers))
    return [
        (
            replace(sample, retryable=False),
            Grade(reward=0.0, correct=False, why=sample.error) if sample.error else next(grades),
        )
        for sample in samples
    ]
