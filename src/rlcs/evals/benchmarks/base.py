r"""The definition of a benchmark: where its rows come from, how a row is read, what is counted.

A benchmark's module turns one published row into a `Question` by a pure function; everything else (files,
images, sampling, grading, intervals) is the same for all.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlcs.records import IMAGE_SLOT, ImageRef, Problem

Style = Literal["paper", "official"]
"""`paper`: the `\\boxed{}` system prompt and the bare question; `official`: the official script's words."""
STYLES: tuple[Style, ...] = ("paper", "official")

Row = Mapping[str, Any]
"""One row with its columns as published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question of a benchmark.

    `official` and `plain` are the user's turn in the two styles; one of them may hold one
    `<image>` slot, without it the image comes first. `picture` is the row's image (a
    path, bytes, or a mapping with one of them). `num_unlisted` is the number of options where the
    row does not list them. `facets` are the
    categories it counts under, each with one or several values; `group` ties questions together.
    `facts` are further columns that an official rule needs.
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
        """Check that there is text in both styles, an answer, and an image for every slot."""
        texts = (self.official, self.plain)
        if not all(text.strip() for text in (*texts, self.answer)):
            raise ValueError("the question or its answer is empty")
        if max(text.count(IMAGE_SLOT) for text in texts) > (self.picture is not None):
            raise ValueError(f"the question has an {IMAGE_SLOT} but the row has no image")

    @property
    def num_options(self) -> int:
        """How many options there are; 0 for a free answer."""
        return len(self.choices) or self.num_unlisted

    def problem(self, style: Style, images: tuple[ImageRef, ...]) -> Problem:
        """The problem as the model sees it: the options stand in its text already."""
        text = self.plain if style == "paper" else self.official
        return Problem(id=self.id, source="benchmark", question=text, answer=self.answer, images=images)

    def graded(self) -> Problem:
        """The problem as our own rule grades it: a letter or the value of an option is right."""
        text = self.plain.replace(IMAGE_SLOT, "[image]")
        return Problem(
            id=self.id, source="benchmark", question=text, answer=self.answer, choices=self.choices
        )


Verdicts = Sequence[tuple[Question, bool]]
"""The questions of one sample round with whether each was answered right."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A published set of questions.

    `splits` holds the number of questions of each split as published, the default split first.
    `official_rule` names the rule of `rlcs.grading` that scores as the official script does, if there
    is one. `metrics` adds numbers beyond accuracy by facet. `name` is that of its module.
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
    """The first of the columns that holds anything: hub rows carry pixels, local ones a path."""
    return next((row[column] for column in columns if row.get(column) is not None), None)


def text_of(row: Row, column: str) -> str:
    """A column as text, without a literal slot: only a benchmark file says where an image stands."""
    return re.sub(IMAGE_SLOT, "< image>", str(row[column] if row[column] is not None else ""))


def facets(**values: object) -> dict[str, tuple[str, ...]]:
    """Categories by name, each given as one value or a list; None and empty ones are left out."""
    named = {name: value if isinstance(value, list | tuple) else [value] for name, value in values.items()}
    kept = {
        name: tuple(str(v) for v in each if v is not None and str(v) != "") for name, each in named.items()
    }
    return {name: each for name, each in kept.items() if each}
