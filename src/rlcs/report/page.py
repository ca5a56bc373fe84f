"""Draws the report of a run: fills the template with findings, charts and texts."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from json import dumps
from pathlib import Path

from markupsafe import Markup

from rlcs.errors import RunFolderError
from rlcs.recipe.arms import ARMS, RL_ARMS
from rlcs.recipe.schema import Report
from rlcs.report import charts, coldstart, demonstrations, findings, pictures, rollouts
from rlcs.report.blind import blind_control, fault_counts
from rlcs.report.conclusions import Conclusions, conclude, effect
from rlcs.report.differences import differences
from rlcs.report.handover import MEASURES, handovers
from rlcs.report.load_run import Row, Run, kept_images, number, part, read_object, read_runs, read_text, text
from rlcs.report.pages import digits, duration, templates, write_page
from rlcs.report.stages import Progress, ending, progress
from rlcs.report.validation import ValidationCurve, validation_curves

_LONGEST_RECIPE = 100_000
_SAMPLES = 16  # answers of the teacher


def build(run: Path) -> Path:
    """Write `run`/report/index.html, and rollouts.html where there are any; return the first one's path.

    Of a folder with `seed-*` run folders the page is over all seeds; of a study of the cold start it is that
    of the study. Raises RunFolderError where there is nothing to report.
    """
    if coldstart.is_study(run):
        coldstart.build(run)
        return run / "report" / "index.html"
    runs = read_runs(run)
    summary = read_object(run / "summary.json") or runs[0].summary
    if not summary and not any(r.curves or r.answers or r.scores or r.recipe or r.cold_start for r in runs):
        raise RunFolderError(
            "no run to report", where=str(run), fix="give the folder of a run: the one with recipe.yaml in it"
        )
    path = run / "report" / "index.html"
    write_page(path, render(run, runs, summary))
    rollouts.write_sample(run, runs, text(summary, "name") or run.resolve().name)
    return path


def render(folder: Path, runs: Sequence[Run], summary: Row, *, stamp: str = "") -> str:
    """The whole page as text. With a `stamp` it is live: it shows progress, and a script refreshes it."""
    wanted = number(part(part(summary, "recipe"), "report"), "gallery")
    gallery = Report().gallery if wanted is None else max(0, int(wanted))
    now = [(run.folder.name, progress(run), ending(run)) for run in runs] if stamp else []
    conclusions, at = conclude(runs), _at(now)
    if at is not None:
        conclusions = _while_running(conclusions, at)
    results, health, cold_start = findings.arm_results(runs), findings.health(runs), runs[0].cold_start
    validated = validation_curves(runs)
    counters, zeros = demonstrations.counters(cold_start)
    template = templates().get_template("page.html.j2")
    return template.render(
        live=stamp,
        now=now,
        at=at,
        name=text(summary, "name") or folder.resolve().name,
        headline=conclusions.headline,
        lead=conclusions.lead,
        notes=conclusions.notes,
        results=results,
        blind=blind_control(runs),
        faults=fault_counts(runs),
        arms_chart=charts.arms_chart(results) if results else "",
        gaps=[(gap, effect(gap)) for gap in differences(runs)],
        seeds=[r.folder.name.removeprefix("seed-") for r in runs] if len(runs) > 1 else [],
        families=list(dict.fromkeys(name for r in results for name in r.by_family)),
        levels=list(dict.fromkeys(name for r in results for name in r.by_level)),
        curves=_rl_curves(runs, validated),
        rl_stages=[stage for stage in RL_ARMS if any(stage in run.curves for run in runs)],
        sft_curves=[
            *_validation_charts(validated, ("sft",)),
            *_measures(runs),
            *_curves(runs, ("loss", "grad_norm"), ("sft",)),
        ],
        handovers=handovers(runs),
        measures={"accuracy": "pass@1", "pass_at_k": "pass@k", **MEASURES},
        validated="k" if any(p.pass_at_k for c in validated for p in c.points) else bool(validated),
        phases=_phases(runs[0]),
        health=health,
        health_stages=list(dict.fromkeys(stage for row in health for stage in row.stages)),
        skipped=findings.skipped_steps(runs),
        cold_start=counters,
        zeros=zeros,
        samples=demonstrations.samples(runs[0].folder / "cold_start", min(gallery, _SAMPLES)),
        histograms=demonstrations.histograms(runs[0].folder / "cold_start", cold_start),
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


def _at(now: Sequence[tuple[str, Sequence[Progress], str]]) -> Progress | None:
    """The stage in which a run is: the last one that began and is not done; None when all are done."""
    left = [row for _, rows, _ in now for row in rows if row.state != "done"]
    begun = [row for row in left if row.state == "begun"]
    return begun[-1] if begun else next(iter(left), None)


def _while_running(conclusions: Conclusions, at: Progress) -> Conclusions:
    """The head of the live page of an unfinished run: the stage and the time left, then what is known."""
    unit = "step " if at.total and not at.key.startswith("eval_") else ""
    left = "" if at.left_s is None else f", about {duration(at.left_s)} left"
    return Conclusions(
        headline=f"{at.name}: {unit}{at.place}{left}",
        lead=f"{conclusions.headline}.",
        notes=tuple(note for note in conclusions.notes if note.serious),
    )


def _rl_curves(runs: Sequence[Run], validated: Sequence[ValidationCurve]) -> list[tuple[str, Markup]]:
    """The charts of RL: reward, accuracy and length, what was measured meanwhile, and the other metrics."""
    first = dict.fromkeys(("reward", *findings.reward_parts(runs), "accuracy", "response_tokens"))
    rest = [key for key in charts.METRICS if key not in first]
    return [
        *_curves(runs, first, RL_ARMS),
        *_validation_charts(validated, RL_ARMS),
        *_curves(runs, rest, RL_ARMS),
    ]


def _validation_charts(
    validated: Sequence[ValidationCurve], stages: Sequence[str]
) -> list[tuple[str, Markup]]:
    found = []
    for curve in validated:
        if curve.stage in stages:
            k = next((f"; dashed: pass@{p.samples}" for p in curve.points if p.pass_at_k is not None), "")
            title = f"Validation accuracy, {ARMS[curve.stage].stage}{k}"
            found.append((title, charts.validation_chart(curve)))
    return found


def _measures(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """The (title, chart) of what else was measured of the models of SFT, as far as it was."""
    found = []
    for key, title in MEASURES.items():
        curves = [findings.series(run.validation.get("sft", ()), key) for run in runs]
        if len(first := curves[0]) > 1:
            about = f"Line chart over steps of SFT. {title}: from {first[0][1]:.3g} to {first[-1][1]:.3g}"
            chart = charts.curve_chart(key, about, [("sft", curves)], name=f"measured-{key}")
            found.append((f"Validation: {title[0].lower()}{title[1:]}", chart))
    return found


def _curves(runs: Sequence[Run], keys: Iterable[str], stages: Sequence[str]) -> list[tuple[str, Markup]]:
    """The (title, chart) of every metric that has values other than zero, and of every part of the reward."""
    found = []
    for key in keys:
        lines = [(s, [findings.series(run.curves.get(s, ()), key) for run in runs]) for s in stages]
        values = [value for _, curves in lines for points in curves for _, value in points]
        if any(values) or (values and key.startswith(findings.PART)):
            title = charts.title_of(key)
            ends = [
                f"{ARMS[stage].stage} from {curves[0][0][1]:.3g} to {curves[0][-1][1]:.3g}"
                for stage, curves in lines
                if curves[0]
            ]
            about = f"Line chart over training steps. {title}: {', '.join(ends)}"
            found.append((title, charts.curve_chart(key, about, lines, name=f"{stages[0]}-{key}")))
    return found


def _phases(run: Run) -> list[tuple[str, Markup, list[tuple[str, str, float]]]]:
    """The stage, the chart, and each phase's (name, colour, total seconds) of every training stage."""
    colours: dict[str, int] = {}
    found = []
    for stage, rows in run.curves.items():
        layers = {name: points for name, points in findings.phases(rows).items() if any(v for _, v in points)}
        if not layers:
            continue
        # A phase has the same colour in all charts of the page.
        names = sorted(layers, key=lambda name: colours.setdefault(name, len(colours)))
        totals = [(n, charts.phase_colour(colours[n]), sum(v for _, v in layers[n])) for n in names]
        sums = ", ".join(f"{n} {s:.0f} s in all" for n, _, s in totals)
        about = f"Seconds a step of {ARMS[stage].stage}: {sums}"
        paints = [(colour, layers[name]) for name, colour, _ in totals]
        found.append((stage, charts.phases_chart(f"phases-{stage}", about, paints), totals))
    return found


def _gallery(run: Run, count: int) -> list[dict[str, object]]:
    """Sections of cards: problem, images, and every arm's answer."""
    sections = findings.gallery(run, count)
    shown = [problem for section in sections for problem in section.problems]
    share = pictures.TOTAL_BYTES // max(1, sum(len(kept_images(p)[:4]) for p in shown))
    found: list[dict[str, object]] = []
    for section in sections:
        cards = []
        for problem in section.problems:
            names = kept_images(problem)[:4]
            images = pictures.embed(run.folder / "eval", names, most_bytes=share)
            answers = [
                (ARMS[arm].label, arm, rows[problem.id])
                for arm, rows in run.answers.items()
                if problem.id in rows
            ]
            missing = bool(names) and not images
            cards.append({"problem": problem, "images": images, "missing": missing, "answers": answers})
        found.append({"kind": section.kind, "total": section.total, "cards": cards})
    return found


def _plain(row: Row) -> list[tuple[str, str]]:
    """The (name, value) of an object's texts and numbers, as texts."""
    return [
        (name.replace("_", " "), str(value) if isinstance(value, str) else digits(value))
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
