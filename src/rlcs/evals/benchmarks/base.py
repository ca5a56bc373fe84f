r"""The definition of a benchmark: where its rows come from, how a row is read, which scores it has.

A benchmark's module turns one published row into a `Question` by a pure function; everything else (files,
images, sampling, grading, intervals) is common to all benchmarks.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlcs.records import IMAGE_SLOT, ImageRef, Problem

Style = Literal["paper", "official"]
"""`paper`: the `\\boxed{}` system prompt and the question alone; `official`: the official script's prompt."""
STYLES: tuple[Style, ...] = ("paper", "official")

Row = Mapping[str, Any]
"""One row with its columns as published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question of a benchmark.

    `official` and `plain` are the user's message in the two styles; each may have one `<image>` slot, without
    which the image comes first. `picture` is the row's image (a path, bytes, or a mapping with one of
    them). `num_unlisted` is the number of options if the row does not list them. `facets` are the categories
    by which scores are broken down, each with one or several values; questions of one `group` belong
    together. `facts` are further columns that an official rule needs.
    """

    id: str
    official: str
    plain: str
    answer: str
    picture: object = None
    choices: tuple[str, ...] = ()
    num_unlisted: int = 0
    facets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    group: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check for text in both styles, an answer, and an image for every slot. Raises ValueError."""
        texts = (self.official, self.plain)
        if not all(text.strip() for text in (*texts, self.answer)):
            raise ValueError("the question or its answer is empty")
        if max(text.count(IMAGE_SLOT) for text in texts) > (self.picture is not None):
            raise ValueError(f"the question has an {IMAGE_SLOT} but the row has no image")

    @property
    def num_options(self) -> int:
        """Number of options; 0 for a free answer."""
        return len(self.choices) or self.num_unlisted

    def problem(self, style: Style, images: tuple[ImageRef, ...]) -> Problem:
        """The problem for the model: its options are part of the text."""
        text = self.plain if style == "paper" else self.official
        return Problem(id=self.id, source="benchmark", question=text, answer=self.answer, images=images)

    def graded(self) -> Problem:
        """The problem for the rlcs rule: the letter or the value of the right option is correct."""
        text = self.plain.replace(IMAGE_SLOT, "[image]")
        return Problem(
            id=self.id, source="benchmark", question=text, answer=self.answer, choices=self.choices
        )


Verdicts = Sequence[tuple[Question, bool]]
"""One sample of each question: the question, and whether it was answered right."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A published set of questions.

    `splits` holds the number of questions of each split as published, the default split first.
    `official_rule` names the rule of `rlcs grade` that scores as the official script does, if there is
    one. `metrics` computes the benchmark's further scores. `name` is that of its module.
    """

    title: str
    hub_id: str
    splits: Mapping[str, int]
    read: Callable[[Row], Question]
    config: str | None = None
    official_rule: str | None = None
    metrics: Callable[[Verdicts], dict[str, float | None]] | None = None
    name: str = ""


def picture_of(row: Row, *columns: str) -> object:
    """Return the first of the columns that is not None: rows of the hub have pixels, local ones a path."""
    return next((row[column] for column in columns if row.get(column) is not None), None)


def text_of(row: Row, column: str) -> str:
    """Return a column as text; an `<image>` in it is no slot and is rewritten as `< image>`."""
    return re.sub(IMAGE_SLOT, "< image>", str(row[column] if row[column] is not None else ""))


def facets(**values: object) -> dict[str, tuple[str, ...]]:
    """Make categories by name, each from one value or a list; None and empty values are left out."""
    named = {name: value if isinstance(value, list | tuple) else [value] for name, value in values.items()}
    kept = {
        name: tuple(str(v) for v in each if v is not None and str(v) != "") for name, each in named.items()
    }
    return {name: each for name, each in kept.items() if each}
