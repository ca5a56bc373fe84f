"""Scores of graded answers: pure functions.

With several samples of each question, accuracy is the mean over questions of the mean over samples, and its
Wilson interval counts questions, not samples.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from rlcs.data import puzzles
from rlcs.data.puzzles.faults import FAULTS
from rlcs.evals.benchmarks.base import Benchmark, Question
from rlcs.evals.intervals import wilson
from rlcs.generation import Entry
from rlcs.records import Problem, Sample, StopReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One graded answer; `correct` is None if the grader reached no verdict, which counts as not right."""

    question: Question
    index: int
    correct: bool | None


def chance_level(questions: Sequence[Question]) -> float:
    """Expected accuracy of guessing: the mean of 1 / options, with 0 for a question without options."""
    return mean([1 / q.num_options if q.num_options else 0.0 for q in questions])


def pass_at(n: int, right: int, k: int) -> float:
    """Probability that `k` samples, drawn from `n` of which `right` are right, contain a right one.

    The unbiased estimate of Chen et al. 2021 (arXiv 2107.03374), eq. 1.
    """
    return 1.0 - comb(n - right, k) / comb(n, k)


def with_interval(accuracy: float, n: int) -> dict[str, float]:
    """An accuracy on `n` questions with its Wilson interval."""
    low, high = wilson(round(accuracy * n), n)
    return {"accuracy": accuracy, "low": low, "high": high}


def answer_lengths(samples: Sequence[Sample]) -> dict[str, float]:
    """Mean tokens of the answers, and the share that reached the token limit."""
    return {
        "mean_tokens": mean([sample.tokens for sample in samples]),
        "truncated": mean([sample.stop is StopReason.LENGTH for sample in samples]),
    }


def arm_scores(entries: Sequence[Entry], problems: Mapping[str, Problem]) -> dict[str, Any]:
    """Accuracy of one arm with its interval, also by family and level where the problems have them.

    Unscored answers count as not right.
    """
    verdicts = [(entry.sample.id, entry.added["correct"]) for entry in entries]
    by = _breakdown(
        (key, str(value), float(correct is True))
        for name, correct in verdicts
        for key in ("family", "level")
        if (value := problems[name].metadata.get(key)) is not None
    )
    return {
        **with_interval(mean([correct is True for _, correct in verdicts]), len(verdicts)),
        "n": len(verdicts),
        "unscored": sum(correct is None for _, correct in verdicts),
        "by_family": by.get("family", {}),
        "by_level": by.get("level", {}),
        **answer_lengths([entry.sample for entry in entries]),
        **_faults(entries, problems),
    }


def _faults(entries: Sequence[Entry], problems: Mapping[str, Problem]) -> dict[str, dict[str, int]]:
    """How often perception, reasoning or both failed, where the scenes are known."""
    known = [entry for entry in entries if puzzles.is_builtin(problems[entry.sample.id])]
    counts = Counter(puzzles.fault(problems[entry.sample.id], entry.response) for entry in known)
    return {"faults": {name: counts[name] for name in FAULTS}} if known else {}


def rule_scores(benchmark: Benchmark, verdicts: Sequence[Verdict], samples: int) -> dict[str, Any]:
    """Scores by one rule: accuracy with its interval and by facet, pass@k, the benchmark's own metrics."""
    by_question: dict[str, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        by_question[verdict.question.id].append(verdict.correct is True)
    shares = {name: mean(each) for name, each in by_question.items()}
    scores: dict[str, Any] = {
        **with_interval(mean(list(shares.values())), len(shares)),
        "unscored": sum(verdict.correct is None for verdict in verdicts),
    }
    if samples > 1:
        scores["pass_at"] = _all_pass_at(list(by_question.values()), samples)
    questions = {verdict.question.id: verdict.question for verdict in verdicts}
    scores["by"] = _breakdown(
        (facet, value, shares[name])
        for name, question in questions.items()
        for facet, values in question.facets.items()
        for value in values
    )
    if benchmark.metrics is not None:
        rounds: dict[int, list[tuple[Question, bool]]] = defaultdict(list)
        for verdict in verdicts:
            rounds[verdict.index].append((verdict.question, verdict.correct is True))
        scores["metrics"] = averaged([benchmark.metrics(each) for each in rounds.values()])
    return scores


def _all_pass_at(samples: Sequence[Sequence[bool]], most: int) -> dict[str, float]:
    """pass@1, 2, 4, ... and `most`, each over the questions with at least so many samples."""
    scores = {}
    for k in sorted({*(2**power for power in range(most.bit_length())), most}):
        if estimates := [pass_at(len(each), sum(each), k) for each in samples if len(each) >= k]:
            scores[str(k)] = mean(estimates)
    return scores


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / max(1, len(values))


def _breakdown(shares: Iterable[tuple[str, str, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy and count by facet and value, from (facet, value, share that is right)."""
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for facet, value, share in shares:
        groups[facet][value].append(share)
    return {
        facet: {value: {"accuracy": mean(each), "n": len(each)} for value, each in sorted(group.items())}
        for facet, group in groups.items()
    }


def averaged(rounds: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The mean of each number over the rounds that have it."""
    means: dict[str, float | None] = {}
    for name in rounds[0] if rounds else ():
        known = [value for each in rounds if (value := each[name]) is not None]
        means[name] = mean(known) if known else None
    return means
