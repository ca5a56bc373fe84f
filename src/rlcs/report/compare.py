"""Compares two runs: arms with the interval of their difference, recipes, seconds and curves.

Every difference is second minus first. Where both runs answered the same held-out problems they are
compared problem by problem, which detects smaller differences than two separate intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean

from rlcs.recipe.arms import ARMS, MAIN_FIRST, RL_ARMS
from rlcs.report import charts, findings, pictures
from rlcs.report.differences import Difference, difference
from rlcs.report.load_run import Row, Run, kept_images, read_text, require_runs
from rlcs.report.pages import points as points_of
from rlcs.report.pages import templates, write_page
from rlcs.train.health import LAST_STEPS

_METRICS = ("reward", "accuracy", "response_tokens", "kl", "entropy")
_COLOURS = ("grpo", "sft_grpo")
_CARDS = 12
"""Problems shown of those that one run alone answers right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The differences between two runs, as values that JSON can hold."""

    names: tuple[str, str]
    headline: str
    lead: str
    gaps: tuple[Difference, ...]
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
    gaps = {
        arm: difference((sides[0], results[0][arm]), (sides[1], results[1][arm]))
        for arm in ARMS
        if arm in results[0] and arm in results[1]
    }
    headline, lead = _headline(next((gaps[arm] for arm in MAIN_FIRST if arm in gaps), None))
    return Comparison(
        names=(str(first), str(second)),
        headline=headline,
        lead=lead,
        gaps=tuple(gaps.values()),
        recipe={key: (values[0].get(key), values[1].get(key)) for key in keys},
        seconds={key: (seconds[0].get(key), seconds[1].get(key)) for key in seconds[0] | seconds[1]},
        ends={key: (ends[0].get(key), ends[1].get(key)) for key in ends[0] | ends[1]},
    ), sides


def _headline(gap: Difference | None) -> tuple[str, str]:
    """What the main arm's difference says, and what it rests on."""
    if gap is None:
        return (
            "Nothing to compare yet",
            "No model of one run has a counterpart in the other that was measured too.",
        )
    name, shares = ARMS[gap.arm].label, f"{gap.first:.1%} in A, {gap.second:.1%} in B"
    rest = f"{name}: {shares}. The 95% interval of the difference is {points_of(gap.low)} to "
    rest += f"{points_of(gap.high)} points"
    if gap.shared:
        rest += f", problem by problem: {gap.gained:,} are right in B alone, {gap.lost:,} in A alone."
    else:
        rest += ", that of two independent shares: the runs have no held-out problem in common."
    where = f"the same {gap.shared:,} problems" if gap.shared else "other problems"
    if not gap.clear:
        return f"No measurable difference on {where}", rest
    more = "more" if gap.points > 0 else "fewer"
    size = f"{100 * abs(gap.points):.1f} points"
    return f"B answers {size} {more} right than A on {where}", rest


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
                title = f"{ARMS[stage].stage}: {charts.title_of(key)[:1].lower()}{charts.title_of(key)[1:]}"
                panels.append((title, charts.curve_chart(key, title, lines, name=f"{stage}-{key}")))
    template = templates().get_template("compare.html.j2")
    write_page(
        path, template.render(found=found, panels=panels, colours=_COLOURS, gallery=_gallery(found, sides))
    )


def _gallery(found: Comparison, sides: Sequence[Sequence[Run]]) -> list[tuple[str, int, list[Row]]]:
    """Problems that one run alone answers right, with both answers: the title, how many there are, some."""
    gap = next((gap for arm in MAIN_FIRST for gap in found.gaps if gap.arm == arm and gap.shared), None)
    if gap is None:
        return []
    first, second = (runs[0] for runs in sides)
    before, after = first.answers.get(gap.arm, {}), second.answers.get(gap.arm, {})
    digests = {problem.id: problem.digest for problem in second.problems}
    sections: dict[str, list[Row]] = {"Right in B alone": [], "Right in A alone": []}
    for problem in sorted(first.problems, key=lambda p: (not kept_images(p), findings.shuffled(p))):
        if problem.id in before and problem.id in after and digests.get(problem.id) == problem.digest:
            verdicts = [answers[problem.id].grade.correct is True for answers in (before, after)]
            if verdicts[0] != verdicts[1]:
                answers = zip(("A", "B"), _COLOURS, (before[problem.id], after[problem.id]), strict=True)
                card = {"problem": problem, "answers": list(answers), "missing": False, "images": []}
                sections["Right in B alone" if verdicts[1] else "Right in A alone"].append(card)
    shown = [(title, len(cards), cards[:_CARDS]) for title, cards in sections.items() if cards]
    return [(title, total, [_pictured(card, first) for card in cards]) for title, total, cards in shown]


def _pictured(card: Row, run: Run) -> Row:
    names = kept_images(card["problem"])[:4]  # type: ignore[arg-type]
    share = pictures.TOTAL_BYTES // (2 * _CARDS)
    return {**card, "images": pictures.embed(run.folder / "eval", names, most_bytes=share)}


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
