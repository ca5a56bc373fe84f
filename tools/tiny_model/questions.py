"""Simple questions about each family's scenes: one look, or two looks put together, and a short answer."""

import random
from collections.abc import Callable, Mapping

from rlcs.data.puzzles.family import Family

Quantities = Mapping[str, int]
Question = tuple[str, str]
"""The question, and its answer."""


def simple(family: Family, rng: random.Random, scene: str) -> Question:
    """Draw a question that needs no chain of reasoning."""
    return _DRAWN[family.name](rng, family.caption(scene), family.quantities(scene))


def _two(rng: random.Random, quantities: Quantities, phrase: Callable[[str], str]) -> Question:
    """Two quantities together, or how far the smaller is below the larger."""
    less, more = sorted(rng.sample(list(quantities), 2), key=quantities.__getitem__)
    first, second = phrase(less), phrase(more)
    if rng.random() < 0.6:
        return f"What do {first} and {second} add up to?", str(quantities[more] + quantities[less])
    return f"How far is {first} below {second}?", str(quantities[more] - quantities[less])


def _of_bars(rng: random.Random, caption: str, quantities: Quantities) -> Question:
    """The height of one bar, of two together or apart, the colour of one, or how many there are."""
    names = list(quantities)
    inks = names[:-2]  # the last are the tallest and the shortest
    kind = rng.random()
    if kind < 0.1:
        return "How many bars are there?", str(len(inks))
    if kind < 0.25:
        ink = rng.choice(inks)
        return f"What colour is bar {inks.index(ink) + 1}?", ink
    if kind < 0.6:
        return _two(rng, quantities, lambda name: f"the height of the {name} bar")
    name = rng.choice(names)
    question = rng.choice(("How tall is the {} bar?", "What is the height of the {} bar?"))
    return question.format(name), str(quantities[name])


def _of_figures(rng: random.Random, caption: str, quantities: Quantities) -> Question:
    """One side of a part, its perimeter or area, or how many parts there are."""
    inks = [part.partition("=")[0] for part in caption.split(", ")]
    kind = rng.random()
    if kind < 0.05:
        return "How many parts are there?", str(len(inks))
    ink = rng.choice(inks)
    width, height = quantities[f"{ink} width"], quantities[f"{ink} height"]
    if kind < 0.25:
        return f"What is the perimeter of the {ink} part?", str(2 * (width + height))
    if kind < 0.45:
        return f"What is the area of the {ink} part?", str(width * height)
    if rng.random() < 0.5:
        return f"What is the width of the {ink} part?", str(width)
    return f"What is the height of the {ink} part?", str(height)


def _of_shapes(rng: random.Random, caption: str, quantities: Quantities) -> Question:
    """What one cell holds, one count, or two counts together or apart."""
    rows = [row.split(", ") for row in caption.split("\n")]
    cells = [cell for row in rows for cell in row]
    names = list(quantities)
    inks, forms = [n for n in names if not n.endswith("s")], [n for n in names if n.endswith("s")]

    def phrase(name: str) -> str:
        return f"{name} shapes" if name in inks else name

    kind = rng.random()
    if kind < 0.25:
        index = rng.randrange(len(cells))
        row, column = divmod(index, len(rows[0]))
        return f"What is in row {row + 1}, column {column + 1}?", cells[index]
    if kind < 0.6:
        return _two(rng, quantities, lambda name: f"the number of {phrase(name)}")
    both = f"{rng.choice(inks)} {rng.choice(forms)}"
    name = rng.choice((rng.choice(inks), rng.choice(forms), both))
    question = rng.choice(("How many {} are there?", "What is the number of {}?"))
    count = quantities[name] if name in quantities else cells.count(both.removesuffix("s"))
    return question.format(phrase(name)), str(count)


_DRAWN: Mapping[str, Callable[[random.Random, str, Quantities], Question]] = {
    "bars": _of_bars,
    "figures": _of_figures,
    "shapes": _of_shapes,
}
