"""Rows of the result, and how they read: on the screen and in docs/performance.md."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.limit import Limit
from bench.meter import PHASES, Measured
from bench.shapes import Case

WORK = "grpo step"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

Row = dict[str, Any]


def rows_of(
    case: Case, limit: Limit, ours: Sequence[Measured], theirs: Sequence[Measured], facts: Row
) -> list[Row]:
    """One row a phase and two of memory: medians over steps; `ratio` is the peer's over ours."""
    tokens = statistics.median(case.answer_tokens(step) for step in range(1, case.steps))
    rows = []
    for phase in (*PHASES, "step"):
        mine, other = _median_seconds(ours, phase), _median_seconds(theirs, phase)
        rows.append(_timed(case, phase, mine, other, tokens, limit) | facts)
    without = ("rollout", "update")
    mine, other = (
        _median_seconds(side, "step") - _median_seconds(side, "logprobs") for side in (ours, theirs)
    )
    assert set(without) < set(PHASES), "a step without reference is a step less its logprobs"
    rows.append(_timed(case, "step without reference", mine, other, tokens, limit) | facts)
    for phase in ("update", "step"):
        peaks = [max(m.peaks.get(phase, 0) for m in side) for side in (ours, theirs)]
        rows.append(_row(case, f"memory of {phase}", peaks[1] / max(1, peaks[0])) | _bytes(*peaks) | facts)
    return rows


def _median_seconds(side: Sequence[Measured], phase: str) -> float:
    return statistics.median(m.seconds[phase] for m in side)


def _row(case: Case, phase: str, ratio: float) -> Row:
    return {
        "work": WORK,
        "shape": case.shape.name,
        "says": case.shape.says,
        "phase": phase,
        "ratio": round(ratio, 3),
    }


def _timed(case: Case, phase: str, mine: float, other: float, tokens: float, limit: Limit) -> Row:
    return _row(case, phase, other / mine) | {
        "share_of_limit": round(other / mine / limit.exact, 3),
        "limit": round(limit.exact, 3),
        "limit_with_padding": round(limit.padded, 3),
        "seconds": round(mine, 4),
        "peer_seconds": round(other, 4),
        "answer_tokens_per_s": round(tokens / mine, 1),
        "peer_answer_tokens_per_s": round(tokens / other, 1),
    }


def _bytes(mine: int, other: int) -> Row:
    return {"share_of_limit": None, "bytes": mine, "peer_bytes": other}


def write(rows: Sequence[Row], path: Path) -> None:
    """The rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")


def markdown(rows: Sequence[Row]) -> str:
    """A table for each shape."""
    parts = []
    for name in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == name]
        timed = [row for row in mine if "seconds" in row]
        limits = (
            f"limit {timed[0]['limit']:.2f} times, {timed[0]['limit_with_padding']:.2f} with padding as work"
        )
        parts += [f"**{name}**: {mine[0]['says']}; {limits}", ""]
        parts += ["| phase | TRL | rlcs | ratio | share of the limit | answer tokens/s, TRL | rlcs |"]
        parts += ["|---|---:|---:|---:|---:|---:|---:|"]
        parts += [_line(row) for row in mine]
        parts += [""]
    measured = []
    environments = dict.fromkeys((row["environment"], row["peer"]) for row in rows)
    for environment, peer in environments:
        mine = [row for row in rows if (row["environment"], row["peer"]) == (environment, peer)]
        shapes = ", ".join(dict.fromkeys(row["shape"] for row in mine)) if len(environments) > 1 else ""
        busy = [f"{min(row[key] for row in mine):.2f}" for key in ("peer_busy", "busy")]
        measured.append(
            f"Measured with {environment} against {peer}{f' ({shapes})' if shapes else ''}. CPU seconds per "
            f"wall second in the least busy step: TRL {busy[0]}, rlcs {busy[1]}; well below the number of "
            "threads, the machine was not free."
        )
    return "\n".join([*parts, "\n\n".join(measured)])


def _line(row: Row) -> str:
    if "bytes" in row:
        sizes = [f"{row[key] / 2**20:,.0f} MiB" for key in ("peer_bytes", "bytes")]
        return f"| {row['phase']} | {sizes[0]} | {sizes[1]} | {row['ratio']:.1f} | | | |"
    speeds = [f"{row[key]:,.0f}" for key in ("peer_answer_tokens_per_s", "answer_tokens_per_s")]
    seconds = [f"{row[key]:.2f} s" for key in ("peer_seconds", "seconds")]
    cells = [*seconds, f"{row['ratio']:.1f}", f"{row['share_of_limit']:.0%}", *speeds]
    return f"| {row['phase']} | " + " | ".join(cells) + " |"


def write_docs(rows: Sequence[Row], page: Path) -> None:
    """Put the tables between the page's marks."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{markdown(rows)}\n{END}{after}", encoding="utf-8")
