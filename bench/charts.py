"""Draws the rows of the result: how many times as fast as its peer each work is, and how a step grows."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.table import WORK, Row

INK, MUTED, OURS, PEER = "#1f2328", "#656d76", "#1f6feb", "#8c959f"


def ratios(rows: Sequence[Row]) -> list[tuple[str, float, tuple[float, float] | None]]:
    """What each bar shows: a label, the peer's seconds over ours, and the ratios of single rounds.

    Of a GRPO step it is the whole step of each shape; its phases stand in the page's tables.
    """
    found = []
    for row in rows:
        if row.get("ratio") is None or (row["work"] == WORK and row["phase"] != "step"):
            continue
        words = [row["work"], row["shape"]] + ([row["phase"]] if row["work"] != WORK else [])
        peer = row["peer"].split(",")[0].replace(" generate", "")
        spread = row.get("spread")
        found.append((f"{', '.join(words)}\nagainst {peer}", row["ratio"], tuple(spread) if spread else None))
    return found


def sweeps(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """For each sweep its (size, seconds), as its shapes say: `group 8`, `trunk 200`."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name, _, size = row["shape"].rpartition(" ")
        if row["work"] == "sweeps" and size.replace(",", "").isdigit():
            found.setdefault(name, []).append((float(size.replace(",", "")), row["seconds"]))
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture (PNG): bars of ratios, and below them the sweeps, both on logarithmic axes."""
    bars, lines = ratios(rows), sweeps(rows)
    heights = [max(1.0, 0.42 * len(bars)), 3.0 if lines else 0.01]
    figure = Figure(figsize=(9, sum(heights) + 1.2), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, height_ratios=heights)
    _draw_ratios(top, bars)
    if lines:
        _draw_sweeps(bottom, lines)
    else:
        bottom.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _draw_ratios(axes: Axes, bars: Sequence[tuple[str, float, tuple[float, float] | None]]) -> None:
    places = range(len(bars))
    axes.barh(places, [ratio for _, ratio, _ in bars], color=OURS, height=0.62)
    for place, (_, ratio, spread) in zip(places, bars, strict=True):
        if spread is not None:
            axes.plot(spread, (place, place), color=INK, linewidth=1.2)
        axes.text(
            max(ratio, spread[1] if spread else 0) * 1.03, place, f"{ratio:.2g}", va="center", color=INK
        )
    axes.axvline(1, color=PEER, linewidth=1)
    axes.set_xscale("log")
    most = max([4.0, *(ratio for _, ratio, _ in bars)])
    ticks = [2**power for power in range(1, math.ceil(math.log2(most)) + 1)]
    axes.set_xticks([0.5, 1, *ticks], ["0.5", "1: as fast", *map(str, ticks)])
    axes.set_xlim(0.4, most * 1.4)
    axes.set_yticks(list(places), [label for label, _, _ in bars], fontsize=7.5)
    axes.invert_yaxis()
    axes.set_title("The peer's seconds over ours (line: single rounds)", fontsize=10, loc="left", color=INK)
    _plain(axes)


def _draw_sweeps(axes: Axes, lines: dict[str, list[tuple[float, float]]]) -> None:
    most = [1.0, 1.0]
    for name, points in lines.items():
        grown = [[point[k] / points[0][k] for point in points] for k in (0, 1)]
        axes.plot(*grown, marker="o", label=name)
        most = [max(before, *values) for before, values in zip(most, grown, strict=True)]
    axes.set(xscale="log", yscale="log")
    for axis, largest in zip((axes.xaxis, axes.yaxis), most, strict=True):
        ticks = [2**power for power in range(math.ceil(math.log2(largest)) + 1)]
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("size, over the smallest", color=MUTED)
    axes.set_ylabel("seconds of a GRPO step,\nover the smallest", color=MUTED)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)
