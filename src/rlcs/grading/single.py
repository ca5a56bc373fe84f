"""Reads what is no list and no relation: a number, a percentage, money, a quantity, a formula, or text."""

import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from rlcs.grading import algebra
from rlcs.grading.formulas import NotAFormulaError, is_word, read_formula
from rlcs.grading.measures import Unit, read_unit
from rlcs.grading.tokens import Tokens, enclosed, end_of_group, latex, spoken, steps
from rlcs.grading.tree import MINUS_ONE, Node, Num, PlusMinus, Product, Sum, Sym, both_signs, symbols, walk
from rlcs.grading.values import Expression, Items, Number, Quantity, Text, Value

_MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_MULTIPLIERS |= {"trillion": 10**12, "百": 100, "千": 10**3, "万": 10**4, "亿": 10**8}
_MONEY = frozenset("$ € £ ¥ ₹ ₽ ₩".split())
_MAX_UNIT = 40
"""Most tokens of a unit."""
_OF_ANGLES = frozenset("\\sin \\cos \\tan \\cot \\sec \\csc".split())
_PERCENT = ("%", "percent", "pct")
_ARTICLE = re.compile(r"(?:an?|the) (?=\S)")


def plain_words(text: str) -> str:
    """Words in lower case, without hyphens, quotes, a leading article and punctuation at the end."""
    words = " ".join(re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])|\s+", " ", text).casefold().split()).strip('*`".,; ')
    words = words[1:-1] if words[:1] == words[-1:] == "'" else words
    return words[article.end() :] if (article := _ARTICLE.match(words)) else words


def text_of(tokens: Tokens) -> Text:
    """The tokens as text."""
    text = spoken(tokens)
    return Text(source=latex(tokens), words=plain_words(text))


def tree_of(tokens: Tokens) -> Node | None:
    """The tokens as a formula, or None."""
    try:
        return read_formula(tokens)
    except NotAFormulaError:
        return None


def difference(left: Node, right: Node) -> Node:
    """The formula left - right."""
    return Sum((left, Product((MINUS_ONE, right))))


def read_single(tokens: Tokens, source: str) -> Value:
    """Read a number, a quantity or a formula; what is none of them is text. `source`: the same as LaTeX."""
    tokens = _with_multiplier(tokens)
    for rule in (_percentage, _money, _compound, _quantity):
        if (value := rule(tokens, source)) is not None:
            return value
    tree = tree_of(tokens)
    if tree is None:
        two_before = ["", "", *(token.text for token in tokens)]  # a brace stands between \begin and a name
        wordy = any(
            is_word(token) and before not in ("\\begin", "\\end")
            for token, before in zip(tokens, two_before, strict=False)
        )
        formula = any(token.kind in ("number", "command") or token.text == "^" for token in tokens)
        formula = formula and tokens[-1].text not in ("'", '"')  # 15' are minutes of arc
        return Expression(source=source) if formula and not wordy else text_of(tokens)
    return of_tree(tree, source)


def of_tree(tree: Node, source: str) -> Value:
    """Make a value of a formula: a number where it is one, two values for a plus-minus sign."""
    if any(isinstance(node, PlusMinus) for node in walk(tree)):
        upper = source.replace("\\pm", "+").replace("\\mp", "-")
        lower = source.replace("\\pm", "-").replace("\\mp", "+")
        signs = zip(both_signs(tree), (upper, lower), strict=True)
        items = tuple(of_tree(one, text.replace("+ ", "+").replace("- ", "-")) for one, text in signs)
        return Items(source=source, brackets="", items=items)
    if symbols(tree):
        return Expression(source=source, tree=tree)
    value = algebra.exact(tree)
    if value is None:
        return Expression(source=source, tree=tree)
    return Number(source=source, tree=Num(value), value=value)


def _with_multiplier(tokens: Tokens) -> Tokens:
    """Work out a number word after a number at the start: `5 million` is 5000000."""
    number, *rest = tokens
    factor = _MULTIPLIERS.get(rest[0].text.lower()) if rest else None
    if factor is None or number.kind != "number" or len(number.text) > 20:
        return tokens
    value = Fraction(number.text) * factor
    return [number._replace(text=str(value)), *rest[1:]] if value.denominator == 1 else tokens


def _percentage(tokens: Tokens, source: str) -> Value | None:
    words = [token.text.lower() for token in tokens[-2:]]
    length = 1 if words[-1] in _PERCENT else 2 if words == ["per", "cent"] else 0
    if not length or length == len(tokens) or tokens[-length - 1].text.lower() in (*_PERCENT, "cent"):
        return None
    value = read_single(tokens[:-length], source)
    if not isinstance(value, Number):
        return None
    return replace(value, percent=True, source=source, tree=Num(value.value / 100))


