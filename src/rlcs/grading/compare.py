r"""Compares two values that were read from answers; the kind of the gold answer decides how.

What cannot be decided here (is this sum that integral?) is `Verdict(correct=None)` with two formulas for
math-verify, which may never end and therefore runs in a worker that can be killed. The rules are strict, so
that a reward cannot be gamed: all of the answer counts, not a part of it (docs/reference/grading.md).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from rlcs.grading import algebra, regions
from rlcs.grading.formulas import FUNCTIONS, GREEK
from rlcs.grading.tree import Call, Num, Sym, replaced, symbols, walk
from rlcs.grading.values import (
    Based,
    Dated,
    Expression,
    Items,
    Letters,
    Matrix,
    Named,
    Number,
    Quantity,
    Ratio,
    Region,
    Relation,
    Text,
    Value,
)
from rlcs.records import Grade

MAX_FORMULA = 1_000
"""Most characters of a formula that is given to math-verify."""
_NAME_SPELLING = re.compile(
    r"^m(?=\\angle)|\\(?:angle|triangle|text|overline)(?![A-Za-z])|[{}\s_]|^\|(?=[A-Z]+\|$)|(?<=[A-Z])\|$"
)
"""What may be missing in a name: `m\\angle A` is A, `|AB|` is AB."""
_ANOTHER_VALUE = re.compile(r"\\(?:ln|log|lg|exp|lim)|^[^fghA-Z]*\^|^\|[a-z\\]|^not|[a-z]/|^([a-z])\1")
"""Names whose value is not the one that is asked for: who answers `ln x = 5` does not say that x is 5."""
_MAX_ITEMS = 50
_COMPARABLE = FUNCTIONS | GREEK
_COMPARABLE |= frozenset(
    "factorial floor ceil sum prod int lim infty to frac over sqrt binom pi cdot pm mp le ge ne in cup"
    " cap setminus emptyset R Z N Q C max min gcd lcm mod pmod bmod lfloor rfloor lceil rceil overline"
    " vec hat begin end det circ angle triangle neg".split()
)
"""Commands and functions that math-verify reads; it takes others (`\\partial`) for products of letters."""
_SYMMETRIC = frozenset(["=", "\\ne", "\\parallel", "\\perp", "\\sim", "\\cong", "\\approx"])
LABEL = re.compile(r"\(?([A-Za-z])(?:\)[.:]?|[.:]) *(.*)|\(?([A-Za-z])\)?", re.DOTALL)
"""A letter before a value, `(B) 12`, or alone, `(B)`."""
_UNDER = re.compile(r"_ ?\{[^{}]*\}")  # the n=1 under a sum
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{4,}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Right, wrong, or undecided (None): then `formulas` holds (prediction, gold) for math-verify.

    `answer_value` and `gold_value` are what was read on both sides, `why` is the rule that decided.
    """

    correct: bool | None
    why: str
    formulas: tuple[str, str] = ("", "")
    answer_value: str = ""
    gold_value: str = ""

    def grade(self, extracted: str | None = None, *, by: str = "") -> Grade:
        """Make a grade with reward 1 or 0, or unscored; the reason begins with `by` (how it was found)."""
        return Grade(
            reward=None if self.correct is None else float(self.correct),
            correct=self.correct,
            extracted=extracted,
            why=by + self.why,
            answer_value=self.answer_value,
            gold_value=self.gold_value,
        )


def yes(why: str) -> Verdict:
    """A right answer."""
    return Verdict(correct=True, why=why)


def no(why: str) -> Verdict:
    """A wrong answer."""
    return Verdict(correct=False, why=why)


def either(correct: bool, right: str, wrong: str) -> Verdict:
    """A right or a wrong answer, with the reason for each."""
    return Verdict(correct=correct, why=right if correct else wrong)


def same(answer: Value, gold: Value) -> Verdict:
    """Compare two values."""
    if answer.source == gold.source:
        return yes("the same text")
    answer, gold = _as_one(answer, gold), _as_one(gold, answer)
    if isinstance(answer, Relation) and answer.stated and not isinstance(gold, Relation | Named):
        return _best([same(value, gold) for value in answer.stated])
    if isinstance(gold, Relation) and len(gold.stated) > 1 and not isinstance(answer, Named):
        given = answer.stated[0] if isinstance(answer, Relation) and answer.stated else answer
        if not isinstance(given, Relation):
            return _best([same(given, value) for value in gold.stated])
    if isinstance(gold, Named):
        return _named_gold(answer, gold)
    if isinstance(answer, Named) and isinstance(gold, Relation):
        return _same_equation(answer, gold)
    if isinstance(answer, Named):
        other = _ANOTHER_VALUE.search(answer.name)
        return no(f"a value of {answer.name}") if other else _leaving_off("name", same(answer.value, gold))
    return _RULES[type(gold)](answer, gold)


