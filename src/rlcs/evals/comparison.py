"""Compares all models measured in a folder in one table, with chance level and the paper's numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlcs.errors import UserError
from rlcs.evals.benchmarks import list_benchmarks
from rlcs.evals.blind import Shares, split_gains
from rlcs.evals.scores import mean
from rlcs.storage import atomic_write, read_json, read_jsonl, write_json

FOUR = ("mathvision", "mathverse", "mathvista", "wemath")
"""The benchmarks of the paper, in its order."""
REPORTED: dict[str, tuple[float, float, float, float]] = {
    "Qwen2.5-VL-3B": (19.47, 33.58, 56.30, 50.63),
    "the paper, 3B (SFT, then RL)": (27.0, 44.0, 68.2, 64.1),
    "Qwen2.5-VL-7B": (24.87, 43.83, 66.30, 62.87),
    "the paper, 7B (SFT, then RL)": (30.3, 48.6, 73.4, 70.4),
}
"""Percent, in the order of `FOUR`: arXiv 2505.22334, figure 1; the base models as the same authors print
them in arXiv 2505.22453, table 1. A language model judged the answers there; We-Math is plain accuracy."""

Column = tuple[str, str]


def write_comparison(out: Path, *, first: Sequence[str]) -> dict[str, Any]:
    """Compare the benchmark scores in `out`; write comparison.json and comparison.md, and return the former.

    The models in `first` (those that were evaluated just now) head the table, in this order, and only their
    failed answers are counted. Raises UserError if there are no scores.
    """
    order = {label: number for number, label in enumerate(first)}
    paths = [*out.glob("*/*/scores.json"), *out.glob("*/*/blind/scores.json")]
    # A run folder also has eval/ARM/scores.json, on held-out problems instead of a benchmark.
    found = {path: scores for path in sorted(paths) if "benchmark" in (scores := read_json(path))}
    measured = sorted(
        found.values(), key=lambda s: (order.get(s["label"], len(order)), s["label"], s["blind"] != "none")
    )
    if not measured:
        raise UserError("there are no scores", where=str(out), fix="run `rlcs eval` first")
    comparison = compare(measured)
    comparison["blind"] = blind = _blind_splits(found, sorted(order, key=order.__getitem__))
    comparison["notes"] += [note for split in blind.values() for note in blind_notes(split)]
    comparison["failed"] = sum(scores["failed"]["count"] for scores in measured if scores["label"] in order)
    write_json(out / "comparison.json", comparison)
    atomic_write(out / "comparison.md", as_markdown(comparison))
    return comparison


def _blind_splits(found: Mapping[Path, Mapping[str, Any]], first: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The split of each benchmark that models answered with and without images; `first` head the models."""
    shares: dict[str, tuple[dict[str, Shares], dict[str, Shares]]] = {}
    facts: dict[str, Mapping[str, Any]] = {}
    for path, scores in found.items():
        key = "/".join((scores["benchmark"], scores["split"]))
        is_blind = scores["blind"] != "none"
        of_benchmark = shares.setdefault(key, ({}, {}))
        of_benchmark[is_blind][scores["label"]] = _shares(path.with_name("predictions.jsonl"))
        facts[key] = scores if is_blind else facts.get(key, scores)
    splits = {}
    for key, (seeing, blind) in shares.items():
        both = [label for label in dict.fromkeys([*first, *sorted(seeing)]) if label in seeing.keys() & blind]
        if both:
            pairs = [(label, both[0]) for label in both[1:]]
            ordered = {label: seeing[label] for label in both}
            split = split_gains(ordered, blind, pairs=pairs, chance=facts[key]["chance"])
            splits[key] = {"title": facts[key]["title"], **split}
    return splits


