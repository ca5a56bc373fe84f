"""Bar charts of three or four bars on a unit scale, to read and compare. 112 x 84 pixels, 12 tokens."""

import random
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlcs.data.puzzles import sums
from rlcs.data.puzzles.family import COLOURS, PAPERS, Solution

if TYPE_CHECKING:
    from PIL.Image import Image

_SLOTS = 4
_SLOT = 28
_HEIGHT = 84
_UNIT = 7
_BASELINE = _HEIGHT - _UNIT
_TALLEST = 9
_LINE = (205, 205, 205)
_AXIS = (90, 90, 90)


def _parse(scene: str) -> tuple[str, list[tuple[str, int]]]:
    """Parse a scene into its paper and slots; an empty slot is `("none", 0)`."""
    paper, _, slots = scene.partition(":")
    pairs = (slot.split("=") for slot in slots.split(","))
    return paper, [(ink, int(height)) for ink, height in pairs]


def _text(paper: str, slots: list[tuple[str, int]]) -> str:
    return f"{paper}:{','.join(f'{ink}={height}' for ink, height in slots)}"


def _bars(scene: str) -> dict[str, int]:
    """Heights by colour, from left to right."""
    return {ink: height for ink, height in _parse(scene)[1] if height}


class Bars:
    """The family of bar charts. A scene reads `paper:colour=height,...` with four slots."""

    name = "bars"
    caption_lines = 1

    def scene(self, rng: random.Random, level: int) -> str:
        """Draw three or four bars of different colours, with heights 1 to 9."""
        inks = rng.sample(tuple(COLOURS), _SLOTS)
        slots = [(ink, rng.randint(1, _TALLEST)) for ink in inks]
        if rng.random() < 0.5:
            slots[rng.randrange(_SLOTS)] = ("none", 0)
        return _text(rng.choice(tuple(PAPERS)), slots)

    def paint(self, scene: str) -> "Image":
        """Paint bars on an axis, with a line at every unit of height."""
        from PIL import Image, ImageDraw

        paper, slots = _parse(scene)
        image = Image.new("RGB", (_SLOTS * _SLOT, _HEIGHT), PAPERS[paper])
        pen = ImageDraw.Draw(image)
        for unit in range(1, _TALLEST + 1):
            y = _BASELINE - unit * _UNIT
            pen.line((0, y, image.width, y), fill=_LINE)
        for index, (ink, height) in enumerate(slots):
            if height:
                x = index * _SLOT
                pen.rectangle(
                    (x + 5, _BASELINE - height * _UNIT, x + _SLOT - 6, _BASELINE), fill=COLOURS[ink]
                )
        pen.rectangle((0, _BASELINE, image.width, _BASELINE + 1), fill=_AXIS)
        return image

    def plan(self, rng: random.Random, scene: str, level: int) -> str | None:
        """Combine some heights, or ask for the sum of all."""
        bars = _bars(scene)
        if level > 1 and rng.random() < 0.25 and len(bars) == level + 1:
            return "total"
        plan = sums.draw(rng, level, self.quantities(scene))
        if plan and plan.startswith("subtract") and rng.random() < 0.5:
            return "subtract|tallest|shortest"
        return plan

    def question(self, plan: str) -> str:
        """Ask, such as "What is double the height of the red bar plus the height of the tallest bar?"."""
        if plan == "total":
            return "What is the height of all bars together?"
        return sums.words(plan, lambda quantity: f"the height of the {quantity} bar")

    def solve(self, scene: str, plan: str) -> Solution:
        """Read the bars from left to right, note those in the question, calculate."""
        if plan != "total":
            return sums.solve(plan, self.quantities(scene), self.caption(scene))
        sheet = sums.Worksheet()
        answer = sheet.total(list(_bars(scene).values()))
        return Solution(reading=self.caption(scene), steps=tuple(sheet.lines), answer=answer)

    def misread(self, rng: random.Random, scene: str) -> str:
        """Change the height of one bar by one or two units."""
        paper, slots = _parse(scene)
        index = rng.choice([i for i, (_, height) in enumerate(slots) if height])
        ink, height = slots[index]
        near = [height + error for error in (-2, -1, 1, 2) if 1 <= height + error <= _TALLEST]
        slots[index] = (ink, rng.choice(near))
        return _text(paper, slots)

    def caption(self, scene: str) -> str:
        """Colour and height of each bar, from left to right."""
        return ", ".join(f"{ink}={height}" for ink, height in _bars(scene).items())

    def read(self, caption: str) -> str | None:
        """Take the bars, at most as many as there are slots; one of height 0 is not there."""
        pairs = re.findall(r"(\w+)=(\d+)", caption)
        heights = {ink: int(height) for ink, height in pairs if ink in COLOURS}
        if (
            not any(heights.values())
            or len(heights) > _SLOTS
            or caption.strip() != ", ".join(f"{i}={h}" for i, h in pairs)
        ):
            return None
        return _text(next(iter(PAPERS)), list(heights.items())) if len(heights) == len(pairs) else None

    def quantities(self, scene: str) -> Mapping[str, int]:
        """The height of each bar, of the tallest and of the shortest."""
        bars = _bars(scene)
        return {**bars, "tallest": max(bars.values()), "shortest": min(bars.values())}
