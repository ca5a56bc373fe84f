"""The page and the result file of a study of the cold start (see `coldstart_results`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlcs.report import charts
from rlcs.report.coldstart_conclusions import best_of_each, conclude
from rlcs.report.coldstart_results import GRID, Result, Results, read
from rlcs.report.load_run import read_text
from rlcs.report.pages import points, templates, write_page
from rlcs.storage import write_json

RESULT = "coldstart.json"


def is_study(folder: Path) -> bool:
    """Whether a folder is a study of the cold start."""
    return (folder / GRID).is_file()


def build(folder: Path) -> dict[str, Any]:
    """Write a study's coldstart.json and report/index.html; returns the content of the first."""
    study = read(folder)
    found = as_json(study)
    write_json(folder / RESULT, found)
    write_page(folder / "report" / "index.html", render(study))
    return found


def as_json(study: Results) -> dict[str, Any]:
    """The figures and the sentences of a study, as values that JSON can hold."""
    conclusions = conclude(study)
    results = [*([study.none] if study.none else []), *study.cold]
    return {
        "name": study.facts.get("name"),
        "headline": conclusions.headline,
        "lead": conclusions.lead,
        "notes": [note.text for note in conclusions.notes],
        "cells": study.cells,
        "over": study.over,
        "rl_steps": study.facts.get("rl_steps"),
        "results": [_row(study, result) for result in results],
        "command": study.facts.get("command"),
        "versions": study.facts.get("versions"),
    }


def _row(study: Results, result: Result) -> dict[str, Any]:
    gap, (low, high) = study.against_none(result), result.interval
    return {
        "chain": result.chain,
        "demonstrations": result.demonstrations,
        "epochs": result.epochs,
        "sft_steps": result.steps,
        "before_rl": result.before,
        "accuracy": result.after,
        "low": low,
        "high": high,
        "by_seed": dict(zip(map(str, result.cells), result.by_seed, strict=True)),
        "against_none": None
        if gap is None
        else {
            "points": gap.points,
            "low": gap.low,
            "high": gap.high,
            "by_seed": list(gap.by_seed),
            "clear": gap.clear,
        },
        "ended": {str(seed): cell.how for seed, cell in result.cells.items()},
        "sft_seconds": round(result.sft_s, 1),
        "rl_seconds": round(result.rl_s, 1),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The result for a screen: what it says, and a table."""
    table = [
        f"  {'':<13}{'demos':>7}{'SFT steps':>11}{'before RL':>11}{'after RL':>10}   against none, points"
    ]
    for row in found["results"]:
        gap = row["against_none"]
        text = f"{points(gap['points']):>6} [{points(gap['low'])}, {points(gap['high'])}]" if gap else ""
        ended = [how for how in row["ended"].values() if how != "finished"]
        text += f"  {', '.join(sorted(set(ended)))}" if ended else ""
        table.append(
            f"  {row['chain']:<13}{row['demonstrations']:>7,}{row['sft_steps']:>11,}{row['before_rl']:>11.1%}"
            f"{row['accuracy']:>10.1%}   {text}".rstrip()
        )
    return [found["headline"], found["lead"], "", *table, "", *(f"- {note}" for note in found["notes"])]


def outcome(study: Results, name: str) -> str:
    """How one cell ended, in words."""
    for result in (*([study.none] if study.none else []), *study.cold):
        for seed, cell in result.cells.items():
            if cell.name == name:
                before, after = (100 * sum(x.values()) / len(x) for x in (cell.before, cell.after))
                ended = "" if cell.how == "finished" else f" ({cell.how})"
                kind = f"{result.kind}, " if study.none is not result else ""
                return f"{kind}{result.title}, seed {seed}: {before:.1f}% -> {after:.1f}%{ended}"
    return name


def render(study: Results) -> str:
    """The whole page as text."""
    chains = list(dict.fromkeys(result.chain for result in study.cold))
    colours = {chain: charts.phase_colour(index) for index, chain in enumerate(chains)}
    shown = []
    if study.none is not None and study.cold:
        shown = [_by_number(study, colours), _by_steps(study, colours)]
    results = [*([study.none] if study.none else []), *study.cold]
    template = templates().get_template("coldstart.html.j2")
    return template.render(
        study=study,
        facts=study.facts,
        conclusions=conclude(study),
        results=results,
        gaps=[study.against_none(result) for result in results],
        colours=colours,
        kinds={result.chain: result.kind for result in study.cold},
        charts=shown,
        recipe=read_text(study.folder / "recipe.yaml"),
    )


def _by_number(study: Results, colours: Mapping[str, str]) -> tuple[str, Markup]:
    """Accuracy over the number of demonstrations: the best length of each joined, other lengths as dots."""
    series = []
    for chain, colour in colours.items():
        own = [result for result in study.cold if result.chain == chain]
        best = best_of_each(own)
        others = [_mark(r, r.demonstrations) for r in own if r not in best]
        series.append(charts.Series(colour=colour, marks=others, faint=True))
        series.append(charts.Series(colour=colour, marks=[_mark(r, r.demonstrations) for r in best]))
    title = "Accuracy after RL, over the number of demonstrations"
    return title, _chart(study, series, unit="demonstrations", name="by-number", title=title)


def _by_steps(study: Results, colours: Mapping[str, str]) -> tuple[str, Markup]:
    """Accuracy over the steps of SFT: a line for each kind and number of demonstrations."""
    lines: dict[tuple[str, int], list[Result]] = {}
    for result in study.cold:
        lines.setdefault((result.chain, result.demonstrations), []).append(result)
    series = [
        charts.Series(colour=colours[chain], marks=[_mark(r, r.steps) for r in line], label=f"{count:,}")
        for (chain, count), line in lines.items()
    ]
    title = "Accuracy after RL, over the steps of SFT"
    return title, _chart(
        study,
        series,
        unit="steps of SFT, a line for each number of demonstrations",
        name="by-steps",
        title=title,
    )


def _mark(result: Result, x: float) -> charts.Mark:
    low, high = result.interval
    seeds = result.by_seed if len(result.by_seed) > 1 else ()
    return charts.Mark(x=x, y=result.after, low=low, high=high, seeds=seeds, hollow=result.stopped > 0)


def _chart(study: Results, series: Sequence[charts.Series], *, unit: str, name: str, title: str) -> Markup:
    assert study.none is not None, "its band is drawn"
    ends = [f"{r.kind}, {r.title}: {r.after:.1%}" for r in study.cold]
    about = f"Line chart. {title}. No cold start: {study.none.after:.1%}. {'; '.join(ends)}"
    return charts.levels_chart(series, _mark(study.none, 1), unit=unit, name=name, about=about)
