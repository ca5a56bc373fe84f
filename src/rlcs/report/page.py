"""Puts findings, charts and texts into the template and writes the page.

Rollouts are hostile text: the template escapes everything, control and direction-changing
characters are made visible, and the page's own policy forbids scripts and requests altogether.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path

from markupsafe import Markup

from rlcs.errors import RunFolderError
from rlcs.files import atomic_write
from rlcs.report import charts, demonstrations, findings, pictures
from rlcs.report.gather import ARMS, STAGES, Row, Run, number, part, read_object, read_runs, read_text, text

_LONGEST_TEXT = 3000  # characters of one answer that the page shows
_LONGEST_RECIPE = 100_000
_SAMPLES = 16  # answers of the teacher

_CURVES = (
    ("reward", "Reward", False),
    ("accuracy", "Accuracy on training problems", True),
    ("response_tokens", "Response length, tokens", False),
    ("entropy", "Entropy, nats a token", False),
    ("kl", "KL from the reference", False),
    ("clip_fraction", "Clipped tokens", True),
    ("loss", "Policy loss", False),
    ("grad_norm", "Gradient norm", False),
    ("sampler_gap", "Gap between sampler and policy", False),
)
_SFT_CURVES = (("loss", "SFT loss, nats a token", False), ("grad_norm", "SFT gradient norm", False))


def build(run: Path) -> Path:
    """Write `run`/report/index.html from whatever the run folder holds; return its path.

    A folder with `seed-*` run folders gives the page over all seeds. Raises RunFolderError when
    there is nothing at all to report.
    """
    runs = read_runs(run)
    summary = read_object(run / "summary.json") or runs[0].summary
    if not summary and not any(r.curves or r.answers or r.scores or r.recipe or r.cold_start for r in runs):
        raise RunFolderError(
            "no run to report", where=str(run), fix="give the folder of a run: the one with recipe.yaml in it"
        )
    gallery = number(part(part(summary, "recipe"), "report"), "gallery")
    page = render(run, runs, summary, gallery=48 if gallery is None else max(0, int(gallery)))
    path = run / "report" / "index.html"
    # A lone half of a surrogate pair is valid in JSON and nowhere else.
    atomic_write(path, page.encode("utf-8", "replace"))
    return path


def render(folder: Path, runs: Sequence[Run], summary: Row, *, gallery: int) -> str:
    """The whole page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rlcs", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=_percent, points=_points, duration=_duration, fold=_fold, digits=_digits, stage=_stage
    )
    environment.globals.update(arms=ARMS, stages=STAGES, paint=charts.LINE_COLOURS)
    results = findings.arm_results(runs)
    first, rest = findings.headline(results) if results else findings.training_headline(runs)
    health = findings.health(runs)
    return environment.get_template("page.html.j2").render(
        name=text(summary, "name") or folder.resolve().name,
        first=first,
        rest=rest,
        results=results,
        arms_chart=charts.arms_chart(results) if results else "",
        differences=findings.differences(runs),
        seeds=[r.folder.name.removeprefix("seed-") for r in runs] if len(runs) > 1 else [],
        families=list(dict.fromkeys(name for r in results for name in r.by_family)),
        levels=list(dict.fromkeys(name for r in results for name in r.by_level)),
        curves=_curves(runs, _CURVES, ("grpo", "rl_only")),
        rl_stages=[stage for stage in ("grpo", "rl_only") if any(stage in run.curves for run in runs)],
        sft_curves=_curves(runs, _SFT_CURVES, ("sft",)),
        phases=_phases(runs[0]),
        health=health,
        health_stages=list(dict.fromkeys(stage for row in health for stage in row.stages)),
        skipped=findings.skipped_steps(runs),
        cold_start=_plain(runs[0].cold_start),
        samples=demonstrations.samples(runs[0].folder / "cold_start", min(gallery, _SAMPLES)),
        histograms=demonstrations.histograms(runs[0].folder / "cold_start", runs[0].cold_start),
        gallery=_gallery(runs[0], gallery),
        rollouts=[
            (stage, step, findings.late_rollouts(attempts))
            for stage, (step, attempts) in runs[0].rollouts.items()
        ],
        seconds=findings.stage_seconds(runs),
        recipe=(read_text(folder / "recipe.yaml") or runs[0].recipe or _pretty(part(summary, "recipe")))[
            :_LONGEST_RECIPE
        ],
        command=_command(summary),
        versions=_plain(part(summary, "versions")),
    )


