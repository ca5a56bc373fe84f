r"""Sets of numbers: intervals, inequalities, unions and complements in one form.

`x < -1 or x > 1`, `(-\infty,-1)\cup(1,\infty)` and `\mathbb{R}\setminus[-1,1]` become the same two pieces.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from rlcs.grading import algebra
from rlcs.grading.tree import MINUS_ONE, Const, Node, Product
from rlcs.grading.values import Items, Piece, Region, Text, Value

INFINITY = Const("infinity")
MINUS_INFINITY = Product((MINUS_ONE, INFINITY))
_BRACKETS = frozenset(["()", "[)", "(]", "[]", "][", "]]", "[["])


def whole_line() -> Piece:
    """All real numbers."""
    return Piece(low=MINUS_INFINITY, high=INFINITY, low_closed=False, high_closed=False)


def point(node: Node) -> Piece:
    """The set of one number."""
    return Piece(low=node, high=node, low_closed=True, high_closed=True)


def position(node: Node) -> float | None:
    """Where an end of an interval lies on the line; None for one with variables."""
    if node == INFINITY:
        return math.inf
    if node == MINUS_INFINITY:
        return -math.inf
    value = algebra.number(node)
    return None if value is None or value.imag else value.real


def ray(operator: str, bound: Node) -> list[Piece]:
    r"""The numbers that are `<`, `\le`, `>`, `\ge` or `\ne` the bound."""
    if operator == "\\ne":
        return [*ray("<", bound), *ray(">", bound)]
    closed = operator in ("\\le", "\\ge")
    if operator in ("<", "\\le"):
        return [Piece(low=MINUS_INFINITY, high=bound, low_closed=False, high_closed=closed)]
    return [Piece(low=bound, high=INFINITY, low_closed=closed, high_closed=False)]


def as_pieces(value: Value) -> tuple[Piece, ...] | None:
    """The pieces of an interval, a region or a finite set of numbers; None for any other value."""
    if isinstance(value, Region):
        return value.pieces
    if not isinstance(value, Items):
        return None
    nodes = [None if isinstance(item, Text) else item.tree for item in value.items]
    if any(node is None for node in nodes):
        return None
    ends = [node for node in nodes if node is not None]
    if value.brackets in ("{}", ""):
        return tuple(sorted_pieces([point(node) for node in ends]))
    if value.brackets not in _BRACKETS or len(ends) != 2:
        return None
    low_closed, high_closed = value.brackets[0] == "[", value.brackets[1] == "]"
    return (Piece(low=ends[0], high=ends[1], low_closed=low_closed, high_closed=high_closed),)


def sorted_pieces(pieces: Sequence[Piece]) -> list[Piece]:
    """Order pieces along the line, if all their ends are numbers."""
    ends = [_ends(piece) for piece in pieces]
    lows = [end[0] for end in ends if end is not None]
    order = range(len(pieces))
    return [pieces[i] for i in (order if len(lows) < len(pieces) else sorted(order, key=lows.__getitem__))]


def union(pieces: Sequence[Piece]) -> list[Piece]:
    """Join pieces that overlap or touch; pieces with variables in their ends stay as they are."""
    joined: list[Piece] = []
    for piece in sorted_pieces(pieces):
        ends, last = _ends(piece), _ends(joined[-1]) if joined else None
        if ends is None or last is None or ends[0] > last[1]:
            joined.append(piece)
        elif last[1] < ends[1]:
            joined[-1] = replace(joined[-1], high=piece.high, high_closed=piece.high_closed)
    return joined


def _ends(piece: Piece) -> tuple[tuple[float, bool], tuple[float, bool]] | None:
    """Both ends such that `<` is their order on the line: an open low end is later, a closed high end too."""
    low, high = position(piece.low), position(piece.high)
    return None if low is None or high is None else ((low, not piece.low_closed), (high, piece.high_closed))


def complement(pieces: Sequence[Piece]) -> list[Piece]:
    """The numbers in none of the pieces, which must be in order and apart."""
    lows = [MINUS_INFINITY, *(piece.high for piece in pieces)]
    highs = [*(piece.low for piece in pieces), INFINITY]
    low_closed = [False, *(not piece.high_closed for piece in pieces)]
    high_closed = [*(not piece.low_closed for piece in pieces), False]
    gaps = [
        Piece(low=low, high=high, low_closed=first, high_closed=last)
        for low, high, first, last in zip(lows, highs, low_closed, high_closed, strict=True)
    ]
    return [gap for gap in gaps if gap.low != gap.high or (gap.low_closed and gap.high_closed)]


def intersection(one: Sequence[Piece], other: Sequence[Piece]) -> list[Piece]:
    """The numbers in both."""
    kept: list[Piece] = []
    for a, b in itertools.product(one, other):
        mine, theirs = _ends(a), _ends(b)
        if mine is None or theirs is None:
            continue
        if max(mine[0], theirs[0]) < min(mine[1], theirs[1]):
            left, right = a if mine[0] > theirs[0] else b, a if mine[1] <= theirs[1] else b
            kept.append(replace(left, high=right.high, high_closed=right.high_closed))
    return kept


def same_pieces(one: Sequence[Piece], other: Sequence[Piece]) -> bool | None:
    """Whether two sets of numbers are the same; None if an end cannot be compared here."""
    closed = [[(piece.low_closed, piece.high_closed) for piece in pieces] for pieces in (one, other)]
    if closed[0] != closed[1]:
        return False
    ends = [[end for piece in pieces for end in (piece.low, piece.high)] for pieces in (one, other)]
    verdicts = {algebra.equal(mine, theirs) for mine, theirs in zip(*ends, strict=True)}
    return False if False in verdicts else None if None in verdicts else True
