"""What an equation between formulas states: 145 in `180° - 35° = 145°`, 5 in `a + b = 5`."""

from collections.abc import Sequence

from rlcs.grading import algebra
from rlcs.grading.measures import read_unit
from rlcs.grading.single import tree_of
from rlcs.grading.tokens import Token, Tokens
from rlcs.grading.tree import Node, Product, Sum, Sym, symbols, walk
from rlcs.grading.values import Value


def stated_values(parts: Sequence[Tokens], sides: Sequence[Value], *, rounded: bool) -> tuple[Value, ...]:
    r"""The values that an equation states: the last side of a + b = 5; both ends of 25 \pi = 78.5."""
    trees = [tree_of(_without_units(part)) for part in parts]
    first, last = trees[0], trees[-1]
    if first is None or last is None or symbols(last):
        return ()
    names = [node.name for node in walk(first) if isinstance(node, Sym)]
    if names and len(parts) == 2:
        plain = all(isinstance(node, Sum | Product | Sym) for node in walk(first))
        return (sides[-1],) if plain and len(set(names)) == len(names) else ()
    decimals = any("." in token.text for part in parts for token in part)  # rounded, maybe without saying so
    error = 0.02 if rounded else 0.001 if decimals else 0.0
    agree = all(
        tree is not None and (algebra.equal(tree, last) or _is_near(tree, last, error)) for tree in trees
    )
    return (sides[-1], sides[0]) if agree else ()


def _without_units(tokens: Tokens) -> Tokens:
    """Leave out units and degree signs, to work out `180° - 35°` or `3 cm + 2 cm`."""
    kept: list[Token] = []
    left_out = False
    for token in tokens:
        power = left_out and (token.text == "^" or (kept[-1:] and token.kind == "number" and not token.gap))
        is_word = token.kind == "word" and (token.upright or len(token.text) > 1)
        left_out = token.text == "°" or power or (is_word and read_unit(token.text, upright=True) is not None)
        if not left_out:
            kept.append(token)
    return kept


def _is_near(tree: Node, other: Node, error: float) -> bool:
    r"""Whether two numbers differ by at most a relative error, as in `20 \cos 30° = 17.3`."""
    one, two = (None if symbols(node) else algebra.number(node) for node in (tree, other))
    return one is not None and two is not None and abs(one - two) <= error * abs(two)
