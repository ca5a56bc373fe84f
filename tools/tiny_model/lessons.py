r"""What the built-in model learns before any study: captions, lists, simple questions, equations.

All scenes are of the train split. There is never a question of the study in its own words, and never a word
of reasoning: an answer is a caption, a list, equations that were asked for, or `\boxed{...}` at once. Only
`demonstrations` have both, for the larger model that teaches.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlcs.data.puzzles import LEVELS
from rlcs.data.puzzles.family import Family, boxed, draw_scene, listed
from rlcs.data.puzzles.sums import Worksheet
from tools.tiny_model.questions import simple

if TYPE_CHECKING:
    from PIL.Image import Image

DESCRIBE = "Describe the image."
"""The question that asks for a caption."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """An image (or none) with (question, response) pairs about it; each pair stands alone."""

    image: "Image | None"
    pairs: tuple[tuple[str, str], ...]


def lessons(families: tuple[Family, ...], seed: int) -> Iterator[Lesson]:
    """An endless stream: an image of each family in turn, and after each round two pages of text.

    Sums are asked beside an image too, so that an image alone does not call for a description.
    """
    rng = random.Random(f"lessons|{seed}")
    while True:
        for family in families:
            scene = draw_scene(family, rng, rng.randint(1, 3), "train")
            pairs = [
                (DESCRIBE, family.caption(scene)),
                _inventory(family, rng, scene),
                _look(family, rng, scene),
                _look_and_sum(family, rng, scene) if rng.random() < 0.7 else arithmetic(rng),
            ]
            yield Lesson(image=family.paint(scene), pairs=tuple(pairs))
        yield Lesson(image=None, pairs=(equations(rng), equations(rng), arithmetic(rng), geometry(rng)))
        yield Lesson(image=None, pairs=tuple(_reading(rng.choice(families), rng) for _ in range(3)))


def demonstrations(families: tuple[Family, ...], seed: int, *, each: int = 4) -> Iterator[Lesson]:
    """An endless stream of the study's own questions with right reasoning, `each` about one image."""
    rng = random.Random(f"demonstrations|{seed}")
    while True:
        for family in families:
            [level] = rng.choices(LEVELS, (2, 2, 1))
            scene = draw_scene(family, rng, level, "train")
            drawn = [family.plan(rng, scene, level) for _ in range(2 * each)]
            plans = list(dict.fromkeys(plan for plan in drawn if plan is not None))[:each]
            pairs = tuple((family.question(plan), family.solve(scene, plan).text()) for plan in plans)
            if pairs:
                yield Lesson(image=family.paint(scene), pairs=pairs)


def arithmetic(rng: random.Random) -> tuple[str, str]:
    """One operation on two numbers, asked in symbols or in words, answered in a box."""
    left, sign, right = _operation(rng)
    answer = Worksheet().work(left, sign, right)
    word = {"+": " plus ", "-": " minus ", "*": " times "}[sign]
    spoken = f"double {right}" if sign == "*" and left == 2 else f"{left}{word}{right}"
    return f"What is {rng.choice((f'{left}{sign}{right}', spoken))}?", boxed(answer)


def equations(rng: random.Random, count: int = 4) -> tuple[str, str]:
    """Some operations, written out as equations one below the other."""
    sheet = Worksheet()
    terms = []
    for _ in range(count):
        left, sign, right = _operation(rng)
        terms.append(f"{left}{sign}{right}")
        sheet.work(left, sign, right)
    return f"Write out {', '.join(terms)}.", "\n".join(sheet.lines)


def geometry(rng: random.Random) -> tuple[str, str]:
    """What the words area and perimeter mean, without an image."""
    width, height = rng.randint(1, 6), rng.randint(1, 6)
    word, value = rng.choice((("area", width * height), ("perimeter", 2 * (width + height))))
    return f"What is the {word} of a {width}*{height} rectangle?", boxed(value)


def _operation(rng: random.Random) -> tuple[int, str, int]:
    """Two numbers of the size that the puzzles need, and a sign; no result below zero."""
    sign = rng.choice("++--*")
    if sign == "*":
        return rng.choice((2, rng.randint(0, 9))), sign, rng.randint(0, 9)
    left, right = rng.randint(0, rng.choice((9, 20, 36))), rng.randint(0, rng.choice((9, 9, 22)))
    return (max(left, right), sign, min(left, right)) if sign == "-" else (left, sign, right)


def _some(rng: random.Random, quantities: Mapping[str, int]) -> list[str]:
    names = sorted(quantities)
    return rng.sample(names, rng.randint(min(2, len(names)), min(5, len(names))))


def _inventory(family: Family, rng: random.Random, scene: str) -> tuple[str, str]:
    """Several counts or measures of the image at once."""
    quantities = family.quantities(scene)
    names = _some(rng, quantities)
    return f"List {', '.join(names)}.", listed(quantities, names)


def _reading(family: Family, rng: random.Random) -> tuple[str, str]:
    """The same from a text in place of an image; or two of the given numbers in one equation."""
    scene = draw_scene(family, rng, rng.randint(1, 3), "train")
    quantities = family.quantities(scene)
    if rng.random() < 0.5:
        names = _some(rng, quantities)
        return f"Read:\n{family.caption(scene)}\nList {', '.join(names)}.", listed(quantities, names)
    names = rng.sample(sorted(quantities), min(4, len(quantities)))
    low, high = sorted(rng.sample(names, 2), key=quantities.__getitem__)
    sign, sheet = rng.choice("+-*"), Worksheet()
    sheet.work(quantities[high], sign, quantities[low])
    return f"Given {listed(quantities, names)}: write out {high} {sign} {low}.", sheet.lines[0]


def _look(family: Family, rng: random.Random, scene: str) -> tuple[str, str]:
    question, answer = simple(family, rng, scene)
    return question, boxed(answer)


def _look_and_sum(family: Family, rng: random.Random, scene: str) -> tuple[str, str]:
    """One look and one operation with a given number, where the simple question has a number for answer."""
    question, answer = simple(family, rng, scene)
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
