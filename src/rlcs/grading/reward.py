"""The reward of an answer: a weighted sum of parts, each with a grader of its own."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from rlcs.errors import RecipeError
from rlcs.grading.extraction import extract
from rlcs.grading.own import KEY, check_function
from rlcs.grading.pool import GradePool
from rlcs.recipe.stages import Reward, function_name
from rlcs.records import Grade, Problem

Answers = Sequence[tuple[Problem, str]]
"""Problems, each with the text of a response."""


class Grader(Protocol):
    """Gives answers their rewards; `GradePool` and `WeightedSum` are two."""

    def grade(self, answers: Answers) -> list[Grade]:
        """One grade for each (problem, response), in order."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightedSum:
    """A grader that adds the rewards of other graders, each with its weight.

    The first one says whether an answer is correct, and what was read. An answer that one of them does not
    score is not scored: a missing part is not zero. `Grade.parts` keeps the others.
    """

    graders: Mapping[str, Grader]
    weights: Mapping[str, float]

    def grade(self, answers: Answers) -> list[Grade]:
        """One grade for each (problem, response), in order."""
        columns = self.grade_parts(answers)
        rows = zip(*columns.values(), strict=True)
        return [add_parts(dict(zip(columns, row, strict=True)), self.weights) for row in rows]

    @property
    def deciding(self) -> "WeightedSum":
        """The part alone that says whether an answer is correct."""
        [name, *_] = self.graders
        return WeightedSum(graders={name: self.graders[name]}, weights={name: self.weights[name]})

    def grade_parts(self, answers: Answers) -> dict[str, list[Grade]]:
        """The grades of each part, by its name."""
        return {name: grader.grade(answers) for name, grader in self.graders.items()}


def add_parts(grades: Mapping[str, Grade], weights: Mapping[str, float]) -> Grade:
    """Add the parts of one answer's reward; the other fields are those of the first part."""
    first = next(iter(grades.values()))
    parts = {name: grade.reward for name, grade in grades.items()}
    missing = [name for name, reward in parts.items() if reward is None]
    if missing:
        whys = {name: grades[name].why.removeprefix(f"{name}: ") for name in missing}
        why = "; ".join(f"{name}: {why}" for name, why in whys.items()) if len(parts) > 1 else first.why
        return replace(first, reward=None, correct=None, why=why, parts=parts)
    reward = sum(weights[name] * (value or 0.0) for name, value in parts.items())
    if not math.isfinite(reward):
        return replace(
            first, reward=None, correct=None, why="the sum of its parts is not finite", parts=parts
        )
    return replace(first, reward=reward, parts=parts)


class FormatGrader:
    r"""Rewards the form of an answer: 1 if its reasoning is closed and its final box can be read strictly.

    At most one `</think>` with at most one `<think>` before it (a chat template may have opened it), then a
    complete `\boxed{}` that is not empty, and no later one that is cut off. EasyR1 and open-r1 ask for the
    tags as well; here reasoning without tags is as good, since most base models write it.
    """

    def grade(self, answers: Answers) -> list[Grade]:
        """One grade for each (problem, response), in order."""
        return [self._grade(response) for _, response in answers]

    def _grade(self, response: str) -> Grade:
        found = extract(response)
        opened, closed = response.count("<think>"), response.count("</think>")
        reasoning, _, _ = response.partition("</think>")
        well_formed = opened <= closed <= 1 and reasoning.count("<think>") == opened
        right = well_formed and bool((found.text or "").strip())
        return Grade(reward=float(right), correct=right, why=found.why)


@contextmanager
def open_reward(
    reward: Reward, *, judge: Grader | None = None, only_correct: bool = False
) -> Iterator[WeightedSum]:
    """Open the graders of a recipe's reward, without `length`, which needs a whole group.

    `only_correct` opens just the part that decides whether an answer is correct. Raises RecipeError.
    """
    weights = {name: weight for name, weight in reward.weights.items() if name != "length"}
    weights = dict(list(weights.items())[:1]) if only_correct else weights
    locations = {function_name(function): function for function in reward.functions}
    graders: dict[str, Grader] = {}
    with ExitStack() as pools:
        for name in weights:
            if name == "format":
                graders[name] = FormatGrader()
            elif name == "judge":
                assert judge is not None, "the caller opens the judge of a recipe that has one"
                graders[name] = judge
            else:
                pool = GradePool(
                    workers=reward.workers,
                    deadline_s=reward.deadline_s,
                    allow_fallbacks=reward.allow_fallbacks,
                    function=check_function(locations[name]) if name in locations else None,
                )
                graders[name] = pools.enter_context(pool)
        yield WeightedSum(graders=graders, weights=weights)


def try_reward(grader: WeightedSum, problem: Problem) -> list[str]:
    r"""Grade two answers to a problem, `\boxed{GOLD}` and one without an answer; returns warnings.

    Raises RecipeError where a function or the judge does not score them.
    """
    answers = [(problem, rf"\boxed{{{problem.answer}}}"), (problem, "I do not know.")]
    decides = next(iter(grader.graders))
    warnings = []
    if grader.weights[decides] < 0:
        warnings.append(
            f"{KEY}: {decides} decides what is correct (from 1 up, unless it says so itself), but its "
            "weight is negative: training lowers what the accuracies count"
        )
    for name, (right, wrong) in grader.grade_parts(answers).items():
        key = f"grpo.reward.{name}" if name in ("accuracy", "format", "judge") else KEY
        for grade, (_, response) in zip((right, wrong), answers, strict=True):
            if not grade.scored:
                what = f"{name} does not score the answer {response!r} to problem {problem.id!r}: {grade.why}"
                if name != "accuracy":  # one gold answer that cannot be compared is no reason to stop
                    raise RecipeError(what, where=key, fix=advice(grade.why))
                warnings.append(f"{key}: {what}")
        if right.scored and right.reward == wrong.reward:
            both = " and ".join(repr(response) for _, response in answers)
            warnings.append(f"{key}: {name} gives {both} to problem {problem.id!r} the same {right.reward:g}")
    return warnings


def advice(why: str) -> str:
    """What to do about answers that are not scored for the reason `why`."""
    judge = "grpo.reward.judge"
    if "the judge gave no reply" in why:
        causes = {
            "HTTP ": "see the log of the judge's server; the same command tries again",
            "the limit of": f"raise {judge}.max_requests, or set it to null",
            "no reply in time": f"raise {judge}.max_wait_s, or lower {judge}.request_timeout_s",
            "no answer within": f"raise {judge}.request_timeout_s (and max_wait_s), or use a faster server",
        }
        again = "see whether the judge's server runs; the same command tries again"
        return next((fix for cause, fix in causes.items() if cause in why), again)
    if "timed out" in why:
        return "raise grpo.reward.deadline_s, or make the function faster"
    if "the judge's reply" in why:
        return (
            "ask the judge for a last line that is only yes or no (scale yes_no), or a number from 0 to 1 "
            f"(zero_to_one), and raise {judge}.max_new_tokens if it is cut off before"
        )
    return "correct the cause; the same command tries again"
