"""Whether two expressions are equal, decided without a computer algebra system wherever that is certain.

Both are brought to a quotient of polynomials (`polynomials`, `functions`). Equal quotients are equal
expressions. Different ones are different where nothing but independent atoms is left (variables, roots of
primes, pi, logarithms of primes), or where the values at fixed points (`numeric`) are clearly apart.
All else is undecided. The work is bounded whatever is read.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

from rlcs.grading import functions, numeric, polynomials, tree
from rlcs.grading.polynomials import (  # fmt: skip
    CONSTANT,
    FUNCTION,
    MINUS,
    NUMBER,
    UNIT,
    VARIABLE,
    Atom,
    Calculator,
    Monomial,
    Polynomial,
    Quotient,
    TooLargeError,
    UndecidedError,
    as_rational,
    rational,
    single,
)

MAX_DEPTH = 60
MAX_NODES = 1_000
INTEGERS = frozenset("kmnN")
"""Variables that stand for integers: they are given integer values where values are compared."""
SCALES = (0.6, 2.7, 17.0, 1.3, 0.02)
DEGREE = "degree"


def exact(node: tree.Node) -> Fraction | None:
    """The value of an expression that is a rational number; None where it is not, or is not known.

    Raises TooLargeError where the numbers or the expression are too large to work out.
    """
    _check_size(node)
    try:
        return as_rational(_form(Calculator(), node, {}))
    except UndecidedError:
        return None


def too_large(node: tree.Node) -> bool:
    """Whether a power or factorial in an expression, or the expression itself, is too large to work out."""
    try:
        _check_size(node)
    except TooLargeError:
        return True
    calc = Calculator()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        try:
            _form(calc, node, {})
        except TooLargeError:
            return True
        except UndecidedError:  # what has no value may still have a part that is too large
            waiting.extend(tree.children(node) if calc.left >= 0 else ())
    return False


def equal(a: tree.Node, b: tree.Node) -> bool | None:
    """Whether two expressions are equal for all real variables; None where it is not certain."""
    try:
        _check_size(a)
        _check_size(b)
    except TooLargeError:
        return None
    if a == b:
        return True
    infinite = _infinity(a), _infinity(b)
    if any(infinite):
        return infinite[0] == infinite[1] if all(infinite) or number(b if infinite[0] else a) else None
    try:
        calc = Calculator()
        rest = calc.difference(_form(calc, a, {}), _form(calc, b, {}))
        if not rest:
            return True
        if _is_independent(rest):
            return False
    except (TooLargeError, UndecidedError):
        pass
    return False if _differ(a, b) else None


def same_equation(a: tree.Node, b: tree.Node) -> bool | None:
    """Whether a = 0 and b = 0 are the same equation up to a constant factor; None where it is not certain."""
    try:
        _check_size(a)
        _check_size(b)
        if a == b:
            return True
        calc = Calculator()
        tops = [_without_quotients(calc, _form(calc, node, {})) for node in (a, b)]
        if not all(tops):
            return not any(tops)
        # Each is multiplied by what the other has before one and the same product of variables.
        first = max(_variables(monomial) for monomial in tops[0])
        parts = [_coefficient(top, first) for top in tops]
        p, q = calc.multiply(tops[0], parts[1]), calc.multiply(tops[1], parts[0])
        rest = calc.add(p, {monomial: -c for monomial, c in q.items()})
    except (TooLargeError, UndecidedError):
        return None
    if parts[1] and not rest:
        return True
    plain = all(
        _is_independent(top) and all(e.denominator == 1 for m in top for x, e in m if x.kind == VARIABLE)
        for top in tops
    )
    return False if plain else None


def number(node: tree.Node) -> complex | None:
    """The value of an expression without variables in floating point; None where it has none."""
    try:
        _check_size(node)
        return numeric.estimate(node, {})[0]
    except numeric.FAILURES:
        return None


def both_signs(node: tree.Node) -> tuple[tree.Node, ...]:
    r"""The expressions that one with `\pm` stands for: all upper signs, then all lower ones."""
    _check_size(node)
    if not any(isinstance(below, tree.PlusMinus) for below in tree.walk(node)):
        return (node,)
    return _with_sign(node, upper=True), _with_sign(node, upper=False)


def _with_sign(node: tree.Node, *, upper: bool) -> tree.Node:
    match node:
        case tree.PlusMinus(term, opposite):
            inner = _with_sign(term, upper=upper)
            return inner if upper != opposite else tree.Product((tree.MINUS_ONE, inner))
        case tree.Sum(terms):
            return tree.Sum(tuple(_with_sign(term, upper=upper) for term in terms))
        case tree.Product(terms):
            return tree.Product(tuple(_with_sign(term, upper=upper) for term in terms))
        case tree.Power(base, exponent):
            return tree.Power(_with_sign(base, upper=upper), _with_sign(exponent, upper=upper))
        case tree.Call(name, arguments):
            return tree.Call(name, tuple(_with_sign(term, upper=upper) for term in arguments))
    return node


def _check_size(node: tree.Node) -> None:
    """Refuse what is too deep or too long before anything recursive looks at it."""
    level: list[tree.Node] = [node]
    depth = nodes = 0
    while level:
        depth += 1
        nodes += len(level)
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise TooLargeError("an expression is too long or nested too deeply")
        level = [child for parent in level for child in tree.children(parent)]


def _form(calc: Calculator, node: tree.Node, known: Mapping[str, Quotient]) -> Quotient:
    """An expression as a quotient, where some variables stand for others."""
    calc.spend(1)
    match node:
        case tree.Num(value):
            if max(value.numerator.bit_length(), value.denominator.bit_length()) > polynomials.MAX_BITS:
                raise TooLargeError("a number is too large to work out")
            return rational(value)
        case tree.Sym(name):
            return known.get(name) or single(Atom(VARIABLE, name))
        case tree.Const("i"):
            return single(MINUS, polynomials.HALF)
        case tree.Const("pi" | "e" as name):
            return single(Atom(CONSTANT, name))
        case tree.Sum(terms):
            total, *others = (_form(calc, term, known) for term in terms)
            for other in others:
                total = calc.plus(total, other)
            return total
        case tree.Product(terms):
            return calc.times(*(_form(calc, term, known) for term in terms))
        case tree.Power(base, exponent):
            return functions.power(calc, _form(calc, base, known), _form(calc, exponent, known))
        case tree.Call(name, arguments):
            if name in ("sin", "cos", "tan", "cot", "sec", "csc"):
                known = {**known, DEGREE: Quotient({polynomials.PI: Fraction(1, 180)}, UNIT)}
            values = tuple(_form(calc, x, known) for x in arguments)
            if name == "abs" and (sign := _sign(arguments[0], values[0])):
                return calc.times(rational(sign), values[0])
            if (result := functions.call(calc, name, values)) is not None:
                return result
            if made := functions.definition(name, len(values)):
                return _form(calc, made, dict(zip(functions.PLACES, values, strict=False)))
    raise UndecidedError("infinity, or both signs")


def _sign(node: tree.Node, f: Quotient) -> int:
    """The sign of a constant sum where it is clear, else 0."""
    if len(f.top) < 2 or not polynomials.is_constant(f.top):
        return 0
    try:
        value, error = numeric.estimate(node, {})
    except numeric.FAILURES:
        return 0
    return 0 if value.imag or abs(value) <= 1e3 * error else 1 if value.real > 0 else -1


def _infinity(node: tree.Node) -> int:
    """1 or -1 for an expression that is plus or minus infinity, 0 for any other."""
    match node:
        case tree.Const("infinity"):
            return 1
        case tree.Product((tree.Num(value), tree.Const("infinity"))) if value:
            return 1 if value > 0 else -1
    return 0


def _is_independent(p: Polynomial) -> bool:
    """Whether different monomials of these atoms are linearly independent, so that no sum of them is zero."""
    return all(_is_basic(atom, e) for monomial in p for atom, e in monomial)


def _is_basic(atom: Atom, e: Fraction) -> bool:
    if not all(x.kind == VARIABLE and y > 0 and y.denominator == 1 for x, y in atom.exponent):
        return False
    if atom.kind == NUMBER:
        return (
            int(atom.name) < polynomials.MAX_FACTOR**2
            if atom != MINUS and atom.name != "-1"
            else e == polynomials.HALF
        )
    if atom.kind == FUNCTION and atom.name == "ln" and not atom.exponent:
        value = as_rational(Quotient(dict(atom.arguments[0]), UNIT))
        return len(atom.arguments) == 1 and value is not None and 0 < value < polynomials.MAX_FACTOR**2
    return atom.kind == CONSTANT or (atom.kind == VARIABLE and atom.name != DEGREE)


def _differ(a: tree.Node, b: tree.Node) -> bool:
    """Whether the values are clearly apart at one of a few points."""
    names = sorted(tree.symbols(a) | tree.symbols(b))
    for turn, scale in enumerate(SCALES if names else SCALES[:1]):
        point = {name: scale * (0.5 + (0.618 * i + 0.37 * turn) % 1) for i, name in enumerate(names, start=1)}
        point |= {name: 3.0 + 2 * turn + 5 * i % 7 for i, name in enumerate(names) if name in INTEGERS}
        point[DEGREE] = math.pi / 180
        try:
            (x, x_error), (y, y_error) = numeric.estimate(a, point), numeric.estimate(b, point)
        except numeric.FAILURES:
            continue
        if abs(x - y) > max(1e-6 * max(abs(x), abs(y)), 1e3 * (x_error + y_error)):
            return True
    return False


def _without_quotients(calc: Calculator, f: Quotient) -> Polynomial:
    """The top of a quotient times what makes the exponents of its variables positive."""
    lowest: dict[Atom, Fraction] = {}
    for monomial in f.top:
        for atom, e in monomial:
            if e < 0 and atom.kind != NUMBER:
                lowest[atom] = min(e, lowest.get(atom, Fraction(0)))
    common = tuple(sorted((atom, -e) for atom, e in lowest.items()))
    return calc.multiply(f.top, {common: Fraction(1)})


def _variables(monomial: Monomial) -> Monomial:
    """The part of a monomial that is not a constant."""
    return tuple((atom, e) for atom, e in monomial if _varies(atom))


def _varies(atom: Atom) -> bool:
    below = [atom.exponent, *(monomial for argument in atom.arguments for monomial, _ in argument)]
    return atom.kind == VARIABLE or any(_varies(x) for monomial in below for x, _ in monomial)


def _coefficient(p: Polynomial, variables: Monomial) -> Polynomial:
    return {
        tuple(pair for pair in monomial if pair not in variables): c
        for monomial, c in p.items()
        if _variables(monomial) == variables
    }