_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def visible(value: object) -> object:
    """A text with its control, direction-changing and broken characters spelled out: seen, and harmless."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _INVISIBLE.sub(lambda found: f"\\u{ord(found.group(0)):04x}", value)


def _curves(
    runs: Sequence[Run], wanted: Sequence[tuple[str, str, bool]], stages: Sequence[str]
) -> list[tuple[str, Markup]]:
    """(title, chart) of every wanted curve that has values other than zero."""
    found = []
    for key, title, percent in wanted:
        lines = [
            (charts.LINE_COLOURS[stage], [findings.series(run.curves.get(stage, ()), key) for run in runs])
            for stage in stages
        ]
        values = [value for _, curves in lines for points in curves for _, value in points]
        if not any(values):
            continue
        ends = [
            f"{STAGES[stage]} from {curves[0][0][1]:.3g} to {curves[0][-1][1]:.3g}"
            for stage, (_, curves) in zip(stages, lines, strict=True)
            if curves[0]
        ]
        told = f"Line chart over training steps. {title}: {', '.join(ends)}"
        found.append((title, charts.curve_chart(f"{stages[0]}-{key}", told, lines, percent=percent)))
    return found


def _phases(run: Run) -> list[tuple[str, Markup, list[tuple[str, str, float]]]]:
    """(stage, chart, (phase, colour, seconds in all)) of every training stage."""
    colours: dict[str, int] = {}
    found = []
    for stage, rows in run.curves.items():
        layers = {name: points for name, points in findings.phases(rows).items() if any(v for _, v in points)}
        if not layers:
            continue
        # One colour a phase on the whole page: known phases come first, in the order they are met.
        names = sorted(layers, key=lambda name: colours.setdefault(name, len(colours)))
        totals = [(n, charts.phase_colour(colours[n]), sum(v for _, v in layers[n])) for n in names]
        told = f"Seconds a step of {STAGES[stage]}: " + ", ".join(
            f"{n} {s:.0f} s in all" for n, _, s in totals
        )
        paints = [(colour, layers[name]) for name, colour, _ in totals]
        found.append((stage, charts.phases_chart(f"phases-{stage}", told, paints), totals))
    return found


def _gallery(run: Run, count: int) -> list[dict[str, object]]:
    """Sections of cards: problem, images, and every arm's answer."""
    sections = findings.gallery(run, count)
    shown = [problem for section in sections for problem in section.problems]
    share = pictures.TOTAL_BYTES // max(1, sum(len(p.images[:4]) for p in shown))
    found: list[dict[str, object]] = []
    for section in sections:
        cards = []
        for problem in section.problems:
            images = pictures.embed(run.folder / "eval", problem.images[:4], most_bytes=share)
            said = [
                (arm, answers[problem.id]) for arm, answers in run.answers.items() if problem.id in answers
            ]
            cards.append(
                {"problem": problem, "images": images, "missing": problem.images and not images, "said": said}
            )
        found.append({"kind": section.kind, "total": section.total, "cards": cards})
    return found


def _stage(name: str) -> str:
    """A key of the summary's seconds for people."""
    if name.startswith("eval_"):
        return f"Measuring: {ARMS.get(name.removeprefix('eval_'), name)}"
    return STAGES.get(name) or name.replace("_", " ").capitalize()


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _fold(value: str, most: int = _LONGEST_TEXT) -> str:
    """A text with its middle left out when it is too long: the answer stands at the end."""
    left_out = len(value) - most
    if left_out <= 0:
        return value
    return f"{value[: most * 2 // 3]}\n[… {left_out:,} characters left out …]\n{value[-(most // 3) :]}"


def _plain(row: Row) -> list[tuple[str, str]]:
    """The single values of an object, for a list of names and values."""
    return [
        (name.replace("_", " "), str(value) if isinstance(value, str) else _digits(value))
        for name, value in row.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool)
    ]


def _pretty(recipe: Mapping[str, object]) -> str:
    return dumps(recipe, indent=2, ensure_ascii=False) if recipe else ""


def _command(summary: Row) -> str:
    command = summary.get("command")
    return (
        shlex.join(str(word) for word in command) if isinstance(command, list) else text(summary, "command")
    )
