"""Coloured shapes on a 3 x 3 grid with empty cells, to count and combine. 84 x 84 pixels, 9 tokens."""

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlcs.data.puzzles import sums
from rlcs.data.puzzles.family import COLOURS, PAPERS, Solution

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

_SIDE = 3
_CELL = 28
_NONE = "none"
_INKS = ("red", "green", "blue", "yellow")
_FORMS = ("circle", "square", "triangle")
_PLURALS = tuple(f"{form}s" for form in _FORMS)


def _parse(scene: str) -> tuple[str, list[str]]:
    paper, _, cells = scene.partition(":")
    return paper, cells.split(",")


def _text(paper: str, cells: list[str]) -> str:
    return f"{paper}:{','.join(cells)}"


def _count(cells: list[str], quantity: str) -> int:
    """Count the cells with `quantity`: a colour, a form in the plural, or both in one phrase."""
    wanted = {word.removesuffix("s") for word in quantity.split()}
    return sum(wanted <= set(cell.split()) for cell in cells)


def _phrase(quantity: str) -> str:
    return f"{quantity} shapes" if quantity in _INKS else quantity


def _draw_cell(pen: "ImageDraw", index: int, cell: str) -> None:
    ink, form = cell.split()
    x, y = _CELL * (index % _SIDE), _CELL * (index // _SIDE)
    box = (x + 5, y + 5, x + _CELL - 6, y + _CELL - 6)
    if form == "circle":
        pen.ellipse(box, fill=COLOURS[ink])
    elif form == "square":
        pen.rectangle(box, fill=COLOURS[ink])
    else:
        pen.polygon([(x + 14, y + 4), (x + 4, y + 23), (x + 23, y + 23)], fill=COLOURS[ink])


class Shapes:
    """The family of shapes. A scene reads `paper:cell,cell,...` row by row, nine cells."""

    name = "shapes"
    caption_lines = _SIDE

    def scene(self, rng: random.Random, level: int) -> str:
        """Draw nine cells; few colours or forms make the counts large, many make them small."""
        inks = rng.sample(_INKS, rng.choice((2, 3, 3, 4)))
        forms = rng.sample(_FORMS, rng.choice((2, 3, 3)))
        cells = [f"{rng.choice(inks)} {rng.choice(forms)}" for _ in range(_SIDE**2)]
        for index in rng.sample(range(_SIDE**2), rng.randrange(5)):
            cells[index] = _NONE
        return _text(rng.choice(tuple(PAPERS)), cells)

    def paint(self, scene: str) -> "Image":
        """Paint the grid, with a shape in the middle of each cell that is not empty."""
        from PIL import Image, ImageDraw

        paper, cells = _parse(scene)
        image = Image.new("RGB", (_SIDE * _CELL, _SIDE * _CELL), PAPERS[paper])
        pen = ImageDraw.Draw(image)
        for index, cell in enumerate(cells):
            if cell != _NONE:
                _draw_cell(pen, index, cell)
        return image

    def plan(self, rng: random.Random, scene: str, level: int) -> str | None:
        """Combine counts of colours and forms, at most one of them zero."""
        counts = self.quantities(scene)
        plan = sums.draw(rng, level, counts)
        if plan and sum(counts[name] == 0 for name in plan.split("|")[1:]) > 1:
            return None
        return plan

    def question(self, plan: str) -> str:
        """Ask, such as "What is the number of red shapes plus the number of circles?"."""
        return sums.words(plan, lambda quantity: f"the number of {_phrase(quantity)}")

    def solve(self, scene: str, plan: str) -> Solution:
        """Read the grid row by row, count, calculate."""
        return sums.solve(plan, self.quantities(scene), self.caption(scene))

    def misread(self, rng: random.Random, scene: str) -> str:
        """Change one cell to another shape, or to an empty cell."""
        paper, cells = _parse(scene)
        index = rng.randrange(len(cells))
        others = [f"{ink} {form}" for ink in _INKS for form in _FORMS]
        cells[index] = rng.choice([cell for cell in (*others, _NONE) if cell != cells[index]])
        return _text(paper, cells)

    def caption(self, scene: str) -> str:
        """List the cells, a line for each row."""
        cells = _parse(scene)[1]
        rows = (cells[start : start + _SIDE] for start in range(0, len(cells), _SIDE))
        return "\n".join(", ".join(row) for row in rows)

    def read(self, caption: str) -> str | None:
        """Take the cells, which must be as many as there are."""
        rows = [line.strip().split(", ") for line in caption.split("\n")]
        known = {_NONE, *(f"{ink} {form}" for ink in _INKS for form in _FORMS)}
        cells = [cell for row in rows for cell in row]
        if [len(row) for row in rows] != [_SIDE] * _SIDE or not known.issuperset(cells):
            return None
        return _text(next(iter(PAPERS)), cells)

    def quantities(self, scene: str) -> Mapping[str, int]:
        """The number of shapes of each colour and of each form."""
        cells = _parse(scene)[1]
        return {name: _count(cells, name) for name in (*_INKS, *_PLURALS)}