def _as_one(value: Value, other: Value) -> Value:
    """The one value of a list: {5} is 5; where the other is no list, AB = BC = 5 is 5 as well."""
    if not isinstance(value, Items):
        return value
    alone = len(value.items) == 1 and value.brackets in ("", "{}")
    if alone and not isinstance(value.items[0], Items | Region):
        return value.items[0]
    named = [item.value for item in value.items if isinstance(item, Named)]
    common = len(named) == len(value.items) and len({each.source for each in named}) == 1
    return named[0] if common and not isinstance(other, Items) else value


def _best(verdicts: Sequence[Verdict]) -> Verdict:
    """The first right verdict, else an undecided one, else the first."""
    return min(verdicts, key=lambda verdict: (True, None, False).index(verdict.correct))


def _leaving_off(what: str, verdict: Verdict) -> Verdict:
    """Add to the reason of a right answer that only one of the two has a unit or a name."""
    return replace(verdict, why=f"{verdict.why}; a {what} may be left off") if verdict.correct else verdict


# --- names and relations -----------------------------------------------------------------------------


def _named_gold(answer: Value, gold: Named) -> Verdict:
    if isinstance(answer, Named):
        if same_name(answer.name, gold.name) or not (answer.name and gold.name):
            return same(answer.value, gold.value)
        verdict = _same_equation(answer, gold) if gold.tree is not None else no("")
        if verdict.correct or (gold.tree and not (_is_constant(gold.value) and _is_constant(answer.value))):
            return verdict
        return no(f"a value of {answer.name}, not of {gold.name}")
    if isinstance(answer, Relation):
        if _is_constant(gold.value) and "\\frac" not in gold.name and "/" not in gold.name:
            return no("an equation that is not solved")
        return _same_equation(answer, gold)
    return _leaving_off("name", same(answer, gold.value))


def same_name(one: str, other: str) -> bool:
    """Whether two names have the same letters, or are a word and its initial: `C` and `Circumference`."""
    short, long = sorted((_NAME_SPELLING.sub("", name) for name in (one, other)), key=len)
    if short == long or (len(short) == 2 and short.isupper() and short == long[::-1]):
        return True  # AB and BA are one segment
    word = long.isalpha() and len(long) > 3 and not long.isupper() and len(short) == 1
    return short.casefold() == long.casefold() or (word and long.startswith(short))


def _is_constant(value: Value) -> bool:
    return isinstance(value, Number | Quantity) or (value.tree is not None and not symbols(value.tree))


def _same_equation(answer: Value, gold: Value) -> Verdict:
    if isinstance(answer, Relation) and answer.operators != ("=",):
        return no("another relation")
    if answer.tree is None or gold.tree is None:
        return no("not known to be the same equation")  # math-verify errs on equations
    if not (symbols(answer.tree) | symbols(gold.tree)) - {"degree"}:
        return no("other numbers in an equation without variables")
    decided = algebra.same_equation(answer.tree, gold.tree)
    if decided is None:
        return no("not known to be the same equation")
    return either(decided, "the same equation", "another equation")


def _relation(answer: Value, gold: Relation) -> Verdict:
    if not isinstance(answer, Relation):
        return no("a value where an equation or a relation is asked")
    if answer.operators != gold.operators:
        return no("another relation")
    verdict = _in_order(answer.sides, gold.sides, "relation")
    if verdict.correct is False and len(gold.sides) == 2 and gold.operators[0] in _SYMMETRIC:
        verdict = _in_order(answer.sides[::-1], gold.sides, "relation")
    if verdict.correct is not False or gold.operators == ("\\to",):
        return verdict
    if gold.operators == ("=",):
        return _same_equation(answer, gold)
    if answer.tree is not None and gold.tree is not None:
        return formulas(answer, gold)
    return verdict


# --- numbers, quantities and formulas ----------------------------------------------------------------


