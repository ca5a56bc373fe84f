"""Figures on a unit grid: a rectangle, or two stacked into an L. 84 x 84 pixels, 9 tokens.

Questions are about area and perimeter.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlcs.data.puzzles import sums
from rlcs.data.puzzles.family import COLOURS, PAPERS, Solution

if TYPE_CHECKING:
    from PIL.Image import Image

_COLUMNS, _ROWS = 6, 6
_UNIT = 14
_LINE = (190, 190, 190)
_ASKS = {
    "perimeter": "What is the perimeter of the figure?",
    "area": "What is the area of the figure?",
    "sum": "What is the area plus the perimeter of the figure?",
    "difference": "What is the area minus the perimeter of the figure?",
}


@dataclass(frozen=True, slots=True)
class _Part:
    """A rectangle of one colour, in units."""

    ink: str
    width: int
    height: int

    def text(self) -> str:
        return f"{self.ink}={self.width}*{self.height}"


@dataclass(frozen=True, slots=True)
class _Figure:
    """One part, or an upper and a lower one of different widths, in the lower left corner."""

    paper: str
    parts: tuple[_Part, ...]

    @property
    def width(self) -> int:
        return max(part.width for part in self.parts)

    def text(self) -> str:
        parts = ",".join(part.text() for part in self.parts)
        return f"{self.paper}:{parts}"


def _parse(scene: str) -> _Figure:
    paper, _, what = scene.partition(":")
    parts = []
    for text in what.split(","):
        ink, _, sides = text.partition("=")
        parts.append(_Part(ink, *map(int, sides.split("*"))))
    return _Figure(paper, tuple(parts))


class Figures:
    """The family of figures. A scene reads `paper:colour=width*height,...`."""

    name = "figures"
    caption_lines = 1

    def scene(self, rng: random.Random, level: int) -> str:
        """Draw a rectangle on level 1, an L on level 3, either on level 2; it never fills the grid."""
        inks = rng.sample(tuple(COLOURS), 2)
        widths, heights = [rng.randint(2, _COLUMNS)], [rng.randint(2, _ROWS - 1)]
        if rng.random() < (level - 1) / 2:
            widths = rng.sample(range(2, _COLUMNS + 1), 2)
            upper = rng.randint(1, _ROWS - 2)
            heights = [upper, rng.randint(1, _ROWS - 1 - upper)]
        parts = tuple(_Part(*sides) for sides in zip(inks, widths, heights, strict=False))
        return _Figure(rng.choice(tuple(PAPERS)), parts).text()

    def paint(self, scene: str) -> "Image":
        """Paint the parts from top to bottom, then the lines of the unit grid."""
        from PIL import Image, ImageDraw

        figure = _parse(scene)
        image = Image.new("RGB", (_COLUMNS * _UNIT, _ROWS * _UNIT), PAPERS[figure.paper])
        pen = ImageDraw.Draw(image)
        top = image.height - sum(part.height for part in figure.parts) * _UNIT
        for part in figure.parts:
            bottom = top + part.height * _UNIT
            pen.rectangle((0, top, part.width * _UNIT - 1, bottom - 1), fill=COLOURS[part.ink])
            top = bottom
        for x in range(0, image.width, _UNIT):
            pen.line((x, 0, x, image.height), fill=_LINE)
        for y in range(0, image.height, _UNIT):
            pen.line((0, y, image.width, y), fill=_LINE)
        return image

    def plan(self, rng: random.Random, scene: str, level: int) -> str | None:
        """Ask for perimeter or area, or on level 3 and for a rectangle on level 2 for both combined."""
        single = level == 1 or (level == 2 and len(_parse(scene).parts) == 2)
        plan = rng.choice(("perimeter", "area") if single else ("sum", "difference"))
        return plan if self.solve(scene, plan).answer >= 0 else None

    def question(self, plan: str) -> str:
        """Return the fixed sentence of a plan."""
        return _ASKS[plan]

    def solve(self, scene: str, plan: str) -> Solution:
        """Read the parts; calculate area (of each) and perimeter (an L has that of the box around it)."""
        figure, sheet = _parse(scene), sums.Worksheet()
        area = perimeter = 0
        if plan != "perimeter":
            area = sheet.total([sheet.work(part.width, "*", part.height) for part in figure.parts])
        if plan != "area":
            height = sheet.total([part.height for part in figure.parts])
            perimeter = sheet.work(2, "*", sheet.work(figure.width, "+", height))
        signs = {"sum": "+", "difference": "-"}
        answer = sheet.work(area, signs[plan], perimeter) if plan in signs else area + perimeter
        return Solution(reading=self.caption(scene), steps=tuple(sheet.lines), answer=answer)

    def misread(self, rng: random.Random, scene: str) -> str:
        """Change the length of one side by one or two units."""
        figure = _parse(scene)
        parts = list(figure.parts)
        index, error = rng.randrange(len(parts)), rng.choice((-2, -1, 1, 2))
        part = parts[index]
        if rng.random() < 0.5:
            parts[index] = replace(part, width=min(max(part.width + error, 1), _COLUMNS))
        else:
            parts[index] = replace(part, height=min(max(part.height + error, 1), _ROWS))
        return replace(figure, parts=tuple(parts)).text()

    def caption(self, scene: str) -> str:
        """Colour, width and height of each part, from top to bottom."""
        return ", ".join(part.text() for part in _parse(scene).parts)

    def read(self, caption: str) -> str | None:
        """Take one or two parts; sides may be any."""
        parts = [re.fullmatch(r"(\w+)=\d+\*\d+", part) for part in caption.strip().split(", ")]
        if len(parts) > 2 or not all(part and part[1] in COLOURS for part in parts):
            return None
        return f"{next(iter(PAPERS))}:{','.join(part[0] for part in parts if part)}"

    def quantities(self, scene: str) -> Mapping[str, int]:
        """Width and height of each part."""
        sides: dict[str, int] = {}
        for part in _parse(scene).parts:
            sides |= {f"{part.ink} width": part.width, f"{part.ink} height": part.height}
        return sides
