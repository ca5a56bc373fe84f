r"""What the built-in model learns before any study: captions, simple questions, simple arithmetic.

Lessons use scenes of the train split only, never a question of the study in its own words, and never
a word of reasoning: an answer is a caption, an equation, or `\boxed{...}` at once.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlcs.tasks.family import Family, Split, boxed, split_of
from rlcs.tasks.sums import Worksheet

if TYPE_CHECKING:
    from PIL.Image import Image

DESCRIBE = "Describe the image."
"""The question that asks for a caption."""

_SUMS = 5


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """An image (or none) with (question, response) pairs about it; each pair stands alone."""

    image: "Image | None"
    pairs: tuple[tuple[str, str], ...]


def draw_scene(family: Family, rng: random.Random, level: int, split: Split) -> str:
    """Draw scenes until one belongs to the split."""
    while True:
        scene = family.scene(rng, level)
        if split_of(family.name, scene) == split:
            return scene


def arithmetic(rng: random.Random) -> tuple[str, str]:
    """One operation on two numbers, asked in symbols or in words; no result below zero."""
    sign = rng.choice("+-*")
    if sign == "*":
        left, right = rng.randint(0, 9), rng.randint(0, 9)
    else:
        most = rng.choice((9, 20, 70))
        left, right = rng.randint(0, most), rng.randint(0, rng.choice((9, 9, 36)))
        left = max(left, right) if sign == "-" else left
    sheet = Worksheet()
    answer = sheet.work(left, sign, right)
    if rng.random() < 0.5:
        return f"Write out {left}{sign}{right}.", sheet.lines[0]
    word = {"+": " plus ", "-": " minus ", "*": " times "}[sign]
    spoken = f"double {right}" if sign == "*" and left == 2 else f"{left}{word}{right}"
    return f"What is {rng.choice((f'{left}{sign}{right}', spoken))}?", boxed(answer)


def geometry(rng: random.Random) -> tuple[str, str]:
    """What the words area and perimeter mean, without an image."""
    width, height = rng.randint(1, 8), rng.randint(1, 8)
    word, value = rng.choice((("area", width * height), ("perimeter", 2 * (width + height))))
    return f"What is the {word} of a {width}*{height} rectangle?", boxed(value)


def lessons(families: tuple[Family, ...], *, seed: int) -> Iterator[Lesson]:
    """An endless stream: an image of each family in turn, and after each round some arithmetic.

    Sums are asked beside an image too, so that an image alone does not call for a description.
    """
    rng = random.Random(f"lessons|{seed}")
    while True:
        for family in families:
            scene = draw_scene(family, rng, rng.randint(1, 3), "train")
            pairs = [(DESCRIBE, family.caption(scene)), _look(family, rng, scene)]
            pairs.append(_look_and_sum(family, rng, scene) if rng.random() < 0.7 else arithmetic(rng))
            yield Lesson(image=family.paint(scene), pairs=tuple(pairs))
        sums = [arithmetic(rng) for _ in range(_SUMS)]
        yield Lesson(image=None, pairs=(*sums, geometry(rng), geometry(rng)))


def _look(family: Family, rng: random.Random, scene: str) -> tuple[str, str]:
    question, answer = family.simple(rng, scene)
    return question, boxed(answer)


def _look_and_sum(family: Family, rng: random.Random, scene: str) -> tuple[str, str]:
    """One look and one operation with a given number, where the simple question has a number for answer."""
    question, answer = family.simple(rng, scene)
    start = "What is the "
    if not (question.startswith(start) and answer.isdigit()):
        return question, boxed(answer)
    seen, given = int(answer), rng.randint(0, 9)
    what = question.removeprefix("What is ").removesuffix("?")
    kind = rng.choice(("plus", "minus", "times", "double"))
    if kind == "double":
        return f"What is double {what}?", boxed(2 * seen)
    if kind == "minus":
        given = rng.randint(0, seen)
    value = {"plus": seen + given, "minus": seen - given, "times": seen * given}[kind]
    return f"What is {what} {kind} {given}?", boxed(value)
