"""Powers and functions of the quotients of `polynomials`, by the identities that hold for real variables."""

import math
from collections.abc import Callable
from fractions import Fraction

from rlcs.grading import polynomials, tree
from rlcs.grading.polynomials import (  # fmt: skip
    CONSTANT,
    FUNCTION,
    HALF,
    I_PI,
    MINUS,
    NUMBER,
    PI,
    SUM,
    UNIT,
    Atom,
    Calculator,
    E,
    Key,
    Monomial,
    Polynomial,
    Quotient,
    TooLargeError,
    UndecidedError,
    as_rational,
    content,
    is_positive,
    key,
    rational,
    scaled,
    single,
)

MAX_FACTORIAL = 500
MAX_SHIFT = 12
"""(n + 3)! is (n + 3)(n + 2)(n + 1) n!: up to this many factors are taken out."""

ROUNDINGS = {function.__name__: function for function in (math.floor, math.ceil)}


def power(calc: Calculator, base: Quotient, exponent: Quotient) -> Quotient:
    """A quotient to the power of another."""
    if (r := as_rational(exponent)) is not None:
        return _rational_power(calc, base, r)
    if not base.top:
        raise UndecidedError("zero to a symbolic exponent")
    terms = exponent.top
    if exponent.bottom != UNIT:
        inverse = Atom(FUNCTION, "inverse", (key(exponent.bottom),))
        terms = calc.multiply(terms, {((inverse, Fraction(1)),): Fraction(1)})
    result = rational(1)
    for monomial, c in terms.items():
        part = _symbolic_power(calc, base, monomial, c) if monomial else _rational_power(calc, base, c)
        result = calc.times(result, part)
    return result


def _rational_power(calc: Calculator, f: Quotient, r: Fraction) -> Quotient:
    if r.denominator == 1:
        return calc.to_integer(f, r.numerator)
    if not f.top:
        if r < 0:
            raise UndecidedError("zero to a negative exponent")
        return f
    number = content(f.top)
    whole = math.floor(r)
    if len(f.top) == 1 and f.bottom == UNIT:
        [(monomial, c)] = f.top.items()
        positive = {atom: e for atom, e in monomial if is_positive(atom)}
        rest = {atom: e for atom, e in monomial if atom not in positive}
        result = calc.times(number_root(calc, abs(c), r), calc.product(Fraction(1), positive, r))
        if not rest:
            return result if c > 0 else calc.times(result, number_root(calc, Fraction(-1), r))
        [e, *others] = rest.values()
        if c > 0 and not others and e.numerator % 2:
            return calc.times(result, calc.product(Fraction(1), rest, r))
        f = Quotient({tuple(sorted(rest.items())): Fraction(1 if c > 0 else -1)}, UNIT)
    else:
        f = Quotient(scaled(f.top, 1 / number), f.bottom)
        result = number_root(calc, number, r)
    kept = (key(f.top),) if f.bottom == UNIT else (key(f.top), key(f.bottom))
    root = single(Atom(SUM if f.bottom == UNIT else FUNCTION, "root", kept), r - whole)
    return calc.times(result, calc.to_integer(f, whole), root)


def number_root(calc: Calculator, c: Fraction, r: Fraction) -> Quotient:
    """A number to a fraction, with perfect powers and primes taken out; an odd root keeps the sign."""
    if c < 0:
        if r.denominator % 2:
            return calc.times(rational(-1 if r.numerator % 2 else 1), number_root(calc, -c, r))
        return calc.times(calc.product(Fraction(1), {MINUS: r}), number_root(calc, -c, r))
    roots = (
        polynomials.integer_root(c.numerator, r.denominator),
        polynomials.integer_root(c.denominator, r.denominator),
    )
    if roots[0] is not None and roots[1] is not None:
        return rational(polynomials.number_power(Fraction(*roots), r.numerator))
    return calc.product(Fraction(1), {prime: e * r for prime, e in _primes(calc, c).items()})


def _primes(calc: Calculator, c: Fraction) -> dict[Atom, Fraction]:
    """A positive number as atoms to exponents."""
    calc.spend(100 if max(c.numerator, c.denominator) > 10**6 else 5)
    found = {Atom(NUMBER, str(p)): Fraction(e) for p, e in polynomials.factors(c.numerator).items()}
    return found | {Atom(NUMBER, str(p)): Fraction(-e) for p, e in polynomials.factors(c.denominator).items()}


