"""What every page is made with: templates, escaping, and numbers for people.

Rollouts are hostile text: the templates escape everything, control and direction-changing
characters are made visible, and the pages' own policy forbids foreign scripts and requests altogether.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from rlcs.recipe.arms import ARMS
from rlcs.storage import atomic_write

if TYPE_CHECKING:
    from jinja2 import Environment

_LONGEST_TEXT = 3000  # characters of one answer that the page shows


def write_page(path: Path, page: str) -> None:
    """Write a page whole; a lone half of a surrogate pair is valid in JSON and nowhere else."""
    atomic_write(path, page.encode("utf-8", "replace"))


def templates() -> "Environment":
    """Templates with everything that pages share: escaping, filters, the names of arms and stages."""
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
        percent=_percent, points=_points, duration=_duration, fold=_fold, digits=digits, stage=_stage
    )
    environment.globals.update(arms=ARMS)
    return environment


_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def visible(value: object) -> object:
    """A text with its control, direction-changing and broken characters spelled out: seen, and harmless."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _INVISIBLE.sub(lambda found: f"\\u{ord(found.group(0)):04x}", value)


def _stage(name: str) -> str:
    """A key of the summary's seconds for people."""
    if name.startswith("eval_"):
        arm = name.removeprefix("eval_")
        return f"Measuring: {ARMS[arm].label if arm in ARMS else arm}"
    return ARMS[name].stage if name in ARMS else name.replace("_", " ").capitalize()


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def digits(value: float | None) -> str:
    """Three digits, or all of them before the point."""
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
