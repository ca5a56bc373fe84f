"""Measures a model while it trains: pass@1 and pass@k, and what its answers leave RL to learn from."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

from rlcs.distill.filters import overlap, shingles
from rlcs.evals import CHUNK
from rlcs.evals.arms import Evaluator, grade_samples
from rlcs.evals.scores import answer_lengths, mean, pass_at, with_interval
from rlcs.grading.extraction import extract
from rlcs.grading.reward import FormatGrader
from rlcs.records import Grade, Problem, Request, Sample
from rlcs.signals import StopFlag
from rlcs.train.batching import guessed_tokens, shared


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One graded answer, and the sum of its tokens' logprobs at the sampling temperature."""

    sample: Sample
    grade: Grade
    logprob: float

    @property
    def final(self) -> str:
        """The final answer as it was read; the empty text where there is none."""
        return self.grade.answer_value or self.grade.extracted or extract(self.sample.text).text or ""


def validate(
    evaluator: Evaluator, problems: Sequence[Problem], *, samples: int, stop: StopFlag
) -> dict[str, Any]:
    """Sample `samples` answers to each problem and grade them; returns the scores, on every rank the same.

    `right` counts the right answers to each problem; unscored ones are not right. The sampler's seed is that
    of every measurement, so that two measurements differ by the weights alone. Raises Stopped when `stop` is
    set.
    """
    started, world = time.monotonic(), evaluator.world
    groups: list[list[Answer]] = []
    for start in range(0, len(problems), CHUNK):
        world.check(stop, "validation")
        chunk = problems[start : start + CHUNK]
        groups += shared(partial(_answers, evaluator, samples), chunk, guessed_tokens, world)
    return {**scores(problems, groups), "seconds": round(time.monotonic() - started, 2)}


def scores(problems: Sequence[Problem], groups: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """The columns of a measurement, of equally many answers to each problem.

    `right` counts the right answers to each problem. `format` is the share of answers whose form is right.
    Of several answers, else None: `entropy`, the mean of -logprob over all their tokens in nats, an estimate
    of the entropy of the next token; `signal`, the share of problems with right and other answers, from which
    alone GRPO learns; `distinct`, the number of different final answers to a problem; `alike`, the mean
    Jaccard similarity of two answers to a problem, by their runs of three words.
    """
    answers = [answer for group in groups for answer in group]
    right = [sum(answer.grade.correct is True for answer in group) for group in groups]
    k = len(groups[0])
    forms = FormatGrader().grade(
        [(problem, a.sample.text) for problem, group in zip(problems, groups, strict=True) for a in group]
    )
    tokens = sum(answer.sample.tokens for answer in answers)
    several = k > 1
    return {
        "n": len(problems),
        **with_interval(mean([count / k for count in right]), len(problems)),
        "samples": k,
        "pass_at_k": mean([pass_at(k, count, k) for count in right]) if several else None,
        "signal": mean([0 < count < k for count in right]) if several else None,
        "entropy": -sum(answer.logprob for answer in answers) / max(1, tokens) if several else None,
        "distinct": mean([len({answer.final for answer in group}) for group in groups]) if several else None,
        "alike": mean([_alike(group) for group in groups]) if several else None,
        "format": mean([form.correct is True for form in forms]),
        **answer_lengths([answer.sample for answer in answers]),
        "unscored": sum(answer.grade.correct is None for answer in answers),
        "right": right,
    }


def _alike(group: Sequence[Answer]) -> float:
    """The mean similarity of two different answers of a group."""
    return mean([overlap(a, b) for a, b in combinations([shingles(x.sample.text) for x in group], 2)])


def _answers(evaluator: Evaluator, count: int, problems: Sequence[Problem]) -> list[list[Answer]]:
    """The graded answers to each problem."""
    requests = [Request.of(problem, index=index) for problem in problems for index in range(count)]
    found = {sample.key: (sample, rollout) for sample, rollout in evaluator.sampler.drawn(requests)}
    repeated = [problem for problem in problems for _ in range(count)]
    drawn = [found[request.key] for request in requests]
    answered = [(problem, sample) for problem, (sample, _) in zip(repeated, drawn, strict=True)]
    graded = [
        Answer(sample=sample, grade=grade, logprob=sum(rollout.logprobs) if rollout else 0.0)
        for (sample, grade), (_, rollout) in zip(grade_samples(evaluator, answered), drawn, strict=True)
    ]
    return [graded[start : start + count] for start in range(0, len(graded), count)]