def _symbolic_power(calc: Calculator, f: Quotient, exponent: Monomial, c: Fraction) -> Quotient:
    """A quotient to the power of a number times a monomial."""
    if f.bottom != UNIT:
        if c.denominator != 1:
            return single(Atom(FUNCTION, "power", (key(f.top), key(f.bottom), key({exponent: c}))))
        parts = [_symbolic_power(calc, Quotient(p, UNIT), exponent, c) for p in f]
        return calc.over(*parts)
    if len(f.top) > 1:
        number = content(f.top)
        result = _symbolic_power(calc, rational(number), exponent, c) if number != 1 else rational(1)
        return calc.times(result, single(Atom(SUM, "root", (key(scaled(f.top, 1 / number)),), exponent), c))
    [(monomial, number)] = f.top.items()
    signed = [(MINUS, Fraction(1))] if number < 0 else []
    atoms = [*signed, *_primes(calc, abs(number)).items(), *monomial]
    free = [e for atom, e in atoms if not is_positive(atom)]
    if c.denominator != 1 and free and (len(free) > 1 or free[0].numerator % 2 == 0):
        return single(Atom(FUNCTION, "power", (key(f.top), key({exponent: c}))))
    result = rational(1)
    for atom, e in atoms:
        inner = calc.multiply({atom.exponent: Fraction(1)}, {exponent: Fraction(1)})
        if len(inner) != 1:
            raise UndecidedError("an exponent with a sum")
        [(product, factor)] = inner.items()
        bare = atom._replace(exponent=())
        result = calc.times(result, _atom_power(calc, bare, product, e * c * factor))
    return result


def _atom_power(calc: Calculator, atom: Atom, exponent: Monomial, c: Fraction) -> Quotient:
    """An atom to a number times a monomial; e to a logarithm or to a multiple of i pi is known."""
    if atom == E and exponent == I_PI:
        i = calc.product(Fraction(1), {MINUS: HALF})
        sine = _sine(calc, Quotient({PI: c}, UNIT))
        return calc.plus(_sine(calc, Quotient({PI: c + HALF}, UNIT)), calc.times(i, sine))
    for logarithm, e in exponent if atom == E else ():
        if logarithm.name == "ln" and e == 1 and logarithm.kind == FUNCTION:
            rest = tuple(pair for pair in exponent if pair[0] != logarithm)
            top, *bottom = (dict(argument) for argument in logarithm.arguments)
            return power(calc, Quotient(top, *bottom or [UNIT]), Quotient({rest: c}, UNIT))
    return calc.product(Fraction(1), {atom._replace(exponent=exponent): c})


def _ln(calc: Calculator, f: Quotient) -> Quotient:
    if not f.top:
        raise UndecidedError("the logarithm of zero")
    number = content(f.top)
    parts: list[Polynomial] = []
    rest = Quotient(scaled(f.top, 1 / number), f.bottom)
    if len(f.top) == 1 and f.bottom == UNIT:
        [(monomial, c)] = f.top.items()
        number, left = abs(c), []
        for atom, e in monomial:
            if not is_positive(atom):
                left.append((atom, e))
            elif atom == E or (atom.exponent and atom.kind != FUNCTION):
                bare = atom._replace(exponent=())
                logarithm = UNIT if bare == E else _monomial({_ln_atom(bare): Fraction(1)})
                parts.append(calc.multiply({atom.exponent: e}, logarithm))
            else:
                parts.append(_monomial({_ln_atom(atom): Fraction(1)}, e))
        rest = Quotient({tuple(left): Fraction(1 if c > 0 else -1)}, UNIT)
        if not left and c < 0:
            parts.append({I_PI: Fraction(1)})
            rest = rational(1)
        elif len(left) == 1 and c > 0 and left[0][1].numerator % 2:
            parts.append(_monomial({_ln_atom(left[0][0]): Fraction(1)}, left[0][1]))
            rest = rational(1)
    parts += [_monomial({_ln_atom(prime): Fraction(1)}, e) for prime, e in _primes(calc, number).items()]
    if as_rational(rest) != 1:
        parts.append(_monomial({Atom(FUNCTION, "ln", _arguments(rest)): Fraction(1)}))
    return Quotient(calc.add(*parts), UNIT)


def _monomial(exponents: dict[Atom, Fraction], c: Fraction | int = 1) -> Polynomial:
    return {tuple(sorted((atom, Fraction(e)) for atom, e in exponents.items())): Fraction(c)}


def _ln_atom(atom: Atom) -> Atom:
    bare = {(): Fraction(int(atom.name))} if atom.kind == NUMBER else _monomial({atom: Fraction(1)})
    return Atom(FUNCTION, "ln", (key(bare),))


def _arguments(*arguments: Quotient) -> tuple[Key, ...]:
    """Quotients as arguments of a function: a bottom is written only where it is not 1."""
    return tuple(key(p) for f in arguments for p in (f if f.bottom != UNIT else f[:1]))


def _radical(n: int) -> Monomial:
    return tuple((Atom(NUMBER, str(p)), HALF) for p in polynomials.factors(n))


