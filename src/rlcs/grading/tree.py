"""The expression tree: what a formula in an answer is read into (`reading`), and what `algebra` compares.

Nodes are immutable and hashable; a node is equal to another only if both are written alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Num:
    """A rational number as written: `3`, `0.25`, `1.5e8`."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Const:
    """A mathematical constant: `pi`, `e`, `i` (the imaginary unit) or `infinity`."""

    name: str


@dataclass(frozen=True, slots=True)
class Sym:
    """A variable or a name: `x`, `theta`, `x_1`, `S_{ABC}`; Greek letters are spelled without a backslash."""

    name: str


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum of two or more terms; a difference has a term times -1."""

    terms: "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class Product:
    """The product of two or more factors; a quotient has a factor to the power -1."""

    factors: "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class Power:
    """A base to an exponent; a square root has the exponent 1/2."""

    base: "Node"
    exponent: "Node"


@dataclass(frozen=True, slots=True)
class Call:
    r"""A function of one or more arguments.

    The names known to `algebra`: sin cos tan cot sec csc, their inverses (arcsin ...), sinh cosh tanh,
    ln, log (argument, base), abs, factorial, binom (n, k), floor, ceil. Any other name (`f`, `mod`) is a
    function of which nothing is known but its name and arguments.
    """

    name: str
    arguments: "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class PlusMinus:
    r"""Both signs of a term: `\pm x`; with `opposite` the other sign first: `\mp x`."""

    term: "Node"
    opposite: bool = False


Node = Num | Const | Sym | Sum | Product | Power | Call | PlusMinus

MINUS_ONE = Num(Fraction(-1))
HALF = Num(Fraction(1, 2))


def children(node: Node) -> tuple[Node, ...]:
    """The nodes directly below a node."""
    if isinstance(node, Num | Sym | Const):
        return ()
    if isinstance(node, Product):
        return node.factors
    if isinstance(node, Power):
        return node.base, node.exponent
    if isinstance(node, Sum):
        return node.terms
    return node.arguments if isinstance(node, Call) else (node.term,)


def walk(node: Node) -> Iterator[Node]:
    """The node and all nodes below it."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(children(node))


def symbols(node: Node) -> frozenset[str]:
    """The names of the variables in a tree."""
    return frozenset(n.name for n in walk(node) if isinstance(n, Sym))


def both_signs(node: Node) -> tuple[Node, ...]:
    r"""The formulas that one with `\pm` stands for: all upper signs, then all lower ones."""
    both = any(isinstance(below, PlusMinus) for below in walk(node))
    return (_with_sign(node, upper=True), _with_sign(node, upper=False)) if both else (node,)


def _with_sign(node: Node, *, upper: bool) -> Node:
    parts = tuple(_with_sign(child, upper=upper) for child in children(node))
    if isinstance(node, PlusMinus):
        return parts[0] if upper != node.opposite else Product((MINUS_ONE, parts[0]))
    return _with_children(node, parts)


def replaced(node: Node, old: Node, new: Node) -> Node:
    """The tree with every node that equals `old` replaced, but in the arguments of functions."""
    if node == old or isinstance(node, Call):
        return new if node == old else node
    return _with_children(node, tuple(replaced(child, old, new) for child in children(node)))


def _with_children(node: Node, parts: tuple[Node, ...]) -> Node:
    if isinstance(node, Power | Call):
        return Power(*parts) if isinstance(node, Power) else Call(node.name, parts)
    return type(node)(parts) if isinstance(node, Sum | Product) else node
