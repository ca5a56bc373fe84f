"""Computes the figures of a report from its runs: pure functions, no files, no HTML.

Most take a list of runs, one for each seed. With several seeds a figure is the mean over
seeds and its interval the lowest and highest seed; with one it is a Wilson 95% interval.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from rlcs.errors import RlcsError
from rlcs.evals.intervals import wilson
from rlcs.recipe.arms import ARMS, RL_ARMS
from rlcs.recipe.reading import parse
from rlcs.records import GradedSample, Problem, StopReason
from rlcs.report.load_run import Row, Run, by_reward, kept_images, number, part
from rlcs.train.health import LAST_STEPS, SIGNS, Sign


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmResult:
    """The results of one arm on the held-out problems. Shares are in [0, 1]."""

    arm: str
    accuracy: float
    low: float
    high: float
    n: int
    seeds: tuple[float, ...]
    tokens: float | None
    truncated: float | None
    unscored: int | None
    by_family: Mapping[str, float]
    by_level: Mapping[str, float]

    @property
    def name(self) -> str:
        """The arm's label."""
        return ARMS[self.arm].label


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthRow:
    """One warning sign, and for each stage its mean over the first steps and over the last."""

    sign: Sign
    stages: Mapping[str, tuple[float, float]]

    @property
    def alarming(self) -> bool:
        """Whether the last steps of a stage are above the sign's limit."""
        return any(last > self.sign.most for _, last in self.stages.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """Chosen problems of one kind, and how many of that kind there are."""

    kind: str
    problems: tuple[Problem, ...]
    total: int


def arm_results(runs: Sequence[Run]) -> list[ArmResult]:
    """The results of every measured arm, in the order of ARMS."""
    found = []
    for arm in ARMS:
        scores = [s for s in (_score(run, arm) for run in runs) if s is not None]
        if scores:
            found.append(scores[0] if len(scores) == 1 else _over_seeds(scores))
    return found


def training_headline(runs: Sequence[Run]) -> tuple[str, str]:
    """The headline of a page without a measurement: the first run's training, the last stage first."""
    found = []
    for stage in ("sft_grpo", "mixed", "grpo", "sft"):
        rows, key = runs[0].curves.get(stage, ()), "reward" if stage in RL_ARMS else "loss"
        values = [value for _, value in series(rows, key)]
        if values:
            first, last = _ends(values)
            name = ARMS[stage].stage
            found.append(f"{name}: {key} {first:.3g} → {last:.3g} in {len(rows):,} steps")
    return (found[0], ". ".join([*found[1:], ""]).strip()) if found else ("Nothing measured yet", "")


def series(rows: Iterable[Row], key: str) -> list[tuple[float, float]]:
    """The (step, value) of every row that has both."""
    found = ((number(row, "step"), number(row, key)) for row in rows)
    return [(step, value) for step, value in found if step is not None and value is not None]


PART = "reward_"
"""How the names of the metrics begin that are the means of a reward's parts."""


def reward_parts(runs: Iterable[Run]) -> list[str]:
    """The metrics of the parts of the reward in some runs; none where the reward has one part."""
    rows = (row for run in runs for stage in RL_ARMS for row in run.curves.get(stage, ()))
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith(PART)))


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over about a tenth of the series, so that noise does not hide the trend."""
    half = len(values) // 20
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def thin(points: Sequence[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    """At most `most` points: means of equal chunks."""
    size = math.ceil(len(points) / most) or 1
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(fmean(p[0] for p in c), fmean(p[1] for p in c)) for c in chunks]


def health(runs: Sequence[Run]) -> list[HealthRow]:
    """The warning signs of each RL stage: means over its first and its last steps, and over seeds."""
    found = []
    gap_limit = recipe_values(runs[0].recipe).get("rollout.alarm")
    for sign in SIGNS:
        if sign.key == "sampler_gap" and isinstance(gap_limit, int | float):
            sign = replace(sign, most=gap_limit)
        stages: dict[str, tuple[float, float]] = {}
        for stage in RL_ARMS:
            values = [[v for _, v in series(run.curves.get(stage, ()), sign.key)] for run in runs]
            ends = [(_ends(curve)[0], fmean(curve[-LAST_STEPS:])) for curve in values if curve]
            if ends:
                stages[stage] = (fmean(first for first, _ in ends), fmean(last for _, last in ends))
        if stages:
            found.append(HealthRow(sign=sign, stages=stages))
    return found


def skipped_steps(runs: Sequence[Run]) -> list[str]:
    """`stage step N: reason` of every skipped step."""
    return [
        f"{stage} step {row.get('step')}: {row['skipped']}"
        for run in runs
        for stage, rows in run.curves.items()
        for row in rows
        if row.get("skipped")
    ]


def gallery(run: Run, count: int) -> list[Gallery]:
    """Choose `count` problems: half where the arms disagree, the others all wrong or all right.

    Within a kind they are ordered by a hash of the id, so that the choice is arbitrary. A run keeps the
    images of its first problems only: where those are enough, only they are shown.
    """
    kinds: dict[str, list[Problem]] = {
        "The models disagree": [],
        "Every model is wrong": [],
        "Every model is right": [],
    }
    totals = dict.fromkeys(kinds, 0)
    only_pictured = sum(bool(kept_images(problem)) for problem in run.problems) >= count
    for problem in sorted(run.problems, key=shuffled):
        verdicts = [arm[problem.id].grade.correct for arm in run.answers.values() if problem.id in arm]
        if verdicts:
            kind = list(kinds)[1 if not any(verdicts) else 2 if all(verdicts) else 0]
            totals[kind] += 1
            if kept_images(problem) or not only_pictured:
                kinds[kind].append(problem)
    wanted = dict(zip(kinds, (count - 2 * (count // 4), count // 4, count // 4), strict=True))
    take = {kind: min(len(problems), wanted[kind]) for kind, problems in kinds.items()}
    for kind, problems in kinds.items():  # a kind with too few problems is filled up from the others
        take[kind] += min(len(problems) - take[kind], count - sum(take.values()))
    return [
        Gallery(kind=kind, problems=tuple(problems[: take[kind]]), total=totals[kind])
        for kind, problems in kinds.items()
        if take[kind]
    ]


def shuffled(problem: Problem) -> bytes:
    """A key for an arbitrary order of problems that is always the same."""
    return hashlib.sha256(problem.id.encode("utf-8", "replace")).digest()


def late_rollouts(
    rollouts: Sequence[GradedSample], *, groups: int = 3, each: int = 3
) -> list[list[GradedSample]]:
    """Groups of the last step, those with unequal rewards first; of each the best, middle and worst."""
    by_id: dict[str, list[GradedSample]] = {}
    for rollout in rollouts:
        by_id.setdefault(rollout.sample.id, []).append(rollout)
    ranked = [by_reward(group) for group in by_id.values()]
    ranked.sort(key=lambda g: (g[0].grade.reward == g[-1].grade.reward, g[0].sample.id))
    chosen = []
    for group in ranked[:groups]:
        last = len(group) - 1
        spread = sorted({round(i * last / max(1, each - 1)) for i in range(each)})
        chosen.append([group[i] for i in spread])
    return chosen


def phases(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """The (step, seconds) of each phase; 0 seconds in steps without that phase."""
    names = dict.fromkeys(name for row in rows for name in part(row, "seconds"))
    steps = [(number(row, "step"), part(row, "seconds")) for row in rows]
    return {
        name: [(step, number(took, name) or 0.0) for step, took in steps if step is not None]
        for name in names
    }


def stage_seconds(runs: Sequence[Run]) -> dict[str, float]:
    """Seconds of each stage, mean over seeds: from the summary, or else the sum over steps."""
    found: dict[str, list[float]] = {}
    for run in runs:
        summary = part(run.summary, "seconds")
        took = {stage: number(summary, stage) for stage in summary}
        for stage, rows in run.curves.items():
            if took.get(stage) is None:
                took[stage] = sum(v for points in phases(rows).values() for _, v in points)
        for stage, seconds in took.items():
            if seconds:
                found.setdefault(stage, []).append(seconds)
    return {stage: fmean(values) for stage, values in found.items()}


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and the last tenth of some values, at most ten values each."""
    size = min(LAST_STEPS, max(1, len(values) // 10))
    return fmean(values[:size]), fmean(values[-size:])


def _score(run: Run, arm: str) -> ArmResult | None:
    """One run's result: from scores.json or summary.json, and from the predictions for missing values."""
    answers = list(run.answers.get(arm, {}).values())
    scores = run.scores.get(arm) or part(part(run.summary, "arms"), arm)
    accuracy, counted = number(scores, "accuracy"), number(scores, "n")
    n = len(answers) if counted is None else max(0, int(counted))
    if accuracy is None:
        if not answers:
            return None
        accuracy, n = fmean(a.grade.correct is True for a in answers), len(answers)
    low, high = wilson(min(n, max(0, round(accuracy * n))), n)
    scored_low, scored_high = number(scores, "low"), number(scores, "high")
    return ArmResult(
        arm=arm,
        accuracy=accuracy,
        low=low if scored_low is None else scored_low,
        high=high if scored_high is None else scored_high,
        n=n,
        seeds=(accuracy,),
        tokens=fmean(a.sample.tokens for a in answers) if answers else number(scores, "mean_tokens"),
        truncated=fmean(a.sample.stop is StopReason.LENGTH for a in answers)
        if answers
        else number(scores, "truncated"),
        unscored=sum(not a.grade.scored for a in answers) if answers else None,
        by_family=_accuracy_by(run, arm, scores, "family"),
        by_level=_accuracy_by(run, arm, scores, "level"),
    )


def _accuracy_by(run: Run, arm: str, scores: Row, kind: str) -> dict[str, float]:
    """Accuracy by family or level: from the scores, or else from the predictions."""
    scored = part(scores, f"by_{kind}")
    found = {name: number(part(scored, name), "accuracy") for name in scored}
    if not scored:
        verdicts: dict[str, list[bool]] = {}
        answers = run.answers.get(arm, {})
        for problem in run.problems:
            name = str(problem.metadata.get(kind) or "")
            if name and problem.id in answers:
                verdicts.setdefault(name, []).append(answers[problem.id].grade.correct is True)
        found = {name: fmean(values) for name, values in verdicts.items()}
    return {name: value for name, value in sorted(found.items()) if value is not None}


def _over_seeds(scores: Sequence[ArmResult]) -> ArmResult:
    """The mean of several seeds, with the lowest and highest as its interval."""
    seeds = tuple(s.accuracy for s in scores)
    return replace(
        scores[0],
        accuracy=fmean(seeds),
        low=min(seeds),
        high=max(seeds),
        seeds=seeds,
        tokens=_mean(s.tokens for s in scores),
        truncated=_mean(s.truncated for s in scores),
        unscored=None if all(s.unscored is None for s in scores) else sum(s.unscored or 0 for s in scores),
        by_family=_mean_of([s.by_family for s in scores]),
        by_level=_mean_of([s.by_level for s in scores]),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _mean_of(groups: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for group in groups for name in group)
    return {name: fmean(g[name] for g in groups if name in g) for name in names}


def recipe_values(text: str) -> dict[str, object]:
    """A recipe's values by dotted key, read without the schema: recipes of other versions may not load."""

    def flat(value: object, key: str) -> dict[str, object]:
        if not isinstance(value, dict):
            return {key: value}
        sections = (flat(item, f"{key}.{name}" if key else name) for name, item in value.items())
        return {name: item for section in sections for name, item in section.items()}

    try:
        return flat(parse(text, where="recipe.yaml").value, "") if text else {}
    except RlcsError:
        return {}