def _shares(path: Path) -> dict[str, float]:
    """The share of each question's answers that are right, by the official rule where there is one."""
    verdicts: dict[str, list[bool]] = {}
    for row in read_jsonl(path):
        rules = row.get("rules") or {}
        grade = rules.get("official") or rules.get("rlcs") or {}
        verdicts.setdefault(row["id"], []).append(grade.get("correct") is True)
    return {name: mean(right) for name, right in verdicts.items()}


def blind_notes(split: Mapping[str, Any]) -> list[str]:
    """Sentences about what models answer without the image, and what their gains rest on."""
    where, needs, rest = split["title"], split["n"] - split["without_need"], split["without_need"]
    notes = [
        f"{where}, {name}: {_share(each['blind'])} right without the image, {_share(each['seeing'])} with it "
        f"(chance {100 * split['chance']:.1f}); of {needs:,} questions that no model answers without it "
        f"{_share(each['needs_image'])}"
        for name, each in split["arms"].items()
    ]
    return notes + [
        f"{where}, {gain['arm']} over {gain['against']}: {_points(gain['needs_image'])} points on {needs:,} "
        f"questions that need the image, {_points(gain['without_need'])} on the other {rest:,}"
        for gain in split["gains"]
    ]


def _share(cell: Mapping[str, float]) -> str:
    return f"{100 * cell['accuracy']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"


def _points(gap: Mapping[str, float]) -> str:
    return f"{100 * gap['points']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"


