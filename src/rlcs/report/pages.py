"""Templates of all pages, with their escaping and number formats.

Rollouts are untrusted text: the templates escape everything, control and direction-changing characters
are made visible, and the pages' content security policy forbids foreign scripts and requests.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from rlcs.recipe.arms import ARMS
from rlcs.report.mathml import answer_with_formulas, with_formulas
from rlcs.storage import atomic_write

if TYPE_CHECKING:
    from jinja2 import Environment

_LONGEST_TEXT = 3000  # characters of one answer that the page shows


def write_page(path: Path, page: str) -> None:
    """Write a page atomically; lone surrogates, which JSON allows and UTF-8 does not, are replaced."""
    atomic_write(path, page.encode("utf-8", "replace"))


@cache
def templates() -> "Environment":
    """The templates' environment: escaping, filters, the table of arms; each template is compiled once."""
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
        percent=_percent,
        points=points,
        duration=duration,
        fold=_fold,
        digits=digits,
        stage=_stage,
        formulas=lambda text: with_formulas(str(visible(text))),
        answer=_answer,
        tokens=_tokens,
        settings=settings,
        chance=chance,
    )
    environment.globals.update(arms=ARMS)
    return environment


_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def visible(value: object) -> object:
    """A text with escapes in place of control, direction-changing and invalid characters."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", value)


def _stage(name: str) -> str:
    """The label of a key of the summary's seconds."""
    if name.startswith("eval_"):
        arm = name.removeprefix("eval_")
        return f"Measuring: {ARMS[arm].label if arm in ARMS else arm}"
    return ARMS[name].stage if name in ARMS else name.replace("_", " ").capitalize()


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def points(value: float) -> str:
    """A difference of shares in points, with its sign unless it rounds to zero."""
    text = f"{100 * value:+.1f}".replace("-", "−")
    return text[1:] if text[1:] == "0.0" else text


def digits(value: float | None) -> str:
    """A number with three digits, or with all digits before the point."""
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _answer(text: str, most: int = 300) -> Markup:
    """A short answer with its formulas; one that is too long is cut, and stays text."""
    shown = str(visible(text))
    return answer_with_formulas(shown) if len(shown) <= most else escape(f"{shown[: most - 1]}…")


def _tokens(value: float | None) -> str:
    """A mean number of tokens."""
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def settings(pair: Sequence[object]) -> list[str]:
    """Values of one key of a recipe, real numbers with six digits or, where those agree, with all."""
    short = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in pair]
    texts = short if len(set(short)) > 1 else [str(value) for value in pair]
    return ["–" if value is None else text for value, text in zip(pair, texts, strict=True)]


def chance(p: float | None) -> str:
    """A p-value with two digits, or as a bound."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"


def duration(seconds: float) -> str:
    """Seconds as hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _fold(value: str, most: int = _LONGEST_TEXT) -> str:
    """A text, without its middle when it is too long: the answer is at the end."""
    left_out = len(value) - most
    if left_out <= 0:
        return value
    return f"{value[: most * 2 // 3]}\n[… {left_out:,} characters left out …]\n{value[-(most // 3) :]}"