def _money(tokens: Tokens, source: str) -> Value | None:
    """Read an amount after a currency sign: `$5`, `-$5`."""
    position = 1 if tokens[0].text == "-" else 0
    signs = [token.text in _MONEY for token in tokens[position : position + 2]]
    if signs != [True, False]:
        return None
    amount = [*tokens[:position], *tokens[position + 1 :]]
    per = next((i for i, token in enumerate(amount) if token.text == "per" and i), len(amount))
    unit = read_unit(f"{tokens[position].text} {spoken(amount[per:])}".strip(), upright=True)
    amount = amount[:per]
    value = read_single(amount, latex(amount))
    if unit is None or not isinstance(value, Number | Expression | Quantity):
        return text_of(tokens)
    if isinstance(value, Quantity):
        return value if value.unit.same(unit) else text_of(tokens)
    return Quantity(source=source, magnitude=value, unit=unit)


def _compound(tokens: Tokens, source: str) -> Value | None:
    """Read several quantities in a row as one: `3 hours 15 minutes`, `5 ft 3 in`."""
    kinds = [token.kind for token in tokens]
    starts = [i for i, pair in enumerate(pairwise(kinds), 1) if i > 1 and pair == ("word", "number")]
    if not starts or tokens[0].kind != "number":
        return None
    parts = [tokens[a:b] for a, b in pairwise([0, *starts, len(tokens)])]
    values = [_quantity(part, latex(part)) for part in parts]
    if not all(isinstance(value, Quantity) for value in values):
        return None
    return Items(source=source, brackets="", items=tuple(value for value in values if value is not None))


def _quantity(tokens: Tokens, source: str) -> Value | None:
    """Read a value with a unit at its end: the longest tail that is a unit, after a value of no variables."""
    for start in _unit_starts(tokens):
        head, tail = tokens[:start], tokens[start:]
        unit = _unit(tail)
        tree = tree_of(head) if unit else None
        if unit is None or tree is None:
            continue
        alone = len(spoken(tail)) == 1 and tail[0].kind == "word"
        letter = alone and not tail[0].upright  # then it may be a variable
        if tail[0].text in ("A", "mg") and not (tail[0].gap or tail[0].upright):
            continue  # 3mg is 3 times m times g, 5A is 5 times A
        if letter and head[-1].kind == "command":
            continue  # 2\pi h is a product with a variable
        if tail[0].text == "°" and {token.text for token in head} & _OF_ANGLES:
            continue  # \sin 30° is the sine of an angle
        if symbols(tree) and (letter or not (tail[0].gap or tail[0].upright)):
            continue
        if letter and isinstance(tree, Sum) and not enclosed(head) and {t.text for t in head} & {"+", "-"}:
            continue  # 10 - 4 m has a variable; 2 1/2 m, a sum without a sign, has a unit
        magnitude = of_tree(tree, latex(head))
        if not isinstance(magnitude, Number | Expression):
            continue
        formula = Product((tree, Sym(tail[0].text))) if alone else None
        return Quantity(source=source, magnitude=magnitude, unit=unit, tree=formula)
    return None


def _unit_starts(tokens: Tokens) -> Iterator[int]:
    """Where the unit may begin: at a word, a degree sign, a unit's symbol or a bracket before one."""
    first_start = max(1, len(tokens) - _MAX_UNIT)
    for position, (token, depth) in enumerate(zip(tokens, steps(tokens), strict=True)):
        opens = depth == 1 and token.text in ("{", "(")
        ahead = 2 if token.text == "\\frac" else int(opens)
        if position < first_start or position + ahead >= len(tokens) or (depth and not ahead):
            continue
        first = tokens[position + ahead]
        if first.kind == "word" or first.text in ("°", "\\mu", "\\Omega", "¢", "€", "£", "¥", "$"):
            yield position


def _unit(tail: Tokens) -> Unit | None:
    r"""The unit that tokens name; `\frac{m}{s^2}` is m/s^2."""
    if any(token.kind == "number" and i and tail[i - 1].kind == "number" for i, token in enumerate(tail)):
        return None
    text = spoken(tail[1:-1]) if enclosed(tail) else spoken(tail)
    if tail[0].text == "\\frac":
        middle = end_of_group(tail, 1)
        if end_of_group(tail, middle) != len(tail):
            return None
        text = f"{spoken(tail[1:middle])}/{spoken(tail[middle:])}"
    text = text.replace("Omega", "Ω").replace("mu ", "μ").replace("mu", "μ")
    upright = all(token.upright for token in tail if token.kind == "word")
    return read_unit(text, upright=upright) if text else None