def _surd(one: Fraction | int, *roots: tuple[int, Fraction | int]) -> Polynomial:
    terms = {(): Fraction(one)} | {_radical(n): Fraction(c) for n, c in roots}
    return {monomial: c for monomial, c in terms.items() if c}


QUARTER = Fraction(1, 4)
SINES: dict[Fraction, Polynomial] = {
    Fraction(0): {},
    Fraction(1, 12): _surd(0, (6, QUARTER), (2, -QUARTER)),
    Fraction(1, 10): _surd(-QUARTER, (5, QUARTER)),
    Fraction(1, 6): _surd(HALF),
    Fraction(1, 4): _surd(0, (2, HALF)),
    Fraction(3, 10): _surd(QUARTER, (5, QUARTER)),
    Fraction(1, 3): _surd(0, (3, HALF)),
    Fraction(5, 12): _surd(0, (6, QUARTER), (2, QUARTER)),
    Fraction(1, 2): UNIT,
}
"""The sines of these multiples of pi."""


def _sine(calc: Calculator, f: Quotient) -> Quotient:
    """The sine of an angle; a cosine is one with pi / 2 more."""
    turn, rest = Fraction(0), f.top
    if f.bottom == UNIT:
        turn += rest.get(PI, 0)
        rest = {monomial: c for monomial, c in rest.items() if monomial != PI}
    if rest and rest[max(rest)] < 0:  # sin(-a + t) = sin(a + pi - t)
        rest, turn = scaled(rest, -1), 1 - turn
    sign = -1 if math.floor(turn) % 2 else 1
    turn %= 1
    if not rest:
        turn = min(turn, 1 - turn)
        if turn in SINES:
            return Quotient(scaled(SINES[turn], sign), UNIT)
    name = "cos" if rest and turn == HALF else "sin"
    angle = calc.add(rest, {PI: turn}) if name == "sin" and turn else rest
    atom = Atom(FUNCTION, name, _arguments(Quotient(angle, f.bottom)))
    return calc.times(rational(sign), single(atom))


def _inverse(name: str) -> "Function":
    """The inverse of the sine or tangent, both odd."""

    def inverse(calc: Calculator, f: Quotient) -> Quotient:
        negative = bool(f.top) and f.top[max(f.top)] < 0
        g = Quotient(scaled(f.top, -1), f.bottom) if negative else f
        for turn in SINES if polynomials.is_constant(f.top) else ():
            value = _sine(calc, Quotient({PI: turn}, UNIT))
            if name == "arctan" and turn != HALF:
                value = calc.over(value, _sine(calc, Quotient({PI: turn + HALF}, UNIT)))
            for sign in (1, -1):
                if not calc.difference(f, calc.times(rational(sign), value)):
                    return Quotient({PI: sign * turn} if turn else {}, UNIT)
        return calc.times(rational(-1 if negative else 1), single(Atom(FUNCTION, name, _arguments(g))))

    return inverse


def _absolute(calc: Calculator, f: Quotient) -> Quotient:
    if f.bottom != UNIT:
        return calc.over(_absolute(calc, Quotient(f.top, UNIT)), _absolute(calc, Quotient(f.bottom, UNIT)))
    if len(f.top) > 1:
        parts: tuple[dict[Monomial, Fraction], dict[Monomial, Fraction]] = {}, {}
        for monomial, c in f.top.items():
            parts[(MINUS, HALF) in monomial][tuple(p for p in monomial if p != (MINUS, HALF))] = c
        if parts[1] and all(a.kind in (NUMBER, CONSTANT) and not a.exponent for m in f.top for a, _ in m):
            squares = calc.add(*(calc.multiply(part, part) for part in parts))
            return _rational_power(calc, Quotient(squares, UNIT), HALF)
        number = content(f.top) * (1 if f.top[max(f.top)] > 0 else -1)
        atom = Atom(FUNCTION, "abs", (key(scaled(f.top, 1 / number)),))
        return calc.times(rational(abs(number)), single(atom))
    result = rational(1)
    for monomial, c in f.top.items():
        result = rational(abs(c))
        for atom, e in monomial:
            bare = atom
            if not is_positive(atom):
                bare = Atom(FUNCTION, "abs", (key(_monomial({atom: Fraction(1)})),))
            if atom.name != "-1":  # -1 to anything real has the absolute value 1
                result = calc.times(result, calc.product(Fraction(1), {bare: e}))
    return result if f.top else f


