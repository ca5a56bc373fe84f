"""Reads what is no list and no relation: a number, a percentage, money, a quantity, a formula, or text."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from rlcs.grading import algebra
from rlcs.grading.formulas import NotAFormulaError, is_word, read_formula
from rlcs.grading.measures import Unit, read_unit
from rlcs.grading.tokens import Tokens, enclosed, latex, spoken, steps
from rlcs.grading.tree import MINUS_ONE, Node, PlusMinus, Product, Sum, Sym, both_signs, symbols, walk
from rlcs.grading.values import Expression, Items, Number, Quantity, Text, Value

_MONEY = frozenset("$ € £ ¥ ₹ ₽ ₩".split())
_ARTICLE = re.compile(r"(?:an?|the) (?=\S)")


def plain_words(text: str) -> str:
    """Words in lower case, without hyphens, quotes, a leading article and punctuation at the end."""
    words = " ".join(re.sub(r"[-\s]+", " ", text).casefold().split()).strip("*`\"'.,; ")
    return words[article.end() :] if (article := _ARTICLE.match(words)) else words


def text_of(tokens: Tokens) -> Text:
    text = spoken(tokens)
    return Text(source=latex(tokens), words=plain_words(text))


def tree_of(tokens: Tokens) -> Node | None:
    try:
        return read_formula(tokens)
    except NotAFormulaError:
        return None


def difference(left: Node, right: Node) -> Node:
    return Sum((left, Product((MINUS_ONE, right))))


def read_single(tokens: Tokens, source: str) -> Value:
    """Read a number, a quantity or a formula; what is none of them is text."""
    for rule in (_percentage, _money, _compound, _quantity):
        if (value := rule(tokens, source)) is not None:
            return value
    tree = tree_of(tokens)
    if tree is None:
        wordy = any(is_word(token) for token in tokens)
        formula = any(token.kind in ("number", "command") or token.text == "^" for token in tokens)
        return Expression(source=source) if formula and not wordy else text_of(tokens)
    return of_tree(tree, source)


def of_tree(tree: Node, source: str) -> Value:
    if any(isinstance(node, PlusMinus) for node in walk(tree)):
        both = both_signs(tree)
        return Items(source=source, brackets="", items=tuple(of_tree(one, source) for one in both))
    if symbols(tree):
        return Expression(source=source, tree=tree)
    value = algebra.exact(tree)
    return (
        Expression(source=source, tree=tree)
        if value is None
        else Number(source=source, tree=tree, value=value)
    )


def _percentage(tokens: Tokens, source: str) -> Value | None:
    words = [token.text.lower() for token in tokens[-2:]]
    length = 1 if words[-1] in ("%", "percent", "pct") else 2 if words == ["per", "cent"] else 0
    if not length or length == len(tokens):
        return None
    value = read_single(tokens[:-length], source)
    return replace(value, percent=True, source=source) if isinstance(value, Number) else None


def _money(tokens: Tokens, source: str) -> Value | None:
    """Read an amount after a currency sign: `$5`, `-$5`."""
    position = 1 if tokens[0].text == "-" else 0
    if len(tokens) <= position + 1 or tokens[position].text not in _MONEY:
        return None
    unit = read_unit(tokens[position].text, upright=True)
    amount = [*tokens[:position], *tokens[position + 1 :]]
    value = read_single(amount, latex(amount))
    if unit is None or not isinstance(value, Number | Expression | Quantity):
        return text_of(tokens)
    if isinstance(value, Quantity):
        return value if value.unit.same(unit) else text_of(tokens)
    return Quantity(source=source, magnitude=value, unit=unit)


def _compound(tokens: Tokens, source: str) -> Value | None:
    """Read several quantities in a row as one: `3 hours 15 minutes`, `5 ft 3 in`."""
    starts = [
        i for i, token in enumerate(tokens) if i > 1 and token.kind == "number" and tokens[i - 1].kind == "word"
    ]
    if not starts or tokens[0].kind != "number":
        return None
    parts = [tokens[a:b] for a, b in pairwise([0, *starts, len(tokens)])]
    values = [_quantity(part, latex(part)) for part in parts]
    if not all(isinstance(value, Quantity) for value in values):
        return None
    return Items(source=source, brackets="", items=tuple(value for value in values if value is not None))


def _quantity(tokens: Tokens, source: str) -> Value | None:
    """Read a value with a unit at its end: the longest tail that is a unit, after a value without variables."""
    for start in _unit_starts(tokens):
        head, tail = tokens[:start], tokens[start:]
        unit = _unit(tail)
        tree = tree_of(head) if unit else None
        if unit is None or tree is None:
            continue
        letter = len(spoken(tail)) == 1 and tail[0].kind == "word" and not tail[0].upright
        if letter and head[-1].kind == "command":
            continue  # 2\\pi h
        if symbols(tree) and (letter or not tail[0].gap and not tail[0].upright):
            continue
        if letter and isinstance(tree, Sum) and not enclosed(head) and head[-1].kind != "}":
            if not (len(tree.terms) == 2 and "+" not in latex(head) and "-" not in latex(head)):
                continue
        magnitude = of_tree(tree, latex(head))
        if not isinstance(magnitude, Number | Expression):
            continue
        formula = Product((tree, Sym(tail[0].text))) if letter else None
        return Quantity(source=source, magnitude=magnitude, unit=unit, tree=formula)
    return None


def _unit_starts(tokens: Tokens) -> Iterator[int]:
    """Where the unit may begin: at a word, a degree sign, a unit's symbol or a bracket before one."""
    for position, (token, depth) in enumerate(zip(tokens, steps(tokens), strict=True)):
        if position == 0:
            continue
        opens = depth == 1 and token.text in ("{", "(") and position + 1 < len(tokens)
        first = tokens[position + 1] if opens or token.text == "\\frac" else token
        first = tokens[position + 2] if token.text == "\\frac" and position + 2 < len(tokens) else first
        starts = first.kind == "word" or first.text in ("°", "\\mu", "\\Omega", "¢", "€", "£", "¥", "$")
        if (depth == 0 or opens or token.text == "\\frac") and starts:
            yield position


def _unit(tail: Tokens) -> Unit | None:
    """The unit that tokens name; `\\frac{m}{s^2}` is m/s^2."""
    if any(token.kind == "number" and i and tail[i - 1].kind == "number" for i, token in enumerate(tail)):
        return None
    if tail[0].text == "\\frac":
        over, under = _groups(tail[1:])
        text = f"{spoken(over)}/{spoken(under)}" if over and under else ""
    elif enclosed(tail):
        text = spoken(tail[1:-1])
    else:
        text = spoken(tail)
    text = text.replace("Omega", "Ω").replace("mu ", "μ").replace("mu", "μ")
    upright = all(token.upright for token in tail if token.kind == "word")
    return read_unit(text, upright=upright) if text else None


def _groups(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """The contents of two groups in braces that are all of the tokens, else two empty lists."""
    ends = [i for i, depth in enumerate(steps(tokens)) if depth == 0]
    if len(ends) == 2 and ends[1] == len(tokens) - 1 and tokens[0].text == tokens[ends[0] + 1].text == "{":
        return tokens[1 : ends[0]], tokens[ends[0] + 2 : -1]
    return [], []