def _number(answer: Value, gold: Number) -> Verdict:
    if isinstance(answer, Number):
        return either(_same_share(answer, gold), "the same number", "another number")
    if isinstance(answer, Quantity) and gold.percent:
        return no("a quantity where a percentage is asked")
    if isinstance(answer, Based) and answer.value is not None:
        return either(Num(answer.value) == gold.tree, "the same number", "another number")
    return _formula(answer, gold)


def _same_share(answer: Number, gold: Number) -> bool:
    """Compare numbers with percent signs: 50% is 50 and 0.5; but 0.5% is not 0.5, as 0.5 is a share."""
    if answer.percent and not gold.percent:
        return answer.value / 100 == gold.value or (answer.value == gold.value and abs(gold.value) >= 1)
    if gold.percent and not answer.percent:
        return answer.value in (gold.value, gold.value / 100)
    return answer.value == gold.value


def _quantity(answer: Value, gold: Quantity) -> Verdict:
    if isinstance(answer, Quantity):
        if not answer.unit.same(gold.unit):
            return no(f"another unit: {answer.unit} against {gold.unit}")
        return same(answer.magnitude, gold.magnitude)
    if isinstance(answer, Expression) and gold.tree is not None and _variables(answer):
        return _equal(answer, gold)
    if isinstance(answer, Number) and answer.percent:
        return no("a percentage where a quantity is asked")
    if isinstance(answer, Number | Expression):
        return _leaving_off("unit", same(answer, gold.magnitude))
    return _other_kind(answer, gold)


def _formula(answer: Value, gold: Value) -> Verdict:
    if isinstance(answer, Quantity):
        if answer.tree and _variables(gold):
            return _equal(answer, gold)
        return _leaving_off("unit", same(answer.magnitude, gold))
    if isinstance(answer, Relation):
        return no("an equation where a value is asked")
    if not isinstance(answer, Number | Expression) and not (isinstance(answer, Text) and answer.tree):
        return _other_kind(answer, gold)
    return _equal(answer, gold)


def _variables(value: Value) -> frozenset[str]:
    return symbols(value.tree) if value.tree is not None else frozenset()


def _equal(answer: Value, gold: Value) -> Verdict:
    if answer.tree is None or gold.tree is None:
        return formulas(answer, gold)
    decided = algebra.equal(answer.tree, gold.tree)
    if decided is False and "degree" in symbols(answer.tree) ^ symbols(gold.tree):
        one, other = (replaced(tree, Sym("degree"), Num(Fraction(1))) for tree in (answer.tree, gold.tree))
        decided = algebra.equal(one, other)
    if decided is None and algebra.too_large(answer.tree) and not algebra.too_large(gold.tree):
        return no("powers or factorials too large to work out")
    calls = {node.name for tree in (answer.tree, gold.tree) for node in walk(tree) if isinstance(node, Call)}
    if decided is None and not calls <= _COMPARABLE:
        return no("not known to be equal")
    return formulas(answer, gold) if decided is None else either(decided, "an equal formula", "another value")


def _unknown(formula: str) -> str:
    r"""A part of a formula on which math-verify has been seen to go wrong (it ignores it), or ""."""
    if part := re.search(r"\d_|\.\.\.|'|!!", formula):
        return part[0]
    return next((name for name in re.findall(r"\\[A-Za-z]+", formula) if name[1:] not in _COMPARABLE), "")


def formulas(answer: Value, gold: Value) -> Verdict:
    """Leave two formulas undecided, for math-verify, unless they are words or too long."""
    for value in (answer, gold):
        if isinstance(value, Text) or _LONG_WORD.search(value.source):
            return no("not the same text, and words are not formulas")
        if "=" in _UNDER.sub("", value.source):
            return no("not known to be the same equation")  # on equations math-verify errs
        if unknown := _unknown(value.source):
            return no(f"not the same text, and {unknown} cannot be compared")
    if max(len(answer.source), len(gold.source)) > MAX_FORMULA:
        return no("not the same text, and too long for a formula")
    return Verdict(correct=None, why="", formulas=(answer.source, gold.source))


# --- several values ----------------------------------------------------------------------------------