def compare(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make rows by model and rule, columns by benchmark and split, the paper's numbers, and notes."""
    known = list_benchmarks()
    order = {name: number for number, name in enumerate((*FOUR, *known))}
    columns = sorted({(s["benchmark"], s["split"]) for s in measured}, key=lambda c: (order.get(c[0], 99), c))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for scores in measured:
        for rule, each in scores["rules"].items():
            cell = {key: each[key] for key in ("accuracy", "low", "high")}
            cell |= {key: scores[key] for key in ("n", "of", "chance", "prompt")}
            cell |= {"samples": scores["sampling"]["samples"], "pass_at": each.get("pass_at", {})}
            if "metrics" in each:
                cell["metrics"] = each["metrics"]
            row = rows.setdefault((_name(scores), rule), {"cells": {}})
            row["cells"]["/".join((scores["benchmark"], scores["split"]))] = cell
    titles = {s["benchmark"]: s["title"] for s in measured}
    return {
        "columns": [{"benchmark": b, "split": s, "title": f"{titles[b]} {s}"} for b, s in columns],
        "rows": [{"model": model, "rule": rule, **row} for (model, rule), row in rows.items()],
        "reported": {name: dict(zip(FOUR, each, strict=True)) for name, each in REPORTED.items()},
        "notes": [*_settings(measured), *(note for scores in measured for note in _notes(scores))],
    }


def _name(scores: Mapping[str, Any]) -> str:
    """The model, and what it saw instead of the image."""
    return (
        str(scores["label"])
        + {"none": "", "other": ", another image", "removed": ", no image"}[scores["blind"]]
    )


def _settings(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """State the prompt and the sampling settings, in one line if all answers share them."""
    lines: dict[str, list[str]] = {}
    for scores in measured:
        sampling = scores["sampling"]
        count = f"{sampling['samples']} samples" if sampling["samples"] > 1 else "1 answer"
        text = f"prompt `{scores['prompt']}`, {count}, temperature {sampling['temperature']:g}, "
        text += f"at most {sampling['max_new_tokens']:,} tokens"
        lines.setdefault(text, []).append(f"{_name(scores)}, {scores['title']}")
    return [text if len(lines) == 1 else f"{'; '.join(where)}: {text}" for text, where in lines.items()]


def _notes(scores: Mapping[str, Any]) -> list[str]:
    """Notes below the table: questions left out, failed, refused or answered through the extractor."""
    where = f"{_name(scores)}, {scores['title']}"
    missing, failed, refused = (scores[key]["count"] for key in ("missing_images", "failed", "refused"))
    notes = []
    if scores["n"] < scores["of"]:
        notes.append(f"{where}: {scores['n']:,} of {scores['of']:,} questions")
    if missing:
        notes.append(f"{where}: {missing:,} questions have no usable image and are left out")
    if failed:
        notes.append(f"{where}: {failed:,} answers failed; the same command asks for them again")
    if refused:
        notes.append(f"{where}: {refused:,} prompts were too long or unreadable and count as wrong")
    if judge := scores.get("judge"):
        notes.append(
            f"{where}: {judge['model']} read {judge['read']:,} answers without a box of {judge['asked']:,} "
            f"(rule rlcs+judge); it failed on {judge['failed']:,}"
        )
    for rule, each in scores["rules"].items():
        if each["without_answer"]:
            notes.append(f"{where}: {each['without_answer']:,} responses give no answer that {rule} reads")
        for k, share in each.get("pass_at", {}).items():
            notes.append(f"{where}: pass@{k} {100 * share:.1f} ({rule})")
        shown = {n: v for n, v in each.get("metrics", {}).items() if v is not None and n.endswith("_score")}
        if shown:
            text = ", ".join(f"{name.replace('_', ' ')} {100 * v:.1f}" for name, v in shown.items())
            notes.append(f"{where}: {text} ({rule}); more in scores.json")
    return notes


def as_markdown(comparison: Mapping[str, Any]) -> str:
    """Format an aligned table of percentages with 95% Wilson intervals, and the notes below it."""
    columns = comparison["columns"]
    four = {c["benchmark"] for c in columns if c["split"] == _paper_split(c["benchmark"])}.issuperset(FOUR)
    head = ["model", "rule", *(c["title"] for c in columns), *(["mean of the four"] if four else [])]
    lines = [_measured(row, columns, four) for row in comparison["rows"]]
    chance = {key: cell["chance"] for row in comparison["rows"] for key, cell in row["cells"].items()}
    cells = [f"{100 * chance[_key(c)]:.1f}" for c in columns]
    lines.append(["chance", "", *cells, *([""] if four else [])])
    for name, reported in comparison["reported"].items():
        cells = [_reported(reported, c) for c in columns]
        mean = sum(reported.values()) / len(reported)
        lines.append([name, "as reported", *cells, *([f"{mean:.1f}"] if four else [])])
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    table = [_line(head, widths), _line(["-" * width for width in widths], widths)]
    table += [_line(line, widths) for line in lines]
    text = "\n".join(table) + "\n\nPercent right, with 95% Wilson intervals.\n"
    return text + "".join(f"- {note}\n" for note in comparison["notes"])


def _key(column: Mapping[str, Any]) -> str:
    return f"{column['benchmark']}/{column['split']}"


def _paper_split(benchmark: str) -> str:
    return "test" if benchmark == "mathvision" else "testmini"


def _measured(row: Mapping[str, Any], columns: Sequence[Mapping[str, Any]], four: bool) -> list[str]:
    cells = row["cells"]
    texts = [_percent(cells[_key(column)]) if _key(column) in cells else "" for column in columns]
    of_paper = [cells.get(f"{name}/{_paper_split(name)}") for name in FOUR]
    mean = f"{25 * sum(cell['accuracy'] for cell in of_paper if cell):.1f}" if all(of_paper) else ""
    return [row["model"], row["rule"], *texts, *([mean] if four else [])]


def _percent(cell: Mapping[str, Any]) -> str:
    part = "" if cell["n"] == cell["of"] else f" ({cell['n']:,} of {cell['of']:,})"
    return f"{100 * cell['accuracy']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]{part}"


def _reported(reported: Mapping[str, float], column: Mapping[str, Any]) -> str:
    value = reported.get(column["benchmark"])
    if value is None:
        return ""
    split = _paper_split(column["benchmark"])
    return f"{value:.1f}" + ("" if split == column["split"] else f" ({split})")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
