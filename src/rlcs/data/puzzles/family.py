"""The protocol of a family of visual puzzles, and the colours and texts that all families share.

A *scene* is a short canonical text of everything in an image: two images are equal exactly when their
scenes are. A *plan* is a short text that encodes a question. Both are strings in `Problem.metadata`
and all that the built-in teacher needs. To add a family, write one file with such a class and list it
in `families()`.
"""

import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

Split = Literal["train", "test"]
Rgb = tuple[int, int, int]

COLOURS: Mapping[str, Rgb] = MappingProxyType(
    {
        "red": (220, 40, 40),
        "green": (40, 170, 60),
        "blue": (50, 80, 220),
        "yellow": (235, 205, 40),
        "purple": (150, 60, 190),
        "black": (40, 40, 40),
    }
)
"""Names and values of the colours that carry meaning."""

PAPERS: Mapping[str, Rgb] = MappingProxyType(
    {
        "white": (255, 255, 255),
        "grey": (232, 232, 232),
        "cream": (252, 244, 222),
        "mint": (226, 246, 232),
        "sky": (226, 238, 252),
    }
)
"""Backgrounds: they carry no meaning and make more scenes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """A worked answer: the reading of the image, the calculation, and the result."""

    reading: str
    steps: tuple[str, ...]
    answer: int

    def text(self) -> str:
        """The reasoning as a teacher writes it: a line for each step, then the boxed answer."""
        return "\n".join((self.reading, *self.steps, boxed(self.answer)))


def listed(quantities: Mapping[str, int], names: Iterable[str]) -> str:
    """List some of the quantities, such as "red=3, squares=2"."""
    return ", ".join(f"{name}={quantities[name]}" for name in names)


class Family(Protocol):
    """One kind of image with its questions. All methods are pure; randomness comes from `rng`."""

    @property
    def name(self) -> str:
        """The name of the family in ids, tables and recipes."""
        ...

    def scene(self, rng: random.Random, level: int) -> str:
        """Draw the content of an image that suits a question of this level."""
        ...

    def paint(self, scene: str) -> "Image":
        """Paint the image of a scene, RGB."""
        ...

    def plan(self, rng: random.Random, scene: str, level: int) -> str | None:
        """Draw a question about a scene; None if the one that was drawn does not suit it."""
        ...

    def question(self, plan: str) -> str:
        """The text of the question."""
        ...

    def solve(self, scene: str, plan: str) -> Solution:
        """Solve any scene of the family."""
        ...

    def misread(self, rng: random.Random, scene: str) -> str:
        """Change one thing in the scene, as a misreading would."""
        ...

    def caption(self, scene: str) -> str:
        """Describe everything in the image, in a fixed order."""
        ...

    @property
    def caption_lines(self) -> int:
        """Lines of a caption."""
        ...

    def read(self, caption: str) -> str | None:
        """A scene with this caption; None for a text that is no caption of the family."""
        ...

    def quantities(self, scene: str) -> Mapping[str, int]:
        """The quantities that can be counted or measured in the image, by name."""
        ...


def boxed(answer: int | str) -> str:
    r"""Format a final answer: `\boxed{...}`."""
    return f"\\boxed{{{answer}}}"


def split_of(family: str, scene: str) -> Split:
    """The split that a scene belongs to, by its content alone: a fifth of all possible scenes is test."""
    digest = hashlib.sha256(f"{family}|{scene}".encode()).digest()
    return "test" if digest[0] % 5 == 0 else "train"


def draw_scene(family: Family, rng: random.Random, level: int, split: Split) -> str:
    """Draw scenes until one belongs to the split."""
    while True:
        scene = family.scene(rng, level)
        if split_of(family.name, scene) == split:
            return scene
