"""Compares two runs: arms with the interval of their difference, recipes, seconds and curves.

Every difference is second minus first. Where both runs answered the same held-out problems they are
compared problem by problem, which detects smaller differences than two separate intervals.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev

from rlcs.evals.intervals import mcnemar, newcombe, paired_interval
from rlcs.recipe.arms import ARMS, RL_ARMS
from rlcs.report import charts, findings
from rlcs.report.findings import ArmResult, Difference
from rlcs.report.load_run import Run, read_text, require_runs
from rlcs.report.pages import templates, write_page
from rlcs.train.health import LAST_STEPS

_METRICS = ("reward", "accuracy", "response_tokens", "kl", "entropy")
_COLOURS = ("grpo", "sft_grpo")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap(Difference):
    """One arm in both runs: second minus first, as shares, with a 95% interval.

    `shared` problems were answered by both (0: the interval is of two independent shares); `p` is McNemar's
    exact test (one seed each).
    """

    first: float
    second: float
    shared: int
    p: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The differences between two runs, as values that JSON can hold."""

    names: tuple[str, str]
    gaps: tuple[Gap, ...]
    recipe: Mapping[str, tuple[object, object]]
    seconds: Mapping[str, tuple[float | None, float | None]]
    ends: Mapping[str, tuple[float | None, float | None]]
    """`stage value` -> the mean of the last steps, in both runs."""


def compare(first: Path, second: Path) -> tuple[Comparison, list[list[Run]]]:
    """Compare two run folders; also returns their runs. Raises RunFolderError for a folder without a run."""
    sides = [require_runs(first), require_runs(second)]
    results = [{r.arm: r for r in findings.arm_results(runs)} for runs in sides]
    seconds = [findings.stage_seconds(runs) for runs in sides]
    values = [
        findings.recipe_values(read_text(path / "recipe.yaml") or runs[0].recipe)
        for path, runs in zip((first, second), sides, strict=True)
    ]
    ends = [_ends(runs) for runs in sides]
    keys = [key for key in values[0] | values[1] if values[0].get(key) != values[1].get(key)]
    return Comparison(
        names=(str(first), str(second)),
        gaps=tuple(
            _gap(results[0][arm], results[1][arm], *sides)
            for arm in ARMS
            if arm in results[0] and arm in results[1]
        ),
        recipe={key: (values[0].get(key), values[1].get(key)) for key in keys},
        seconds={key: (seconds[0].get(key), seconds[1].get(key)) for key in seconds[0] | seconds[1]},
        ends={key: (ends[0].get(key), ends[1].get(key)) for key in ends[0] | ends[1]},
    ), sides


def write_html(path: Path, found: Comparison, sides: Sequence[Sequence[Run]]) -> None:
    """Write the comparison as one page that needs no server."""
    panels = []
    for stage in RL_ARMS:
        for key in dict.fromkeys(("reward", *findings.reward_parts(chain(*sides)), *_METRICS)):
            lines = [
                (colour, [findings.series(run.curves.get(stage, ()), key) for run in runs])
                for colour, runs in zip(_COLOURS, sides, strict=True)
            ]
            if all(any(points for points in curves) for _, curves in lines):
                title = f"{ARMS[stage].stage}: {charts.title_of(key)}"
                panels.append((title, charts.curve_chart(key, title, lines, name=f"{stage}-{key}")))
    template = templates().get_template("compare.html.j2")
    write_page(path, template.render(found=found, panels=panels, colours=_COLOURS))


def _gap(a: ArmResult, b: ArmResult, first: Sequence[Run], second: Sequence[Run]) -> Gap:
    before, after = _shares(first, a.arm), _shares(second, b.arm)
    moves = [after[key] - before[key] for key in before if key in after]
    gained, lost = sum(move > 0 for move in moves), sum(move < 0 for move in moves)
    points = fmean(moves) if moves else b.accuracy - a.accuracy
    single = len(first) == len(second) == 1
    if not moves:
        low, high = newcombe((a.accuracy, a.n), (b.accuracy, b.n))
    elif single:
        low, high = paired_interval(gained, lost, len(moves))
    else:  # each problem's mean over seeds, so that seeds do not count as more problems
        half = 1.96 * stdev(moves) / math.sqrt(len(moves)) if len(moves) > 1 else 1.0
        low, high = points - half, points + half
    return Gap(
        arm=a.arm, first=a.accuracy, second=b.accuracy, points=points, low=low, high=high,
        shared=len(moves), gained=gained, lost=lost, p=mcnemar(gained, lost) if moves and single else None,
    )  # fmt: skip


def _shares(runs: Sequence[Run], arm: str) -> dict[tuple[str, str, str], float]:
    """The share of right seeds of each problem; the same id with another question is another problem."""
    verdicts: dict[tuple[str, str, str], list[bool]] = {}
    for run in runs:
        known = {p.id: (p.id, "\n".join(p.texts), p.answer) for p in run.problems}
        for name, answer in run.answers.get(arm, {}).items():
            verdicts.setdefault(known.get(name, (name, "", "")), []).append(answer.grade.correct is True)
    return {key: fmean(right) for key, right in verdicts.items()}


def _ends(runs: Sequence[Run]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    metrics = (*_METRICS, *findings.reward_parts(runs))
    for run in runs:
        for stage, rows in run.curves.items():
            for key in ("loss",) if stage == "sft" else metrics:
                last = [value for _, value in findings.series(rows[-LAST_STEPS:], key)]
                if last:
                    found.setdefault(f"{ARMS[stage].stage} {key}", []).append(fmean(last))
    return {key: fmean(values) for key, values in found.items()}
