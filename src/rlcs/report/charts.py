"""Draws charts as inline SVG whose colours are CSS variables, for light and dark pages alike.

matplotlib draws with placeholder colours; each is replaced by a variable of the page's style sheet, and
the font by that of the page.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from rlcs.report import findings
from rlcs.report.findings import ArmResult, smooth, thin
from rlcs.report.validation import ValidationCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[float, float]]

_NAMES = (
    *("ink", "muted", "grid", "base", "sft", "grpo", "sft_grpo"),
    *("p0", "p1", "p2", "p3", "p4", "p5", "p6", "mixed", "card"),
)
_PAINT = {name: f"#0a0b{index + 16:02x}" for index, name in enumerate(_NAMES)}


def arms_chart(results: Sequence[ArmResult]) -> Markup:
    """Accuracy of each arm as a bar with its interval; a dot for every seed where there are several."""

    def draw(axes: "Axes") -> None:
        for row, result in enumerate(reversed(results)):
            axes.barh(row, result.accuracy, height=0.42, color=_PAINT[result.arm])
            axes.plot(
                [result.low, result.high], [row, row], color=_PAINT["ink"], lw=1.3, solid_capstyle="butt"
            )
            for end in (result.low, result.high):
                axes.plot([end, end], [row - 0.09, row + 0.09], color=_PAINT["ink"], lw=1.3)
            if len(result.seeds) > 1:
                axes.plot(result.seeds, [row] * len(result.seeds), "o", ms=3, color=_PAINT["ink"], mew=0)
            axes.text(0, row + 0.29, result.name, va="bottom", color=_PAINT["ink"], fontsize=9.5)
            end = max(result.high, result.accuracy) + 0.012
            weight = "bold" if result.arm == "sft_grpo" else "normal"
            share = f"{result.accuracy:.1%}"
            axes.text(end, row, share, va="center", color=_PAINT["ink"], fontsize=10, fontweight=weight)
        top = max(max(r.high, r.accuracy) for r in results)
        axes.set_xlim(0, max(0.1, min(1.0, top) * 1.16))
        axes.set_ylim(-0.45, len(results) - 0.2)
        axes.set_yticks([])
        axes.grid(axis="x", color=_PAINT["grid"], lw=0.7)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    about = "; ".join(f"{r.name} {r.accuracy:.1%} ({r.low:.1%} to {r.high:.1%})" for r in results)
    return _svg(
        draw,
        name="arms",
        about=f"Bar chart of held-out accuracy: {about}",
        size=(4.2, 0.64 * len(results) + 0.3),
    )


METRICS = {
    "reward": "Reward",
    "accuracy": "Accuracy on training problems",
    "response_tokens": "Response length, tokens",
    "entropy": "Entropy, nats a token",
    "kl": "KL from the reference",
    "sight": "Divergence from masked images",
    "entropy_weight": "Weight of the entropy bonus",
    "held_share": "Tokens that entropy control holds",
    "masked_share": "Tokens left out, far from the sampler",
    "clip_fraction": "Clipped tokens",
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "sampler_gap": "Gap between sampler and policy",
    "sft_loss": "Loss on demonstrations in RL",
    "teacher_kl": "Reverse KL from the teacher, nats a token",
}
"""Metrics of training that have charts, with their titles; parts of the reward have some as well."""
_SHARES = ("accuracy", "clip_fraction", "held_share", "masked_share", "signal", "alike", "format")


def title_of(key: str) -> str:
    """The title of the chart of a metric, or of a part of the reward (`reward_NAME`)."""
    return METRICS.get(key) or f"Reward: {key.removeprefix(findings.PART)}"


def curve_chart(key: str, about: str, lines: Sequence[tuple[str, Sequence[Points]]], *, name: str) -> Markup:
    """Curves of a metric over steps: the measured one faint, the smoothed one strong.

    `lines` are the runs (one a seed) of each colour. With several seeds each seed's smoothed curve is faint
    and their mean is strong.
    """

    def draw(axes: "Axes") -> None:
        for colour, runs in lines:
            runs = [run for run in runs if run]
            paint = _PAINT[colour]
            for run in runs:
                xs, ys = _columns(run)
                axes.plot(xs, smooth(ys) if len(runs) > 1 else ys, color=paint, lw=0.8, alpha=0.35)
            if runs:
                xs, ys = _columns(_mean_run(runs))
                axes.plot(xs, smooth(ys), color=paint, lw=1.7, solid_capstyle="round")
        axes.yaxis.set_major_formatter(
            lambda value, _: f"{100 * value:.3g}%" if key in _SHARES else f"{value:.3g}"
        )
        axes.grid(axis="y", color=_PAINT["grid"], lw=0.7)
        axes.margins(x=0.01, y=0.08)

    return _svg(draw, name=name, about=about)


def validation_chart(curve: ValidationCurve) -> Markup:
    """Accuracy at each measured step with its interval; pass@k dashed; a ring around the step kept."""
    points, paint = curve.points, _PAINT[curve.stage]
    steps, shares = [p.step for p in points], [p.accuracy for p in points]
    wide = [(p.step, p.pass_at_k) for p in points if p.pass_at_k is not None]

    def draw(axes: "Axes") -> None:
        lows, highs = [p.low for p in points], [p.high for p in points]
        axes.fill_between(steps, lows, highs, color=paint, alpha=0.16, lw=0)
        axes.plot(steps, shares, color=paint, lw=1.7, marker="o", ms=3.2, mew=0)
        if wide:
            axes.plot([s for s, _ in wide], [v for _, v in wide], color=paint, lw=1.2, ls=(0, (4, 2)))
        for point in points:
            if point.step == curve.kept:
                place = (point.step, point.accuracy)
                axes.plot(*place, "o", ms=9, mfc="none", mec=_PAINT["ink"], mew=1.3)
                label = f"kept: step {point.step:,}"
                axes.annotate(
                    label, place, (0, -14), textcoords="offset points", ha="center", color=_PAINT["ink"]
                )
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        axes.grid(axis="y", color=_PAINT["grid"], lw=0.7)
        axes.margins(x=0.04, y=0.16)

    ends = f"from {shares[0]:.1%} at step {steps[0]:,} to {shares[-1]:.1%} at step {steps[-1]:,}"
    best = f"best {curve.best.accuracy:.1%} at step {curve.best.step:,}"
    about = f"Line chart. Accuracy on {points[-1].n:,} validation problems: {ends}, {best}"
    return _svg(draw, name=f"validation-{curve.stage}", about=about)


def phases_chart(name: str, about: str, layers: Sequence[tuple[str, Points]]) -> Markup:
    """Seconds a step as stacked areas; `layers` are the colour and the points of each phase."""

    def draw(axes: "Axes") -> None:
        shown = [_columns(points) for _, points in layers]
        steps = shown[0][0]
        heights = [ys for _, ys in shown]
        if len(steps) == 1:  # an area needs two ends
            steps, heights = [steps[0], steps[0] + 1], [ys * 2 for ys in heights]
        axes.stackplot(steps, *heights, colors=[_PAINT[colour] for colour, _ in layers], lw=0)
        axes.grid(axis="y", color=_PAINT["grid"], lw=0.7)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)

    return _svg(draw, name=name, about=about)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A measured accuracy at `x` with its interval, and those of its seeds; `hollow` if it is not final."""

    x: float
    y: float
    low: float
    high: float
    seeds: tuple[float, ...] = ()
    hollow: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Marks of one colour. `faint` ones are only dots; others are joined, with intervals and a label."""

    colour: str
    marks: Sequence[Mark]
    label: str = ""
    faint: bool = False


def levels_chart(series: Sequence[Series], level: Mark, *, unit: str, name: str, about: str) -> Markup:
    """Accuracies over a quantity (on a logarithmic scale), and the band of one that does not depend on it."""

    def draw(axes: "Axes") -> None:
        axes.axhspan(level.low, level.high, color=_PAINT["base"], alpha=0.25, lw=0)
        axes.axhline(level.y, color=_PAINT["base"], lw=1.4)
        for each in series:
            paint, marks = _PAINT[each.colour], each.marks
            xs = [mark.x for mark in marks]
            if not each.faint:
                axes.plot(xs, [mark.y for mark in marks], color=paint, lw=1.6, solid_capstyle="round")
            for mark in marks:
                face = _PAINT["card"] if mark.hollow else paint
                alpha, size = (0.45, 3.2) if each.faint else (1.0, 5.0)
                if not each.faint:
                    axes.plot([mark.x, mark.x], [mark.low, mark.high], color=paint, lw=1.1, alpha=0.8)
                    axes.plot(
                        [mark.x] * len(mark.seeds), mark.seeds, "_", color=paint, ms=5, mew=1.1, alpha=0.8
                    )
                axes.plot(mark.x, mark.y, "o", ms=size, mfc=face, mec=paint, mew=1.1, alpha=alpha)
            if each.label:
                axes.annotate(
                    each.label, (xs[-1], marks[-1].y), (7, 0), textcoords="offset points", va="center",
                    color=_PAINT["muted"],
                )  # fmt: skip
        ticks = sorted({mark.x for each in series for mark in each.marks})
        axes.set_xscale("log")
        axes.set_xticks(_apart(ticks), minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel(unit, color=_PAINT["muted"])
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        axes.grid(axis="y", color=_PAINT["grid"], lw=0.7)
        axes.margins(x=0.14, y=0.08)

    from matplotlib.ticker import NullLocator

    return _svg(draw, name=name, about=about, size=(4.6, 2.7))


def _apart(ticks: Sequence[float]) -> list[float]:
    """Those of the positions, from the largest on, whose labels do not touch on a logarithmic scale."""
    kept: list[float] = []
    least = (ticks[-1] / ticks[0]) ** 0.09
    for tick in reversed(ticks):
        if not kept or kept[-1] / tick >= least:
            kept.append(tick)
    return kept


def phase_colour(index: int) -> str:
    """The colour variable of phase number `index`."""
    return f"p{index % 7}"


def _columns(points: Points) -> tuple[list[float], list[float]]:
    points = thin(points)
    return [p[0] for p in points], [p[1] for p in points]


def _mean_run(runs: Sequence[Points]) -> list[tuple[float, float]]:
    """The mean at every step, over the runs that have that step."""
    values_at: dict[float, list[float]] = {}
    for run in runs:
        for step, value in run:
            values_at.setdefault(step, []).append(value)
    return [(step, sum(values) / len(values)) for step, values in sorted(values_at.items())]


def _svg(
    draw: "Callable[[Axes], None]", *, name: str, about: str, size: tuple[float, float] = (3.6, 1.9)
) -> Markup:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The salt makes ids reproducible; the context limits the settings to this figure.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8.5}):
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # type: ignore[union-attr, call-arg]
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        for side in ("top", "right", "bottom"):
            axes.spines[side].set_visible(False)
        axes.spines["left"].set_color(_PAINT["grid"])
        axes.tick_params(length=0, colors=_PAINT["muted"], labelcolor=_PAINT["muted"])
        axes.set_axisbelow(True)
        axes.locator_params(nbins=5)
        draw(axes)
        page = io.StringIO()
        FigureCanvasSVG(figure).print_svg(page, metadata={"Date": None})
    return _inline(page.getvalue(), name, about)


def _inline(svg: str, name: str, about: str) -> Markup:
    """An SVG file as an element of a page: with unique ids, variables for colours, no metadata."""
    body = svg[svg.index("<svg") :]
    # matplotlib's style element would apply to the whole page; the style sheet has its rules for `svg *`.
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.S)
    body = re.sub(r"font-family: [^;\"]*;", "", body)
    body = re.sub(r'\b(id="|url\(#|href="#)', rf"\1{name}-", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    for variable, paint in _PAINT.items():
        body = body.replace(paint, f"var(--{variable.replace('_', '-')})")
    box = re.search(r'viewBox="[^"]*"', body)
    head = f'<svg role="img" {box.group(0) if box else ""} aria-label="{escape(about)}">'
    return Markup(head + body[body.index(">") + 1 :])  # noqa: S704 - drawn here; `about` is escaped