def _items(answer: Value, gold: Items) -> Verdict:
    if isinstance(answer, Region):
        return _region(answer, gold)
    if isinstance(answer, Matrix) and gold.brackets == "()":
        return _matrix_and_tuple(answer, gold)
    if not isinstance(answer, Items):
        return no("one answer where several are asked")
    if len(answer.items) != len(gold.items):
        return no(f"{len(answer.items)} answers, not {len(gold.items)}")
    if not _agreeing_brackets(answer, gold):
        return no(f"other brackets: {answer.brackets or 'none'} against {gold.brackets or 'none'}")
    if len(gold.items) > _MAX_ITEMS:
        return no("a long list that is not the same text")
    for one, other in ((answer, gold), (gold, answer)):
        if one.brackets == "()" and other.kind == "named values" and _common_name(other):
            return no("a point against several values of one variable")
    if gold.kind == "named values":
        return _named_values(answer.items, gold)
    if {answer.brackets, gold.brackets} <= {"", "{}"}:
        return _match(answer.items, gold.items)
    return _in_order(_by_variable(answer), gold.items, "list")


def _common_name(items: Items) -> str:
    """The variable of which a list gives several values (`x = 1, x = 2`, or `x_1 = 1, x_2 = 2`), or ""."""
    names = {re.sub(r"^x_\{?\d\}?$", "x", item.name) for item in items.items if isinstance(item, Named)}
    return names.pop() if len(names) == 1 else ""


def _by_variable(answer: Items) -> Sequence[Value]:
    """The values of a list in order; those of single letters (`y = 1, x = 2`) in that of the alphabet."""
    named = [item for item in answer.items if isinstance(item, Named) and len(item.name) == 1]
    if len(named) < len(answer.items):
        return answer.items
    return sorted(named, key=lambda item: item.name)


def _agreeing_brackets(answer: Items, gold: Items) -> bool:
    """Whether brackets agree: none may stand for braces or round ones, and for square ones of no interval."""
    pair = {answer.brackets, gold.brackets}
    no_interval = len(gold.items) > 2 or any(isinstance(item, Text) for item in gold.items)
    return len(pair) == 1 or pair in ({"", "{}"}, {"", "()"}) or (no_interval and pair <= {"", "()", "[]"})


def _named_values(answers: Sequence[Value], golds: Items) -> Verdict:
    """Compare named values by their names; an answer without names must have the same order."""
    named = [item for item in golds.items if isinstance(item, Named)]
    if name := _common_name(golds):  # x = 1 or x = 2
        for a in answers:
            if isinstance(a, Named) and not same_name(re.sub(r"_\{?\d\}?$", "", a.name), name):
                return no(f"a value of {a.name}, not of {name}")
        return _match([a.value if isinstance(a, Named) else a for a in answers], [g.value for g in named])
    if not any(isinstance(answer, Named) for answer in answers):
        return _in_order(answers, golds.items, "list")
    ordered: list[Value] = []
    for gold in named:
        fits = [a for a in answers if isinstance(a, Named) and same_name(a.name, gold.name)]
        if len(fits) != 1:
            return no(f"no value of {gold.name}")
        ordered.append(fits[0])
    return _in_order(ordered, golds.items, "list")


def _in_order(answers: Sequence[Value], golds: Sequence[Value], what: str) -> Verdict:
    undecided = False
    for answer, gold in zip(answers, golds, strict=True):
        verdict = _same_member(answer, gold)
        if verdict.correct is False:
            return no(f"another {what}: {verdict.why}")
        undecided = undecided or verdict.correct is None
    return Verdict(correct=None, why="") if undecided else yes(f"the same {what}")


def _same_member(answer: Value, gold: Value) -> Verdict:
    """Compare members of lists: {b} is no b there."""
    braces = [isinstance(value, Items) and value.brackets == "{}" for value in (answer, gold)]
    return same(answer, gold) if braces[0] == braces[1] else no("a set against a value")


