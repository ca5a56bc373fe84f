"""The kinds of values that an answer can be: what `reading` makes of text, and `compare` compares.

`str(value)` is the value in words for people, `kind` the name of its kind, `source` the answer as LaTeX in
one spelling (equal sources are equal answers, and math-verify reads it).
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from rlcs.grading.dates import Date
from rlcs.grading.measures import Unit
from rlcs.grading.tree import Node


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """An answer; `tree` is its formula, if it is one that this package can read."""

    KIND: ClassVar[str] = "text"
    source: str
    tree: Node | None = None

    @property
    def kind(self) -> str:
        """The name of the value's kind."""
        return self.KIND

    def __str__(self) -> str:
        return self.source


@dataclass(frozen=True, kw_only=True, slots=True)
class Text(Value):
    """Words, or what is nothing else; `words` are in lower case, without articles and punctuation."""

    words: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Number(Value):
    """A rational number, exactly; a percentage keeps its sign: 50% has the value 50 and the tree 1/2."""

    KIND: ClassVar[str] = "number"
    value: Fraction
    percent: bool = False

    def __str__(self) -> str:
        sign = "%" if self.percent else ""
        text = f"{self.value}{sign}"
        return text if text == self.source or len(text) > 40 else f"{text}, written {self.source}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Expression(Value):
    """A formula that is no rational number; without a tree only math-verify can read it."""

    KIND: ClassVar[str] = "expression"


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity(Value):
    """A magnitude with a unit; `tree` is the product that it would be if the unit were a variable: 5 m."""

    KIND: ClassVar[str] = "quantity"
    magnitude: Value
    unit: Unit

    def __str__(self) -> str:
        return f"{self.magnitude} {self.unit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Named(Value):
    """A value with a name: x = 5, f(x) = x^2, AB : BC = 3 : 4; `tree` is the difference of the two sides."""

    KIND: ClassVar[str] = "named value"
    name: str
    value: Value

    def __str__(self) -> str:
        return f"{self.name} = {self.value}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation(Value):
    """An equation or another relation that gives no variable a value; `tree` is left minus right."""

    KIND: ClassVar[str] = "relation"
    operators: tuple[str, ...]
    sides: tuple[Value, ...]
    stated: tuple[Value, ...] = ()
    """The values that it states: 5 in a + b = 5; 25 pi and 78.5 in 25 pi = 78.5."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """An interval of a set of numbers, or a point (`low` equals `high`)."""

    low: Node
    high: Node
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Region(Value):
    """A set of numbers in pieces, in order; `variable` is the one that an inequality limits, or ""."""

    KIND: ClassVar[str] = "set"
    pieces: tuple[Piece, ...]
    variable: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Items(Value):
    """Several values; `brackets` are "" for a plain list, "{}", "()", "[)" ..."""

    brackets: str
    items: tuple[Value, ...]

    @property
    def kind(self) -> str:
        """A set, a tuple, a list, or a list of named values."""
        if self.items and all(isinstance(item, Named) for item in self.items):
            return "named values"
        return {"": "list", "{}": "set"}.get(self.brackets, "tuple")

    def __str__(self) -> str:
        inside = ", ".join(map(str, self.items))
        return f"{self.brackets[:1]}{inside}{self.brackets[1:]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix(Value):
    """Rows of values."""

    KIND: ClassVar[str] = "matrix"
    rows: tuple[tuple[Value, ...], ...]

    def __str__(self) -> str:
        return "[" + "; ".join(", ".join(map(str, row)) for row in self.rows) + "]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio(Value):
    """The parts of a ratio, or of a time of day without words: 3 : 4, 12 : 30."""

    KIND: ClassVar[str] = "ratio"
    parts: tuple[Value, ...]

    def __str__(self) -> str:
        return " : ".join(map(str, self.parts))


@dataclass(frozen=True, kw_only=True, slots=True)
class Based(Value):
    """A number written in a base; `value` is None if a digit is too large for it."""

    KIND: ClassVar[str] = "number in a base"
    digits: str
    base: int
    value: Fraction | None

    def __str__(self) -> str:
        return f"{self.digits} in base {self.base}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dated(Value):
    """A date, a time of day or a range."""

    KIND: ClassVar[str] = "date"
    date: Date

    def __str__(self) -> str:
        return str(self.date)


@dataclass(frozen=True, kw_only=True, slots=True)
class Letters(Value):
    """Letters of choices, in capitals."""

    KIND: ClassVar[str] = "choice letters"
    letters: frozenset[str]

    def __str__(self) -> str:
        return ", ".join(sorted(self.letters))
