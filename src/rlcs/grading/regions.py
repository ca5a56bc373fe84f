r"""Sets of numbers: intervals, inequalities, unions and complements in one form.

`x < -1 or x > 1`, `(-\infty,-1)\cup(1,\infty)` and `\mathbb{R}\setminus[-1,1]` become the same two pieces.
"""

import math
from collections.abc import Sequence

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
    places = [position(piece.low) for piece in pieces]
    if any(place is None for place in places):
        return list(pieces)
    order = sorted(range(len(pieces)), key=lambda i: (places[i] or 0.0, not pieces[i].low_closed))
    return [pieces[i] for i in order]


def union(pieces: Sequence[Piece]) -> list[Piece]:
    """Join pieces that overlap or touch; pieces with variables in their ends stay as they are."""
    joined: list[Piece] = []
    for piece in sorted_pieces(pieces):
        last = joined[-1] if joined else None
        if last is None or not _touch(last, piece):
            joined.append(piece)
        elif _ends_before(last, piece):
            joined[-1] = Piece(
                low=last.low, high=piece.high, low_closed=last.low_closed, high_closed=piece.high_closed
            )
    return joined


def _ends(piece: Piece) -> tuple[float, float] | None:
    low, high = position(piece.low), position(piece.high)
    return None if low is None or high is None else (low, high)


def _touch(first: Piece, second: Piece) -> bool:
    """Whether the second of two pieces in order leaves no gap after the first."""
    one, other = _ends(first), _ends(second)
    if one is None or other is None:
        return False
    return other[0] < one[1] or (other[0] == one[1] and (first.high_closed or second.low_closed))


def _ends_before(first: Piece, second: Piece) -> bool:
    one, other = _ends(first), _ends(second)
    if one is None or other is None:
        return False
    return (one[1], first.high_closed) < (other[1], second.high_closed)


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
    for a in one:
        for b in other:
            ends = _ends(a), _ends(b)
            if ends[0] is None or ends[1] is None:
                continue
            (a_low, a_high), (b_low, b_high) = ends[0], ends[1]
            low = max((a_low, not a.low_closed, 0), (b_low, not b.low_closed, 1))
            high = min((a_high, a.high_closed, 0), (b_high, b.high_closed, 1))
            if low[0] < high[0] or (low[0] == high[0] and not low[1] and high[1]):
                kept.append(
                    Piece(
                        low=(a, b)[low[2]].low,
                        high=(a, b)[high[2]].high,
                        low_closed=not low[1],
                        high_closed=high[1],
                    )
                )
    return kept


def same_pieces(one: Sequence[Piece], other: Sequence[Piece]) -> bool | None:
    """Whether two sets of numbers are the same; None if an end cannot be compared here."""
    if len(one) != len(other):
        return False
    undecided = False
    for a, b in zip(one, other, strict=True):
        if (a.low_closed, a.high_closed) != (b.low_closed, b.high_closed):
            return False
        for mine, theirs in ((a.low, b.low), (a.high, b.high)):
            same = algebra.equal(mine, theirs)
            if same is False:
                return False
            undecided = undecided or same is None
    return None if undecided else True