def _match(answers: Sequence[Value], golds: Sequence[Value]) -> Verdict:
    """Pair answers with golds, each once."""
    left, undecided = list(golds), False
    for answer in answers:
        verdicts = [_same_member(answer, gold).correct for gold in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            undecided = True
        else:
            return no(f"{answer} is none of the answers")
    return Verdict(correct=None, why="") if undecided else yes("the same values")


def _region(answer: Value, gold: Value) -> Verdict:
    mine, theirs = regions.as_pieces(answer), regions.as_pieces(gold)
    if mine is None or theirs is None:
        if isinstance(answer, Text | Number | Quantity | Letters | Items):
            return _other_kind(answer, gold)
        return formulas(answer, gold)
    names = {value.variable for value in (answer, gold) if isinstance(value, Region) and value.variable}
    if len(names) == 1 and isinstance(answer, Region) and _ANOTHER_VALUE.search(answer.variable):
        return no(f"a condition on {answer.variable}")
    if len(names) > 1 and not same_name(*names):
        return no("a condition on another variable")
    decided = regions.same_pieces(mine, theirs)
    if decided is None:
        return formulas(answer, gold)
    return either(decided, "the same set of numbers", "another set of numbers")


def _matrix(answer: Value, gold: Matrix) -> Verdict:
    if isinstance(answer, Items):
        return _matrix_and_tuple(gold, answer)
    if not isinstance(answer, Matrix):
        return formulas(answer, gold) if isinstance(answer, Expression) else _other_kind(answer, gold)
    if [len(row) for row in answer.rows] != [len(row) for row in gold.rows]:
        return no("a matrix of another shape")
    cells = [[cell for row in matrix.rows for cell in row] for matrix in (answer, gold)]
    return _in_order(cells[0], cells[1], "matrix")


def _matrix_and_tuple(matrix: Matrix, items: Items) -> Verdict:
    """Compare a vector written as a matrix of one row or column with one written as a tuple."""
    cells = [cell for row in matrix.rows for cell in row]
    if 1 not in (len(matrix.rows), len(matrix.rows[0])) or len(cells) != len(items.items):
        return no("a matrix against a list")
    if items.brackets != "()":
        return no(f"other brackets: {items.brackets or 'none'} against those of a vector")
    return _in_order(cells, items.items, "vector")


def _ratio(answer: Value, gold: Ratio) -> Verdict:
    if not isinstance(answer, Ratio):
        return _other_kind(answer, gold)
    if len(answer.parts) != len(gold.parts):
        return no("a ratio of more or fewer parts")
    return _in_order(answer.parts, gold.parts, "ratio")


# --- other kinds -------------------------------------------------------------------------------------


def _based(answer: Value, gold: Based) -> Verdict:
    if isinstance(answer, Based):
        matches = (answer.digits.lstrip("0"), answer.base) == (gold.digits.lstrip("0"), gold.base)
        return either(matches, "the same digits in the same base", "other digits or another base")
    if isinstance(answer, Number) and answer.source.upper() == gold.digits:
        return yes("the same digits; the base may be left off")
    return _other_kind(answer, gold)


def _dated(answer: Value, gold: Dated) -> Verdict:
    if isinstance(answer, Dated):
        return either(answer.date.same(gold.date), "the same date or range", "another date or range")
    return _other_kind(answer, gold)


def _letters(answer: Value, gold: Letters) -> Verdict:
    if isinstance(answer, Letters):
        return either(answer.letters == gold.letters, "the same letters", "other letters")
    if (label := LABEL.fullmatch(answer.source)) and len(gold.letters) == 1:
        letter = (label[1] or label[3]).upper()
        return either({letter} == gold.letters, "the same letter", "another letter")
    return _other_kind(answer, gold)


def _text(answer: Value, gold: Text) -> Verdict:
    if isinstance(answer, Text):
        return either(answer.words == gold.words != "", "the same words", "other words")
    if gold.tree and isinstance(answer, Expression) and answer.tree:
        return _equal(answer, gold)  # ab and a * b
    return _other_kind(answer, gold)


def _other_kind(answer: Value, gold: Value) -> Verdict:
    if isinstance(answer, Items) and len(answer.items) > 1 and not isinstance(gold, Items | Region):
        return no("several answers where one is asked")
    return no(f"the answer is read as {answer.kind}, the gold answer as {gold.kind}")


_RULES: dict[type, Callable[..., Verdict]] = {
    Number: _number,
    Quantity: _quantity,
    Expression: _formula,
    Relation: _relation,
    Region: _region,
    Items: _items,
    Matrix: _matrix,
    Ratio: _ratio,
    Based: _based,
    Dated: _dated,
    Letters: _letters,
    Text: _text,
}


def same_when_rounded(answer: Value, gold: Value, places: int) -> bool:
    """Whether two numbers agree to a number of decimal places, their units and names aside."""
    one, other = map(_plain_number, (answer, gold))
    return one is not None and other is not None and abs(one - other) <= Fraction(1, 2 * 10**places)


def _plain_number(value: Value) -> Fraction | None:
    value = value.value if isinstance(value, Named) else value
    value = value.magnitude if isinstance(value, Quantity) else value
    return value.value if isinstance(value, Number) else None