def _factorial(calc: Calculator, f: Quotient) -> Quotient:
    n = as_rational(f)
    if n is not None and n.denominator == 1:
        if n > MAX_FACTORIAL:
            raise TooLargeError("a factorial is too large to work out")
        if n < 0:
            raise UndecidedError("the factorial of a negative number")
        return rational(math.factorial(int(n)))
    shift = math.floor(f.top.get((), 0)) if f.bottom == UNIT else 0
    if abs(shift) > MAX_SHIFT:
        shift = 0
    start = calc.add(f.top, {(): Fraction(-shift)}) if shift else f.top
    result = single(Atom(FUNCTION, "factorial", _arguments(Quotient(start, f.bottom))))
    for i in range(1, abs(shift) + 1):
        factor = Quotient(calc.add(start, {(): Fraction(i)} if shift > 0 else {(): Fraction(1 - i)}), UNIT)
        result = calc.times(result, factor) if shift > 0 else calc.over(result, factor)
    return result


def _binomial(calc: Calculator, n: Quotient, k: Quotient) -> Quotient | None:
    """The number of choices where k is a small integer or both are integers; None elsewhere."""
    top, chosen = as_rational(n), as_rational(k)
    if chosen is None or chosen.denominator != 1 or chosen < 0:
        return None
    if top is not None and top.denominator == 1 and top >= 0:
        if min(top, min(chosen, abs(top - chosen)) * int(top).bit_length()) > polynomials.MAX_BITS:
            raise TooLargeError("a binomial coefficient is too large to work out")
        return rational(math.comb(int(top), int(chosen)))
    if chosen > MAX_SHIFT:
        return None
    factors = [calc.plus(n, rational(-i)) for i in range(int(chosen))]
    return calc.times(rational(Fraction(1, math.factorial(int(chosen)))), *factors)


def call(calc: Calculator, name: str, arguments: tuple[Quotient, ...]) -> Quotient | None:
    """A function of quotients; one that is not known is an atom, one that is made of others None."""
    if name == "binom" and len(arguments) == 2 and (chosen := _binomial(calc, *arguments)):
        return chosen
    if definition(name, len(arguments)):
        return None
    numbers = [as_rational(f) for f in arguments]
    if name in FUNCTIONS and len(arguments) == 1:
        return FUNCTIONS[name](calc, *arguments)
    if name in ROUNDINGS and len(numbers) == 1 and numbers[0] is not None:
        return rational(ROUNDINGS[name](numbers[0]))
    # A bottom is always written, so that f(a / b) and f(a, b) are not the same.
    return single(Atom(FUNCTION, name + "()", tuple(key(p) for f in arguments for p in f)))


Function = Callable[[Calculator, Quotient], Quotient]
FUNCTIONS: dict[str, Function] = {
    "ln": _ln,
    "sin": _sine,
    "arcsin": _inverse("arcsin"),
    "arctan": _inverse("arctan"),
    "abs": _absolute,
    "factorial": _factorial,
}

PLACES = ("first argument", "second argument")
"""The variables of the definitions: names that no answer has."""


def _definitions() -> dict[str, tree.Node]:
    def times(*factors: tree.Node) -> tree.Node:
        return tree.Product(factors)

    def over(top: tree.Node, bottom: tree.Node) -> tree.Node:
        return times(top, tree.Power(bottom, tree.MINUS_ONE))

    def plus(*terms: tree.Node) -> tree.Node:
        return tree.Sum(terms)

    def minus(x: tree.Node) -> tree.Node:
        return times(tree.MINUS_ONE, x)

    def call(name: str, x: tree.Node) -> tree.Node:
        return tree.Call(name, (x,))

    x, y = map(tree.Sym, PLACES)
    right_angle = times(tree.HALF, tree.Const("pi"))
    up, down = (tree.Power(tree.Const("e"), z) for z in (x, minus(x)))
    sine, cosine = call("sin", x), call("sin", plus(x, right_angle))
    return {
        "exp": up,
        "log": over(call("ln", x), call("ln", y)),
        "cos": cosine,
        "tan": over(sine, cosine),
        "cot": over(cosine, sine),
        "sec": tree.Power(cosine, tree.MINUS_ONE),
        "csc": tree.Power(sine, tree.MINUS_ONE),
        "arccos": plus(right_angle, minus(call("arcsin", x))),
        "sinh": times(tree.HALF, plus(up, minus(down))),
        "cosh": times(tree.HALF, plus(up, down)),
        "tanh": over(plus(up, minus(down)), plus(up, down)),
        "binom": over(
            call("factorial", x), times(call("factorial", y), call("factorial", plus(x, minus(y))))
        ),
    }


DEFINITIONS = _definitions()
"""Functions by others, as expressions in PLACES."""


def definition(name: str, num_arguments: int) -> tree.Node | None:
    """What a function stands for, if it is made of others and has that many arguments."""
    found = DEFINITIONS.get(name)
    return found if found and len(tree.symbols(found)) == num_arguments else None
