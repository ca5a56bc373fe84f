r"""Reads an answer once, into a typed value (`values`): LaTeX, plain notation and Unicode by one grammar.

From the outside in: dates, matrices, sets and intervals, lists, relations, ratios, then one number, quantity,
formula or text. What is no formula is text; what is a formula beyond this grammar (sums, integrals, limits)
becomes an expression without a tree, which only math-verify can compare.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise, takewhile

from rlcs.grading import algebra, regions
from rlcs.grading.dates import read_date
from rlcs.grading.equations import stated_values
from rlcs.grading.formulas import GREEK, MAX_DEPTH, base_of, is_word, number_in_base
from rlcs.grading.single import difference, plain_words, read_single, text_of, tree_of
from rlcs.grading.tokens import (
    MAX_TOKENS,
    Token,
    Tokens,
    depth_of,
    enclosed,
    end_of_group,
    latex,
    split,
    spoken,
    tokenise,
)
from rlcs.grading.tree import MINUS_ONE, Node, Num, Product, symbols
from rlcs.grading.values import (
    Based,
    Dated,
    Expression,
    Items,
    Letters,
    Matrix,
    Named,
    Number,
    Piece,
    Ratio,
    Region,
    Relation,
    Text,
    Value,
)

MAX_CHARACTERS = 2_000
"""A longer answer is text; its numbers and formulas are not read."""

_ORDER = frozenset(["<", ">", "\\le", "\\ge"])
_RELATIONS = _ORDER | frozenset(
    "= \\ne \\in \\notin \\approx \\equiv \\sim \\cong \\parallel \\perp \\to \\Rightarrow \\propto \\iff"
    " \\subset".split()
)
# Each relation as it is read from right to left.
_TURNED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}
_MATRICES = frozenset("matrix pmatrix bmatrix Bmatrix smallmatrix array".split())
_ROWS = frozenset("cases dcases aligned align gathered gather split eqnarray".split())
_MARKS = frozenset(["'", '"', "\\cdot", "^"])  # quotes, and Markdown's * and **, which became \cdot and ^
_LEADS = frozenset("选 故选 应选 答案 答案是 答案为 answer answers option choice".split())
_LEAD_WORDS = _LEADS | frozenset("the my final correct best result value is are".split())
"""Words that introduce an answer, if one of `_LEADS` is among them: "the correct answer is"."""
_SETS_IN_WORDS = dict.fromkeys(
    ["all real numbers", "all reals", "all real number", "real numbers", "reals"], "\\R"
) | {"empty set": "\\emptyset", "null set": "\\emptyset"}
_VARIABLES = re.compile("[A-Za-z]|[abc]{2,3}|[xyz]{2,3}|[mnpq]{2,3}|[abkn]x")
"""Letters alone that are variables; other runs of letters without digits and operators are words (`no`)."""
_IN_NAMES = re.compile(
    r"_ ?(?:\{[^}]*\}?|\d+|\\?[^\W\d_]+)|\\angle ?(?:\{[^}]*\}?|\d+)|\^\{-1\}|(?<=\()\d[\d.]*"
)
_NO_NAME = re.compile(r"[-+,!%°^\d]|\\(?:cdot|sqrt|pm)(?![A-Za-z])")
"""Signs that no name has, once the parts that `_IN_NAMES` finds (indices, angles, `f(0)`) are removed."""
_BEARING = re.compile(r"([NS]) ?(\d[\d.]*) ?°? ?([EW])")  # S 23.5° W
_MAX_BASED = 240
"""Most characters of a number with its base."""
_PLAIN_NUMBER = re.compile(
    r"-?[0-9]{1,20}(?:\.[0-9]{1,20})?|(-?)\\[dt]?frac\{([0-9]{1,20})\}\{(0*[1-9][0-9]{0,18})\}"
)
_LETTERS = re.compile("[A-H]+|[①-⑳]+")
_IN_BASE = re.compile(
    r"\(?([0-9A-Fa-f]*\d[0-9A-Fa-f]*(?:\.[0-9A-F]+)?|[A-F]{2,})\)?(_.+| ?\(?(?:in )?base ?.+)"
)


def is_plain_number(text: str) -> bool:
    r"""Whether a text is a number as everybody writes it: `-12.50`, `\frac{1}{3}`, nothing else around it."""
    return _PLAIN_NUMBER.fullmatch(text) is not None


def read(text: str) -> Value:
    """Read an answer; never fails. Equal texts give the same value from a cache."""
    if len(text) > MAX_CHARACTERS:
        return Text(source=text.strip(), words=plain_words(text))
    return _read(text)


@lru_cache(maxsize=4096)
def _read(text: str) -> Value:
    if plain := _PLAIN_NUMBER.fullmatch(text):  # most answers: the slow way through tokens makes the same
        sign, over, under = plain.groups()
        number = Fraction(int(sign + over), int(under)) if under else Fraction(text)
        source = f"{sign}\\frac{{{over}}}{{{under}}}" if under else text
        return Number(source=source, tree=Num(number), value=number)
    return _read_tokens(text)


def _read_tokens(text: str) -> Value:
    tokens = _without_parameter(_peeled(_strip(tokenise(text))))
    if len(tokens) > MAX_TOKENS or depth_of(tokens) > MAX_DEPTH:
        return Text(source=latex(tokens), words=plain_words(text))
    words = spoken(tokens)
    if name := _SETS_IN_WORDS.get(words.lower()):
        tokens, words = [Token("command", name)], ""
    if bearing := _BEARING.fullmatch(words):
        return Text(source=latex(tokens), words=" ".join(bearing.groups()).casefold())
    return _date(tokens, ranges=True) or _value(tokens)


@lru_cache(maxsize=4096)
def spelled(text: str) -> str:
    """The answer as LaTeX with its spaces, in one spelling, without what does not belong to it."""
    tokens = _strip(tokenise(text[:MAX_CHARACTERS]))
    while enclosed(tokens) and tokens[0].text == "{":
        tokens = tokens[1:-1]
    return latex(tokens, gaps=True)


def _strip(tokens: Tokens) -> Tokens:
    """Remove what does not belong to the answer: quotes, a full stop, `=`, "the answer is"."""
    while len(tokens) > 1 and tokens[-1].text in (".", ",", ";", "\\\\") and tokens[-2].text != ".":
        tokens = tokens[:-1]
    while len(tokens) > 2 and tokens[0].text == tokens[-1].text and tokens[0].text in _MARKS:
        tokens = _strip(tokens[1:-1])
    while len(tokens) > 1 and tokens[0].text in ("=", "\\approx", "\\therefore"):
        tokens = tokens[1:]
    lead = list(takewhile(lambda token: token.text.lower() in _LEAD_WORDS or token.text == ":", tokens))
    if len(lead) < len(tokens) and any(token.text.lower() in _LEADS for token in lead):
        tokens = _strip(tokens[len(lead) :])
    return tokens


def _without_parameter(tokens: Tokens) -> Tokens:
    r"""Remove a condition such as `, n \in \mathbb{Z}` at the end; its parameter is called `k` instead."""
    end = tokens[:-1] if tokens and tokens[-1].text == ")" else tokens
    if (
        len(end) < 5
        or end[-1].text.removeprefix("\\") not in ("Z", "N", "R")
        or end[-2].text != "\\in"
        or len(end[-3].text) > 1
    ):
        return tokens
    if end[-4].text != ("(" if end is not tokens else ","):
        return tokens
    if end[-1].text in ("\\R", "R"):
        return end[:-4]
    if _ORDER & {token.text for token in end[:-4]}:
        return tokens  # 1 < x < 3, x \in \mathbb{Z} is a set of whole numbers
    parameter = end[-3].text
    return [token._replace(text="k") if token.text == parameter else token for token in end[:-4]]


# --- kinds of values, from the outside in ------------------------------------------------------------

_COMMAS = frozenset([",", ";"])
_AND_OR = frozenset(["and", "or", "&"])


def _value(tokens: Tokens) -> Value:
    """Read tokens as a value of any kind."""
    tokens = _peeled(tokens)
    source = latex(tokens)
    if not tokens:
        return Text(source="", words="")
    if letters := _letters(tokens):
        return Letters(source=source, letters=letters, tree=tree_of(tokens))
    if _are_words(tokens):
        return replace(text_of(tokens), tree=tree_of(tokens) if len(tokens) == 1 else None)
    for rule in (_based, _environment, _bracketed, _combined_sets, _list, _point, _relation, _ratio):
        if (value := rule(tokens, source)) is not None:
            return value
    return read_single(tokens, source)


def _peeled(tokens: Tokens) -> Tokens:
    """Remove braces around everything, and brackets around brackets."""
    while enclosed(tokens) and (
        tokens[0].text == "{" or (tokens[0].text == "(" == tokens[1].text and enclosed(tokens[1:-1]))
    ):
        tokens = tokens[1:-1]
    return tokens


def _are_words(tokens: Tokens) -> bool:
    """Whether tokens are words; `ab`, `x - y` and `-PQ` are formulas, the way `A-B-C` from A to C is not."""
    if not all(token.kind == "word" or token.text in "'-.!?\"" for token in tokens):
        return False
    words = [token.text for token in tokens if token.kind == "word"]
    if "and" in words and all(len(part) == 1 for part in split(tokens, _AND_OR)[0]):
        return False  # red and blue
    way = len(words) > 2 and all(word.isupper() for word in words)
    variables = all(map(_VARIABLES.fullmatch, words)) and not way
    return bool(words) and not variables and tokens[0].text != "-"


def _letters(tokens: Tokens) -> frozenset[str] | None:
    """The letters of choices: `B`, `(B)`, `A, C`, `ABD` (in the order of the alphabet, or it is a name)."""
    runs = [t.text for t in tokens if t.text not in ("(", ")", "\\{", "\\}", ",", ";", "and", "&")]
    if not runs or not all(_LETTERS.fullmatch(run) for run in runs):
        return None
    letters = "".join(runs)
    in_order = len(runs) > 1 or list(letters) in (sorted(letters), sorted(letters, reverse=True))
    if len(set(letters)) < len(letters) or not in_order:
        return None
    return frozenset(letters)


def _date(tokens: Tokens, *, ranges: bool) -> Value | None:
    """Read a date, a time or, where no difference is meant, a range: `1998-99` alone and in lists."""
    date = read_date(spoken(tokens)) if len(tokens) > 1 else None
    return Dated(source=latex(tokens), date=date) if date and (ranges or date.kind != "range") else None


def _based(tokens: Tokens, source: str) -> Value | None:
    if len(source) > _MAX_BASED or not {"_", "base"} & {token.text for token in tokens}:
        return None
    match = _IN_BASE.fullmatch(source) or _IN_BASE.fullmatch(spoken(tokens))
    if not match:
        return None
    base = base_of(tokenise(match[2]))
    if base is None or (len(match[1]) == 1 and not match[1].isdigit()):
        return None
    return Based(source=source, digits=match[1].upper(), base=base, value=number_in_base(match[1], base))


def _environment(tokens: Tokens, source: str) -> Value | None:
    r"""Read `\begin{pmatrix} ... \end{pmatrix}` and `\begin{cases} ... \end{cases}`."""
    inner = tokens[1:-1] if enclosed(tokens) and tokens[0].text in ("(", "[") else tokens
    system = tokens[0].text == "\\{" and not enclosed(tokens)  # \left\{ \begin{array} ... \right.
    inner = tokens[1:] if system else inner
    if len(inner) < 9 or inner[0].text != "\\begin" or inner[-4].text != "\\end" or not enclosed(inner[:-3]):
        return None
    name, body = inner[2].text, inner[4:-4]
    if name == "array" and body[0].text == "{":
        body = body[end_of_group(body, 0) :]
    rows = [r for r in split(body, frozenset(["\\\\"]))[0] if any(token.text != "&" for token in r)]
    if not rows or (name not in (_MATRICES | _ROWS) and not system):
        return None
    if name in _MATRICES and not system:
        cells = tuple(tuple(map(_value, split(row, frozenset("&"))[0])) for row in rows)
        return Matrix(source=source, rows=cells)
    parts = [_strip([token for token in row if token.text != "&"]) for row in rows]
    return _items(parts, [], "", source) if len(parts) > 1 else _value(parts[0])


def _bracketed(tokens: Tokens, source: str) -> Value | None:
    r"""Read `(a, b)`, `[a, b)`, `\{a, b\}` and `\{x \mid x > 3\}`."""
    if not enclosed(tokens) or tokens[0].text not in ("(", "[", "\\{", "\\langle"):
        return None
    inside = tokens[1:-1]
    brackets = (tokens[0].text + tokens[-1].text).replace("\\{", "{").replace("\\}", "}")
    brackets = "()" if "angle" in brackets else brackets
    if brackets == "{}":
        parts, _ = split(inside, frozenset(["|", ":"]))
        if len(parts) == 2 and parts[0] and parts[1]:
            return _condition(parts[0], _value(parts[1])) or text_of(tokens)
        if not inside:
            return Region(source="\\emptyset", pieces=())
    parts, found = split(inside, _COMMAS)
    if len(parts) == 1 and brackets != "{}":
        value = _value(inside)
        return None if brackets == "()" and isinstance(value, Text) and len(inside) > 1 else value
    return _items(parts, found, brackets, source)


def _condition(element: Tokens, condition: Value) -> Value | None:
    r"""The set of all real `x` under a condition on `x`; None for other elements, such as integers."""
    name, operator = latex(element[:1]), latex(element[1:])
    if operator not in ("", "\\in\\R"):
        return None
    if isinstance(condition, Region):
        return condition if condition.variable == name else None
    items = condition.items if isinstance(condition, Items) else ()
    same_name = [isinstance(item, Named) and item.name == name for item in items]
    return condition if items and all(same_name) else None


def _items(parts: Sequence[Tokens], separators: Sequence[str], brackets: str, source: str) -> Value | None:
    """Make several values of the parts of a list; inequalities become one set of numbers."""
    if not all(parts):
        return None
    items = [_date(part, ranges=brackets in ("", "{}")) or _value(part) for part in parts]
    items = [one for item in items for one in _listed(item)]
    first = items[0]
    if isinstance(first, Named) and not any(isinstance(item, Named) for item in items[1:]):
        named = [replace(first, source=item.source, value=item, tree=None) for item in items[1:]]
        items = [first, *named]  # x = 1, 2
    limits = [item for item in items if isinstance(item, Region)]
    plain = not brackets and not any(map(enclosed, parts)) and len(limits) == len(items)
    one_variable = plain and len({limit.variable for limit in limits}) == 1
    if one_variable and (joined := _joined(limits, separators)) is not None:
        return Region(source=source, pieces=tuple(joined), variable=limits[0].variable)
    items = list({item.source: item for item in items}.values()) if brackets == "{}" else items
    return Items(source=source, brackets=brackets, items=tuple(items))


def _listed(item: Value) -> Sequence[Value]:
    r"""The members that an item adds to a list: two for `\pm 3` or x = y = 4, one for others."""
    joined = isinstance(item, Items) and ("\\pm" in item.source or item.kind == "named values")
    return item.items if joined and isinstance(item, Items) and not item.brackets else [item]


def _joined(limits: Sequence[Region], separators: Sequence[str]) -> list[Piece] | None:
    """Join conditions: `or` gives their union, `and` their intersection.

    A comma gives the intersection, or the union of conditions that exclude one another; None where one
    condition follows from another, so that it is a list of answers.
    """
    union = regions.union([piece for limit in limits for piece in limit.pieces])
    both = list(limits[0].pieces)
    for limit in limits[1:]:
        both = regions.intersection(both, limit.pieces)
    if "or" in separators:
        return union
    if "and" in separators:
        return both
    return None if any(both == list(limit.pieces) for limit in limits) else both or union


def _combined_sets(tokens: Tokens, source: str) -> Value | None:
    r"""Read unions and differences of sets of numbers, `\mathbb{R}` and `\emptyset`."""
    if len(tokens) == 1 and tokens[0].text in ("\\R", "\\emptyset"):
        return Region(source=source, pieces=(regions.whole_line(),) if tokens[0].text == "\\R" else ())
    # People type (1, 2) U (3, 4) as well.
    operators = {"U": "\\cup", "u": "\\cup", "\\cup": "\\cup", "\\cap": "\\cap", "\\setminus": "\\setminus"}
    parts, found = split(tokens, frozenset(operators))
    if not found or not all(parts):
        return None
    sets = [regions.as_pieces(_value(part)) for part in parts]
    pieces = list(sets[0] or ())
    for operator, other in zip(found, sets[1:], strict=True):
        if operators[operator] == "\\cup":
            pieces += other or ()
        else:
            rest = (other or ()) if operator == "\\cap" else regions.complement(regions.union(other or ()))
            pieces = regions.intersection(pieces, rest)
    if None in sets:
        return None if set(found) <= {"U", "u"} else Expression(source=source)
    return Region(source=source, pieces=tuple(regions.union(pieces)))


def _list(tokens: Tokens, source: str) -> Value | None:
    """Read a list without brackets: commas always separate, "and" and "or" do where no phrase of words is."""
    followed = pairwise([*tokens, tokens[-1]])
    kept = [token for token, after in followed if token.text not in _COMMAS or after.text not in _AND_OR]
    pieces, separators = split(kept, _COMMAS | _AND_OR)
    value = _items(pieces, separators, "", source) if separators else None
    phrases = any(len(piece) > 1 for piece in pieces)
    if phrases and isinstance(value, Items) and any(isinstance(item, Text) for item in value.items):
        parts, separators = split(tokens, _COMMAS)
        return _items(parts, separators, "", source) if separators else text_of(tokens)
    return value


def _point(tokens: Tokens, source: str) -> Value | None:
    """Read a point with its coordinates: `P(2, -5)`."""
    name, *coordinates = tokens
    if name.kind != "word" or len(name.text) > 1 or not name.text.isupper() or not enclosed(coordinates):
        return None
    value = _value(coordinates)
    return Named(source=source, name=name.text, value=value) if isinstance(value, Items) else None


def _relation(tokens: Tokens, source: str) -> Value | None:
    parts, operators = split(tokens, _RELATIONS)
    if not operators or not all(parts):
        return None
    if set(operators) <= _ORDER | {"\\ne"} and (limits := _inequality(parts, operators, source)):
        return limits
    if set(operators) <= {"=", "\\approx"}:
        return _equation(parts, source, rounded="\\approx" in operators)
    sides = tuple(_value(part) for part in parts)
    if operators == ["\\in"] and _name(parts[0]) and isinstance(sides[1], Items | Region):
        pieces = regions.as_pieces(sides[1])
        listed = isinstance(sides[1], Items) and sides[1].brackets in ("", "{}")
        is_set = pieces is not None and not listed
        return Region(source=source, pieces=pieces or (), variable=latex(parts[0])) if is_set else sides[1]
    return Relation(source=source, operators=tuple(operators), sides=sides)


def _inequality(parts: Sequence[Tokens], operators: Sequence[str], source: str) -> Value | None:
    r"""Read `x > 3`, `3 < x`, `1 < x \le 2` as a set of numbers; other inequalities are relations."""
    if operators[0] in (">", "\\ge"):  # from the lower to the higher side
        parts, operators = parts[::-1], [_TURNED[operator] for operator in operators[::-1]]
    trees = [tree_of(part) for part in parts]
    low, high = trees[0], trees[-1]
    if len(parts) == 2:
        operator = operators[0]
        for side, sign, bound in ((parts[0], operator, high), (parts[1], _TURNED[operator], low)):
            if bound is None:
                continue
            if side[0].text == side[-1].text == "|" and (name := _name(side[1:-1])):
                return _distance(name, sign, bound, source)
            tree = tree_of(side)
            if (name := _name(side)) and not symbols(bound) & (symbols(tree) if tree else frozenset()):
                return Region(source=source, pieces=tuple(regions.ray(sign, bound)), variable=name)
        if low is None or high is None:
            return None
        sides = tuple(map(_value, parts))
        return Relation(source=source, operators=(operator,), sides=sides, tree=difference(low, high))
    name = _name(parts[1])
    if len(parts) > 3 or not name or low is None or high is None or not set(operators) <= {"<", "\\le"}:
        return None
    closed = [operator == "\\le" for operator in operators]
    piece = Piece(low=low, high=high, low_closed=closed[0], high_closed=closed[1])
    return Region(source=source, pieces=(piece,), variable=name)


def _distance(name: str, operator: str, bound: Node, source: str) -> Region:
    """Read `|x| < 3` as the numbers between -3 and 3, `|x| > 3` as all others."""
    closed = operator in ("\\le", ">")
    low = Product((MINUS_ONE, bound))
    between = Piece(low=low, high=bound, low_closed=closed, high_closed=closed)
    pieces = [between] if operator in ("<", "\\le") else regions.complement([between])
    return Region(source=source, pieces=tuple(pieces), variable=name)


def _equation(parts: Sequence[Tokens], source: str, *, rounded: bool) -> Value:
    """Read `x = 5`, `(a, b) = (1, 2)`, a chain `2 + 3 = 5`, or another equation."""
    two = len(parts) == 2
    if two and (pairs := _paired_names(parts, source)):
        return pairs
    sides = [_date(part, ranges=False) or _value(part) for part in parts]
    left, right = sides[0].tree, sides[-1].tree
    tree = difference(left, right) if two and left is not None and right is not None else None
    names = [_name(part) for part in parts]
    if all(names[:-1]) and isinstance(sides[-1], Items) and "\\pm" in sides[-1].source:
        named = tuple(Named(source=item.source, name=names[0], value=item) for item in sides[-1].items)
        return replace(sides[-1], source=source, items=named)  # x = 1 \pm 2
    if two and any(names):
        named_side = 0 if names[0] else 1
        return Named(source=source, name=names[named_side], value=sides[1 - named_side], tree=tree)
    if not two and all(names[:-1]) and not names[-1]:  # x = y = 4
        items = tuple(Named(source=latex(parts[-1]), name=name, value=sides[-1]) for name in names[:-1])
        return Items(source=source, brackets="", items=items)
    operators = ("=",) * (len(parts) - 1)
    stated = stated_values(parts[1:], sides[1:], rounded=rounded) if names[0] else ()
    if stated:  # S = 2 + 3 = 5, or S = 25 \pi = 78.5
        exact = left is None or algebra.equal(sides[1].tree or left, right or left)
        chain = "=".join(map(latex, parts[1:]))
        value = Relation(source=chain, operators=operators[1:], sides=tuple(sides[1:]), stated=stated)
        return Named(source=source, name=names[0], value=sides[-1] if exact else value)
    stated = stated_values(parts, sides, rounded=rounded)
    return Relation(source=source, operators=operators, sides=tuple(sides), stated=stated, tree=tree)


def _paired_names(parts: Sequence[Tokens], source: str) -> Value | None:
    """Read `(a, b) = (1, 2)` as a = 1, b = 2."""
    if not all(enclosed(part) and part[0].text == "(" for part in parts):
        return None
    names, _ = split(parts[0][1:-1], _COMMAS)
    values, _ = split(parts[1][1:-1], _COMMAS)
    if len(names) != len(values) or len(names) < 2 or not all(map(_name, names)):
        return None
    pairs = zip(names, values, strict=True)
    items = tuple(Named(source=latex(v), name=_name(n), value=_value(v)) for n, v in pairs)
    return Items(source=source, brackets="", items=items)


def _name(tokens: Tokens) -> str:
    r"""The name that tokens are, or "": `x`, `S_{ABC}`, `f(x)`, `|AB|`, `\angle ABC`, `AB : BC`, `Area`."""
    text = latex(tokens)
    named = any(token.kind == "word" or token.text[1:] in GREEK for token in tokens)
    return text if named and len(tokens) <= 20 and not _NO_NAME.search(_IN_NAMES.sub("", text)) else ""


def _ratio(tokens: Tokens, source: str) -> Value | None:
    parts, found = split(tokens, frozenset([":", "is", "are", "equals"]))
    if not found or not all(parts):
        return None
    if len(parts) == 2 and all(map(is_word, parts[0])):  # Area: 10
        value = _value(parts[1])
        named = Named(source=source, name=spoken(parts[0]), value=value)
        return text_of(tokens) if isinstance(value, Text) else named
    if set(found) != {":"}:
        return None
    values = tuple(_value(part) for part in parts)
    if any(isinstance(value, Text) for value in values):
        return text_of(tokens)
    return Ratio(source=source, parts=values)
