r"""Reads an answer once, into a typed value (`values`): LaTeX, plain notation and Unicode by one grammar.

From the outside in: dates, matrices, sets and intervals, lists, relations, ratios, then one number, quantity,
formula or text. What is no formula is text; what is a formula beyond this grammar (sums, integrals, limits)
becomes an expression without a tree, which only math-verify can compare.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from rlcs.grading import algebra, regions
from rlcs.grading.dates import read_date
from rlcs.grading.formulas import GREEK, MAX_DEPTH, base_of, number_in_base
from rlcs.grading.single import difference, plain_words, read_single, text_of, tree_of
from rlcs.grading.tokens import (
    MAX_TOKENS,
    Token,
    Tokens,
    depth_of,
    enclosed,
    latex,
    split,
    spoken,
    steps,
    tokenise,
)
from rlcs.grading.tree import MINUS_ONE, Node, Num, Product, symbols, walk
from rlcs.grading.values import (
    Based,
    Dated,
    Expression,
    Items,
    Letters,
    Matrix,
    Named,
    Piece,
    Ratio,
    Region,
    Relation,
    Text,
    Value,
    as_tree,
)

MAX_CHARACTERS = 2_000
"""A longer answer is text; its numbers and formulas are not read."""

_ORDER = frozenset(["<", ">", "\\le", "\\ge"])
_RELATIONS = _ORDER | frozenset(
    "= \\ne \\in \\notin \\approx \\equiv \\sim \\cong \\parallel \\perp \\to \\Rightarrow \\propto \\iff"
    " \\subset".split()
)
_TURNED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}
_MATRICES = frozenset("matrix pmatrix bmatrix Bmatrix smallmatrix array".split())
_ROWS = frozenset("cases dcases aligned align gathered gather split eqnarray".split())
_MARKS = frozenset(["'", '"', "\\cdot", "^"])  # quotes and the stars of Markdown
_LEADS = frozenset("选 故选 应选 答案 答案是 答案为 answer answers option choice".split())
_LEAD_WORDS = _LEADS | frozenset("the my final correct best result value is are".split())
_ALL_NUMBERS = frozenset(["all real numbers", "all reals", "all real number", "real numbers", "reals"])
_NO_NUMBERS = frozenset(["empty set", "null set"])
_VARIABLES = re.compile("[A-Za-z]|[abc]{2,3}|[xyz]{2,3}|[mnpq]{2,3}|[abkn]x")
"""Letters alone that are variables; other runs of letters without digits and operators are words (`no`)."""
_MAX_BASED = 240
"""Characters of a number with its base."""
_LETTERS = re.compile("[A-H]+|[①-⑳]+")
_IN_BASE = re.compile(
    r"\(?([0-9A-Fa-f]*\d[0-9A-Fa-f]*(?:\.[0-9A-F]+)?|[A-F]{2,})\)?(_.+| ?\(?(?:in )?base ?.+)"
)


def read(text: str) -> Value:
    """Read an answer; never fails. Equal texts give the same value from a cache."""
    if len(text) > MAX_CHARACTERS:
        return Text(source=text.strip(), words=plain_words(text))
    return _read(text)


@lru_cache(maxsize=4096)
def _read(text: str) -> Value:
    tokens = _without_parameter(_peeled(_strip(tokenise(text))))
    if len(tokens) > MAX_TOKENS or depth_of(tokens) > MAX_DEPTH:
        return Text(source=latex(tokens), words=plain_words(text))
    plain = spoken(tokens)
    if plain.lower() in _ALL_NUMBERS:
        return Region(source="\\R", pieces=(regions.whole_line(),))
    if plain.lower() in _NO_NUMBERS:
        return Region(source="\\emptyset", pieces=())
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
    while len(tokens) > 1 and tokens[-1].text in (".", ",", ";") and tokens[-2].text != ".":
        tokens = tokens[:-1]
    while len(tokens) > 2 and tokens[0].text == tokens[-1].text and tokens[0].text in _MARKS:
        tokens = _strip(tokens[1:-1])
    while len(tokens) > 1 and tokens[0].text in ("=", "\\approx", "\\therefore"):
        tokens = tokens[1:]
    lead = 0
    while lead < len(tokens) and (tokens[lead].text.lower() in _LEAD_WORDS or tokens[lead].text == ":"):
        lead += 1
    if 0 < lead < len(tokens) and any(token.text.lower() in _LEADS for token in tokens[:lead]):
        tokens = _strip(tokens[lead:])
    return tokens


def _without_parameter(tokens: Tokens) -> Tokens:
    r"""Remove a condition such as `, n \in \mathbb{Z}` at the end; its parameter is called `k` instead."""
    end = tokens[:-1] if tokens and tokens[-1].text == ")" else tokens
    if len(end) < 5 or end[-1].text not in ("\\Z", "\\N") or end[-2].text != "\\in" or len(end[-3].text) > 1:
        return tokens
    opening = "(" if end is not tokens else ","
    if end[-4].text != opening:
        return tokens
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
    for rule in (_based, _environment, _bracketed, _combined_sets, _list, _relation, _ratio):
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
    if len(set(letters)) != len(letters) or (
        len(runs) == 1 and list(letters) not in (sorted(letters), sorted(letters)[::-1])
    ):
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
    start = next((i for i, t in enumerate(tokens) if t.text in ("_", "base", "in")), len(tokens))
    index = [t for t in tokens[start:] if t.text not in ("_", "in", "base")]
    base = base_of(index)
    if base is None or (len(match[1]) == 1 and not match[1].isdigit()):
        return None
    return Based(source=source, digits=match[1].upper(), base=base, value=number_in_base(match[1], base))


def _environment(tokens: Tokens, source: str) -> Value | None:
    r"""Read `\begin{pmatrix} ... \end{pmatrix}` and `\begin{cases} ... \end{cases}`."""
    inner = tokens[1:-1] if enclosed(tokens) and tokens[0].text in ("(", "[") else tokens
    system = tokens[0].text == "\\{" and not enclosed(tokens)  # \left\{ \begin{array} ... \right.
    inner = tokens[1:] if system else inner
    if len(inner) < 8 or inner[0].text != "\\begin":
        return None
    name = inner[2].text
    end = next((i for i in range(len(inner) - 1, 0, -1) if inner[i].text == "\\end"), 0)
    if end + 4 != len(inner):
        return None
    start = 4
    if name == "array" and inner[start].text == "{":
        start += next((i for i, t in enumerate(inner[start:]) if t.text == "}"), end) + 1
    rows = [row for row in _rows(inner[start:end]) if any(token.text != "&" for token in row)]
    if not rows:
        return None
    if name in _MATRICES and not system:
        cells = tuple(tuple(_value(cell) for cell in split(row, frozenset("&"))[0]) for row in rows)
        return Matrix(source=source, rows=cells)
    if name in _ROWS or system:
        parts = [_strip([t for t in row if t.text != "&"]) for row in rows]
        return _items(parts, [","] * (len(parts) - 1), "", source) if len(parts) > 1 else _value(parts[0])
    return None


def _rows(tokens: Tokens) -> list[Tokens]:
    rows: list[Tokens] = []
    start = 0
    for position, (token, depth) in enumerate(zip(tokens, steps(tokens), strict=True)):
        if token.kind == "row" and depth == 0:
            rows.append(tokens[start:position])
            start = position + 1
    return [*rows, tokens[start:]]


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
    r"""The set of all real `x` under a condition on `x`; None for others, of `x^2` or of integers."""
    name, operator = latex(element[:1]), latex(element[1:])
    if operator not in ("", "\\in\\R"):
        return None
    if isinstance(condition, Region):
        return condition if condition.variable == name else None
    named = (
        [item for item in condition.items if isinstance(item, Named)] if isinstance(condition, Items) else []
    )
    return condition if named and all(item.name == name for item in named) else None


def _items(parts: Sequence[Tokens], found: Sequence[str], brackets: str, source: str) -> Value | None:
    """Make several values of the parts of a list; inequalities become one set of numbers."""
    if not all(parts):
        return None
    items = [_date(part, ranges=brackets in ("", "{}")) or _value(part) for part in parts]
    first = items[0]
    if isinstance(first, Named) and not any(isinstance(item, Named) for item in items[1:]):
        named = [replace(first, source=item.source, value=item, tree=None) for item in items[1:]]
        items = [first, *named]  # x = 1, 2
    if not brackets and not any(map(enclosed, parts)) and all(isinstance(item, Region) for item in items):
        limits = [item for item in items if isinstance(item, Region)]
        if len({limit.variable for limit in limits}) == 1:
            pieces = _joined(limits, found)
            if pieces is not None:
                return Region(source=source, pieces=tuple(pieces), variable=limits[0].variable)
    items = list({item.source: item for item in items}.values()) if brackets == "{}" else items
    flat: list[Value] = []
    for item in items:
        joined = isinstance(item, Items) and ("\\pm" in item.source or item.source.count("=") > 1)
        flat += item.items if joined and isinstance(item, Items) and not item.brackets else [item]
    return Items(source=source, brackets=brackets, items=tuple(flat))


def _joined(limits: Sequence[Region], found: Sequence[str]) -> list[Piece] | None:
    """Join conditions: `or` gives their union, `and` their intersection.

    A comma gives the intersection, or the union of conditions that exclude one another; None where one
    condition follows from another, so that it is a list of answers.
    """
    union = regions.union([piece for limit in limits for piece in limit.pieces])
    both = list(limits[0].pieces)
    for limit in limits[1:]:
        both = regions.intersection(both, limit.pieces)
    if "or" in found:
        return union
    if "and" in found:
        return both
    return None if any(both == list(limit.pieces) for limit in limits) else both or union


def _combined_sets(tokens: Tokens, source: str) -> Value | None:
    r"""Read unions and differences of sets of numbers, `\mathbb{R}` and `\emptyset`."""
    names = {"\\R": (regions.whole_line(),), "\\emptyset": ()}
    if len(tokens) == 1 and tokens[0].text in names:
        return Region(source=source, pieces=names[tokens[0].text])
    between = [
        token._replace(text="\\cup") if token.text in ("U", "u") and token.kind == "word" else token
        for token in tokens
    ]
    parts, found = split(between, frozenset(["\\cup", "\\setminus", "\\cap"]))
    if not found or not all(parts):
        return None
    sets = [regions.as_pieces(_value(part)) for part in parts]
    pieces = sets[0]
    for operator, other in zip(found, sets[1:], strict=True):
        if pieces is None or other is None:
            return Expression(source=source)
        if operator == "\\cup":
            pieces = (*pieces, *other)
        else:
            rest = other if operator == "\\cap" else regions.complement(regions.union(other))
            pieces = tuple(regions.intersection(pieces, rest))
    return None if pieces is None else Region(source=source, pieces=tuple(regions.union(pieces)))


def _list(tokens: Tokens, source: str) -> Value | None:
    """Read a list without brackets: commas always separate, "and" and "or" do where no phrase of words is."""
    parts, found = split(tokens, _COMMAS)
    pieces: list[Tokens] = []
    separators: list[str] = []
    for part, separator in zip(parts, [*found, ""], strict=True):
        inner, words = split(part, _AND_OR)
        inner = [piece for piece in inner if piece] or [part]
        pieces += inner
        separators += [*words[: len(inner) - 1], *([separator] if separator else [])]
        separators += [word for word in words[len(inner) - 1 :] if separators]
    if len(pieces) < 2:
        return None
    value = _items(pieces, separators, "", source)
    single = all(len(piece) == 1 for piece in pieces)
    if isinstance(value, Items) and not single and any(isinstance(item, Text) for item in value.items):
        return _items(parts, found, "", source) if found else text_of(tokens)
    return value


def _relation(tokens: Tokens, source: str) -> Value | None:
    parts, operators = split(tokens, _RELATIONS)
    if (
        len(tokens[0].text) == 1
        and tokens[0].text.isupper()
        and tokens[0].kind == "word"
        and enclosed(tokens[1:])
    ):
        value = _value(tokens[1:])  # the point P(2, -5)
        return Named(source=source, name=tokens[0].text, value=value) if isinstance(value, Items) else None
    if not operators or not all(parts):
        return None
    if set(operators) <= _ORDER | {"\\ne"} and (limits := _inequality(parts, operators, source)):
        return limits
    if set(operators) <= {"=", "\\approx"}:
        return _equation(parts, source)
    sides = tuple(_value(part) for part in parts)
    if operators == ["\\in"] and _name(parts[0]):
        variable = latex(parts[0])
        if isinstance(sides[1], Items | Region):
            pieces = regions.as_pieces(sides[1])
            if pieces is not None and not (isinstance(sides[1], Items) and sides[1].brackets in ("", "{}")):
                return Region(source=source, pieces=pieces, variable=variable)
            return sides[1]
    return Relation(source=source, operators=tuple(operators), sides=sides)


def _inequality(parts: Sequence[Tokens], operators: Sequence[str], source: str) -> Value | None:
    r"""Read `x > 3`, `3 < x`, `1 < x \le 2` as a set of numbers; other inequalities are relations."""
    nodes = [tree_of(part) for part in parts]
    names = ["" if part[0].text == "|" else _name(part) for part in parts]
    if len(parts) == 2:
        (left, right), (operator,) = nodes, operators
        if parts[0][0].text == parts[0][-1].text == "|" and right is not None and _name(parts[0][1:-1]):
            return _distance(_name(parts[0][1:-1]), operator, right, source)
        if names[0] and right is not None and not symbols(right) & _variables(left):
            return Region(source=source, pieces=tuple(regions.ray(operator, right)), variable=names[0])
        if names[1] and left is not None:
            return Region(
                source=source, pieces=tuple(regions.ray(_TURNED[operator], left)), variable=names[1]
            )
        if left is None or right is None:
            return None
        greater = operator in (">", "\\ge")
        tree = difference(left, right) if not greater else difference(right, left)
        relation = _TURNED[operator] if greater else operator
        sides = tuple(_value(part) for part in parts)
        return Relation(source=source, operators=(relation,), sides=sides, tree=tree)
    if len(parts) == 3 and names[1] and nodes[0] is not None and nodes[2] is not None:
        low, high, first, last = nodes[0], nodes[2], operators[0], operators[1]
        if {first, last} <= {">", "\\ge"}:
            low, high, first, last = high, low, _TURNED[last], _TURNED[first]
        if {first, last} <= {"<", "\\le"}:
            piece = Piece(low=low, high=high, low_closed=first == "\\le", high_closed=last == "\\le")
            return Region(source=source, pieces=(piece,), variable=names[1])
    return None


def _distance(name: str, operator: str, bound: Node, source: str) -> Region:
    """Read `|x| < 3` as the numbers between -3 and 3, `|x| > 3` as all others."""
    closed = operator in ("\\le", ">")
    low = Product((MINUS_ONE, bound))
    between = Piece(low=low, high=bound, low_closed=closed, high_closed=closed)
    pieces = [between] if operator in ("<", "\\le") else regions.complement([between])
    return Region(source=source, pieces=tuple(pieces), variable=name)


def _variables(node: Node | None) -> frozenset[str]:
    return symbols(node) if node is not None else frozenset()


def _equation(parts: Sequence[Tokens], source: str) -> Value:
    """Read `x = 5`, `(a, b) = (1, 2)`, a chain `2 + 3 = 5`, or another equation."""
    if len(parts) == 2 and (pairs := _paired_names(parts, source)):
        return pairs
    sides = [_date(part, ranges=False) or _value(part) for part in parts]
    trees = [as_tree(side) for side in sides]
    left, right = trees[0], trees[-1]
    tree = difference(left, right) if len(parts) == 2 and left is not None and right is not None else None
    names = [_name(part) for part in parts]
    if names[0] and all(names[:-1]) and isinstance(sides[-1], Items) and "\\pm" in latex(parts[-1]):
        named = tuple(Named(source=item.source, name=names[0], value=item) for item in sides[-1].items)
        return replace(sides[-1], source=source, items=named)  # x = 1 \pm 2
    if names[0] and not names[-1] and len(parts) == 2:
        return Named(source=source, name=names[0], value=sides[1], tree=tree)
    if names[-1] and not names[0] and len(parts) == 2:
        return Named(source=source, name=names[-1], value=sides[0], tree=tree)
    if names[0] and len(parts) == 2:
        return Named(source=source, name=names[0], value=sides[1], tree=tree)
    relation = len(parts) == 2 and _variables(left)  # x + y = 5
    if len(parts) > 2 and all(names[:-1]) and not names[-1]:  # x = y = 4
        items = tuple(Named(source=latex(parts[-1]), name=name, value=sides[-1]) for name in names[:-1])
        return Items(source=source, brackets="", items=items)
    if not relation and _is_chain(sides[1:] if names[0] else sides):
        return Named(source=source, name=names[0], value=sides[-1], tree=tree)
    return Relation(source=source, operators=("=",) * (len(parts) - 1), sides=tuple(sides), tree=tree)


def _is_chain(sides: Sequence[Value]) -> bool:
    """Whether all sides of an equation that have a number agree with the last, at least when rounded."""
    trees = [as_tree(side) for side in sides]
    last = trees[-1]
    return last is not None and all(
        tree is not None and (algebra.equal(tree, last) or _is_near(tree, last) or not _has_digits(tree))
        for tree in trees
    )


def _is_near(tree: Node, other: Node) -> bool:
    r"""Whether two numbers differ by at most 1%, as in `20 \cos 30° = 17.3`."""
    numbers = [None if symbols(node) - {"degree"} else algebra.number(node) for node in (tree, other)]
    one, two = numbers
    return one is not None and two is not None and abs(one - two) <= 0.01 * abs(two)


def _has_digits(tree: Node) -> bool:
    return any(isinstance(node, Num) for node in walk(tree))


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
    if not tokens or not any(t.kind == "word" or t.text[1:] in GREEK for t in tokens) or len(tokens) > 20:
        return ""
    skip = 0
    for position, (before, token) in enumerate(pairwise([Token("sign", ""), *tokens])):
        if position < skip:
            continue
        index = before.text in ("_", "\\angle", "(") or (before.text == "^" and token.text == "{")
        if before.text in ("_", "\\angle") and token.text == "{":
            skip = position + next((i for i, t in enumerate(tokens[position:]) if t.text == "}"), 0)
        elif token.kind == "number" and not index:
            return ""
        elif token.text == "^":
            if latex(tokens[position : position + 5])[:5] != "^{-1}":
                return ""
            skip = position + 5
        elif token.text in ("+", "-", "\\cdot", "\\sqrt", ",", "!", "%", "\\pm", "°"):
            return ""
    return latex(tokens)


def _ratio(tokens: Tokens, source: str) -> Value | None:
    parts, found = split(tokens, frozenset([":"]))
    if not found or not all(parts):
        return None
    values = tuple(_value(part) for part in parts)
    if any(isinstance(value, Text) for value in values):
        return text_of(tokens)
    return Ratio(source=source, parts=values)
