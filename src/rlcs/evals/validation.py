"""Measures a model while it trains: pass@1 with its interval, and pass@k of several samples."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from rlcs.evals.arms import CHUNK, Evaluator, grade_samples
from rlcs.evals.scores import answer_lengths, mean, pass_at, with_interval
from rlcs.records import Grade, Problem, Request, Sample
from rlcs.signals import StopFlag
from rlcs.train.batching import guessed_tokens, shared


def validate(
    evaluator: Evaluator, problems: Sequence[Problem], *, samples: int, stop: StopFlag
) -> dict[str, Any]:
    """Sample `samples` answers to each problem and grade them; returns the scores, on every rank the same.

    `right` counts the right answers to each problem; unscored ones are not right. The sampler's seed is that
    of every measurement, so that two measurements differ by the weights alone. Raises Stopped when `stop` is
    set.
    """
    started, world = time.monotonic(), evaluator.world
    graded: list[list[tuple[Sample, Grade]]] = []
    for start in range(0, len(problems), CHUNK):
        world.check(stop, "validation")
        chunk = problems[start : start + CHUNK]
        graded += shared(partial(_answers, evaluator, samples), chunk, guessed_tokens, world)
    answers = [answer for of_problem in graded for answer in of_problem]
    right = [sum(grade.correct is True for _, grade in of_problem) for of_problem in graded]
    return {
        "n": len(problems),
        **with_interval(mean([count / samples for count in right]), len(problems)),
        "samples": samples,
        "right": right,
        "pass_at_k": mean([pass_at(samples, count, samples) for count in right]) if samples > 1 else None,
        **answer_lengths([sample for sample, _ in answers]),
        "unscored": sum(grade.correct is None for _, grade in answers),
        "seconds": round(time.monotonic() - started, 2),
    }


def _answers(
    evaluator: Evaluator, count: int, problems: Sequence[Problem]
) -> list[list[tuple[Sample, Grade]]]:
    """The graded answers to each problem."""
    requests = [Request.of(problem, index=index) for problem in problems for index in range(count)]
    found = {sample.key: sample for sample in evaluator.sampler.batch(requests)}
    repeated = [problem for problem in problems for _ in range(count)]
    samples = [found[request.key] for request in requests]
    graded = grade_samples(evaluator, list(zip(repeated, samples, strict=True)))
    return [graded[start : start + count] for start in range(0, len(graded), count)]
