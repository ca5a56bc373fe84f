"""Rows of the result, and how they read: on the screen and in docs/performance.md."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.limit import Limit
from bench.meter import PHASES, Measured
from bench.shapes import Case
from rlcs.plan.machine import GPUS

WORK = "grpo step"
MARKS = {name: (f"<!-- {name}:begin -->", f"<!-- {name}:end -->") for name in ("bench", "works")}
"""Between which marks of a page the tables of the GRPO step and of the other works stand."""
COLUMNS = {"work", "shape", "says", "phase", "peer", "ratio", "spread", "share_of_limit", "seconds"} | {
    "peer_seconds",
    "environment",
    "load_before",
}
"""What every row has; other names are figures of one kind of work."""

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
        if phase == "step":
            rows[-1] |= on_gpu(case, limit, mine)
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


PASSES = 5
"""Forward passes of a step: rollout, reference, and update, whose backward pass counts as two."""


def on_gpu(case: Case, limit: Limit, seconds: float) -> Row:
    """What only a GPU has: tokens a second, prompts included, and the share of its peak in float32."""
    if not torch.cuda.is_available():
        return {}
    tokens = statistics.median(
        sum(case.trunks[p.id] + sum(case.lengths[p.id]) for p in case.step_problems(step))
        for step in range(1, case.steps)
    )
    found: Row = {"tokens_per_s_per_gpu": round(tokens / seconds)}
    name = torch.cuda.get_device_name().upper().split()
    known = next((gpu for key, gpu in GPUS.items() if key.upper() in name), None)
    if known is not None:
        found["model_flops_utilisation"] = round(PASSES * limit.operations / seconds / known.float32, 3)
    return found


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


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The new rows, behind those of works and shapes that were not measured anew."""
    anew = {(row["work"], row["shape"]) for row in new}
    return [*(row for row in old if (row["work"], row["shape"]) not in anew), *new]


def read(path: Path) -> list[Row]:
    """The rows of a file; none if it is not there."""
    found: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return found


def works_markdown(rows: Sequence[Row]) -> str:
    """A table for each work besides the GRPO step."""
    parts: list[str] = []
    for work in dict.fromkeys(row["work"] for row in rows if row["work"] != WORK):
        mine = [row for row in rows if row["work"] == work]
        parts += [f"**{work}**", ""]
        parts += ["| shape | phase | against | peer | rlcs | ratio | of the rounds | more |"]
        parts += ["|---|---|---|---:|---:|---:|---:|---|"]
        parts += [_work_line(row) for row in mine]
        loads = [row["load_before"] for row in mine]
        environments = "; ".join(dict.fromkeys(row["environment"] for row in mine))
        parts += [
            "",
            f"Measured with {environments}; load of the machine before: {min(loads)} to {max(loads)}.",
            "",
        ]
    return "\n".join(parts)


def _work_line(row: Row) -> str:
    limit = row["share_of_limit"]
    more = [row["says"]] if row.get("says") else []
    more += [f"{limit:.0%} of the limit"] if limit is not None else []
    more += [f"{key.replace('_', ' ')} {_figure(row[key])}" for key in row if key not in COLUMNS]
    peer_seconds, ratio, spread = row["peer_seconds"], row["ratio"], row["spread"]
    cells = [row["shape"], row["phase"], row["peer"] or "alone"]
    cells += ["" if peer_seconds is None else f"{peer_seconds:.3g} s", f"{row['seconds']:.3g} s"]
    cells += ["" if ratio is None else f"{ratio:.2f}"]
    cells += ["" if spread is None else f"{spread[0]:.2f} to {spread[1]:.2f}", "; ".join(more)]
    return f"| {' | '.join(cells)} |"


def _figure(value: Any) -> str:
    """A number with the digits that mean something; what is no number as it is."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(rows: Sequence[Row]) -> str:
    """A table for each shape of the GRPO step."""
    rows = [row for row in rows if row["work"] == WORK]
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
        parts += [_gpu_line(row) for row in mine if "tokens_per_s_per_gpu" in row]
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


def _gpu_line(row: Row) -> str:
    used = row.get("model_flops_utilisation")
    says = "" if used is None else f", {used:.1%} of the peak in float32"
    return (
        f"{row['tokens_per_s_per_gpu']:,} tokens/s/GPU{says}. EasyR1 publishes 2,000 tokens/s/GPU and 23% "
        "for Qwen2.5-VL-7B on Geometry3K with 8 H100 (120 s a step, bfloat16): another model, another work.\n"
    )


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
    for name, table in {"bench": markdown(rows), "works": works_markdown(rows)}.items():
        begin, end = MARKS[name]
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = f"{before}{begin}\n{table}\n{end}{after}"
    page.write_text(text, encoding="utf-8")
