r"""Exact arithmetic for `algebra`: polynomials with rational coefficients in atoms, and their quotients.

An atom is what cannot be taken apart: a variable, a constant, a prime number, a function of something, a sum,
each perhaps to a symbolic exponent (`2^n`). A monomial is a product of atoms to rational exponents, so that
`x^{-1}`, `\sqrt2` and `2^{n/2}` are monomials. Roots are of real numbers where there are any
(`\sqrt[3]{-8}` is -2), variables in an exponent of -1 are integers.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

MAX_BITS = 8_000
MAX_WORK = 6_000
MAX_EXPANDED_TERMS = 60
MAX_FACTOR = 1_000
"""Integers are searched for prime factors up to this one; what is left and below its square is prime."""

NUMBER, CONSTANT, VARIABLE, FUNCTION, SUM = range(5)


class TooLargeError(ValueError):
    """A formula whose numbers are too large to work out."""


class UndecidedError(ValueError):
    """A formula that has no value here, or is beyond these rules."""


class Atom(NamedTuple):
    """A prime or -1, a constant, a variable, a function or a sum, to a symbolic exponent (`()` for none)."""

    kind: int
    name: str
    arguments: "tuple[Key, ...]" = ()
    exponent: "Monomial" = ()


Monomial = tuple[tuple[Atom, Fraction], ...]
Key = tuple[tuple[Monomial, Fraction], ...]
Polynomial = Mapping[Monomial, Fraction]


class Quotient(NamedTuple):
    """One polynomial over another, which is not zero."""

    top: Polynomial
    bottom: Polynomial


UNIT: Polynomial = {(): Fraction(1)}
ZERO: Quotient = Quotient({}, UNIT)
E = Atom(CONSTANT, "e")
PI: Monomial = ((Atom(CONSTANT, "pi"), Fraction(1)),)
HALF = Fraction(1, 2)
MINUS = Atom(NUMBER, "-1")
I_PI: Monomial = ((MINUS, HALF), *PI)


def key(p: Polynomial) -> Key:
    """A polynomial as an immutable value."""
    return tuple(sorted(p.items()))


def rational(value: Fraction | int) -> Quotient:
    """A rational number as a quotient."""
    return Quotient({(): Fraction(value)} if value else {}, UNIT)


def single(atom: Atom, exponent: Fraction | int = 1) -> Quotient:
    """An atom as a quotient; its exponent must need no reduction."""
    return Quotient({((atom, Fraction(exponent)),): Fraction(1)}, UNIT)


def as_rational(f: Quotient) -> Fraction | None:
    """The value of a quotient that is a rational number."""
    if f.bottom is not UNIT and f.bottom != UNIT:
        return None
    return Fraction(0) if not f.top else f.top.get(()) if len(f.top) == 1 else None


def is_constant(p: Polynomial) -> bool:
    """Whether a polynomial holds nothing but numbers and constants to rational exponents."""
    return all(atom.kind in (NUMBER, CONSTANT) and not atom.exponent for m in p for atom, _ in m)


def scaled(p: Polynomial, factor: Fraction | int) -> Polynomial:
    """A polynomial times a number that is not zero."""
    return p if factor == 1 else {monomial: c * factor for monomial, c in p.items()}


def content(p: Polynomial) -> Fraction:
    """The positive number after division by which the coefficients are integers without a common factor."""
    top = math.gcd(*(c.numerator for c in p.values()))
    return Fraction(top, math.lcm(*(c.denominator for c in p.values())))


def is_positive(atom: Atom) -> bool:
    """Whether an atom is a positive number whatever its variables, which are real."""
    real = all(below.name != "-1" for below, _ in atom.exponent)
    return real and (
        (atom.kind == FUNCTION and atom.name == "abs")
        or (atom.kind in (NUMBER, CONSTANT) and atom.name != "-1")
    )


def integer_root(n: int, degree: int) -> int | None:
    """The integer that to the power `degree` is `n` (not negative), if there is one."""
    if n < 2 or degree == 1:
        return n
    if degree >= n.bit_length():
        return None
    root = 1 << -(-n.bit_length() // degree)  # from above, by Newton's method
    while (better := ((degree - 1) * root + n // root ** (degree - 1)) // degree) < root:
        root = better
    return root if root**degree == n else None


def factors(n: int) -> dict[int, int]:
    """A positive integer as primes to exponents; a factor over MAX_FACTOR squared may not be prime."""
    found: dict[int, int] = {}
    divisor = 2
    while divisor * divisor <= n and divisor < MAX_FACTOR:
        while n % divisor == 0:
            found[divisor] = found.get(divisor, 0) + 1
            n //= divisor
        divisor += 1 + (divisor > 2)
    return found | {n: 1} if n > 1 else found


def number_power(base: Fraction, exponent: int) -> Fraction:
    """A number to an integer; the size is known before the work is done."""
    if base in (0, 1, -1):
        if base == 0 and exponent <= 0:
            raise UndecidedError("zero to an exponent that is not positive")
        return base if exponent % 2 or not base else Fraction(1)
    bits = max(abs(base.numerator), base.denominator).bit_length() - 1
    if abs(exponent) * max(bits, 0.5) > MAX_BITS:
        raise TooLargeError("a power is too large to work out")
    return base**exponent


class Calculator:
    """Arithmetic of quotients, and a limit of work after which it gives up."""

    def __init__(self) -> None:
        self.left = MAX_WORK

    def spend(self, work: int) -> None:
        """Count work; fail when there was too much."""
        self.left -= work
        if self.left < 0:
            raise UndecidedError("too many terms to expand")

    def add(self, *sums: Polynomial) -> Polynomial:
        """The sum of polynomials."""
        total: dict[Monomial, Fraction] = {}
        for p in sums:
            self.spend(len(p))
            for monomial, c in p.items():
                if (new := total.get(monomial, 0) + c) == 0:
                    del total[monomial]
                else:
                    total[monomial] = Fraction(new)
        return total

    def multiply(self, p: Polynomial, q: Polynomial) -> Polynomial:
        """The product of two polynomials."""
        if p is UNIT or q is UNIT:
            return q if p is UNIT else p
        bits = sum(
            max((max(c.numerator.bit_length(), c.denominator.bit_length()) for c in r.values()), default=0)
            for r in (p, q)
        )
        if bits > MAX_BITS:
            raise TooLargeError("a number is too large to work out")
        self.spend(len(p) * len(q) * (1 + bits // 100))
        total: Polynomial = {}
        terms: dict[Monomial, Fraction] = {}
        for m, a in p.items():
            for n, b in q.items():
                if not m or not n:
                    monomial, c = m or n, a * b
                else:
                    exponents = dict(m)
                    for atom, e in n:
                        exponents[atom] = exponents[atom] + e if atom in exponents else e
                    monomial, c, sums = _reduced(exponents)
                    c *= a * b
                    if sums:
                        expanded: Polynomial = {monomial: c}
                        for atom, whole in sums:
                            expanded = self.multiply(expanded, self.raised(dict(atom.arguments[0]), whole))
                        total = self.add(total, expanded)
                        continue
                terms[monomial] = terms[monomial] + c if monomial in terms else c
        terms = {monomial: c for monomial, c in terms.items() if c}
        return self.add(total, terms) if total else terms

    def raised(self, p: Polynomial, exponent: int) -> Polynomial:
        """A polynomial to a positive integer; a sum stays one atom where it has too many terms."""
        if len(p) == 1:
            f = self.product(next(iter(p.values())), dict(next(iter(p))), exponent)
            return f.top
        constant = all(atom.kind == NUMBER and not atom.exponent for m in p for atom, _ in m)
        if not constant and math.comb(min(exponent, 99) + len(p) - 1, len(p) - 1) > MAX_EXPANDED_TERMS:
            factor = content(p)
            atom = Atom(FUNCTION, "power", (key(scaled(p, 1 / factor)), key({(): Fraction(exponent)})))
            return {((atom, Fraction(1)),): number_power(factor, exponent)}
        if exponent > MAX_BITS:
            raise TooLargeError("a power is too large to work out")
        result = UNIT
        while exponent:
            if exponent & 1:
                result = self.multiply(result, p)
            exponent >>= 1
            p = self.multiply(p, p) if exponent else p
        return result

    def product(self, c: Fraction, exponents: Mapping[Atom, Fraction], power: int | Fraction = 1) -> Quotient:
        """A number times atoms, all to a power, which is an integer unless the number is 1."""
        monomial, reduced, sums = _reduced({atom: e * power for atom, e in exponents.items()})
        number = reduced if c == 1 else reduced * number_power(c, int(power))
        result = Quotient({monomial: number}, UNIT)
        for atom, whole in sums:
            result = self.times(result, self.to_integer(Quotient(dict(atom.arguments[0]), UNIT), whole))
        return result

    def quotient(self, top: Polynomial, bottom: Polynomial) -> Quotient:
        """One polynomial over another, with the bottom 1 where it is a monomial."""
        if not bottom:
            raise UndecidedError("a division by zero")
        if not top or bottom is UNIT:
            return Quotient(top, UNIT)
        if len(bottom) == 1:
            [(monomial, c)] = bottom.items()
            inverse = self.product(c, dict(monomial), -1)
            return Quotient(self.multiply(top, inverse.top), inverse.bottom)
        factor = content(bottom) * (1 if bottom[max(bottom)] > 0 else -1)
        bottom = scaled(bottom, 1 / factor)
        ratio = top.get(max(bottom), Fraction(0)) / bottom[max(bottom)]
        if ratio and scaled(bottom, ratio) == top:
            return rational(ratio / factor)
        return Quotient(scaled(top, 1 / factor), bottom)

    def plus(self, f: Quotient, g: Quotient) -> Quotient:
        """The sum of two quotients."""
        if f.bottom == g.bottom:
            return self.quotient(self.add(f.top, g.top), f.bottom)
        top = self.add(self.multiply(f.top, g.bottom), self.multiply(g.top, f.bottom))
        return self.quotient(top, self.multiply(f.bottom, g.bottom))

    def times(self, f: Quotient, *others: Quotient) -> Quotient:
        """The product of quotients."""
        for g in others:
            f = self.quotient(self.multiply(f.top, g.top), self.multiply(f.bottom, g.bottom))
        return f

    def over(self, f: Quotient, g: Quotient) -> Quotient:
        """One quotient over another."""
        return self.quotient(self.multiply(f.top, g.bottom), self.multiply(f.bottom, g.top))

    def difference(self, f: Quotient, g: Quotient) -> Polynomial:
        """A polynomial that is zero exactly if the quotients are equal."""
        p, q = self.multiply(f.top, g.bottom), self.multiply(g.top, f.bottom)
        return self.add(p, scaled(q, -1))

    def to_integer(self, f: Quotient, exponent: int) -> Quotient:
        """A quotient to an integer exponent."""
        if exponent <= 0 and not f.top:
            raise UndecidedError("zero to an exponent that is not positive")
        if exponent == 0 or not f.top:
            return Quotient(f.top and UNIT, UNIT)
        top, bottom = f if exponent > 0 else (f.bottom, f.top)
        raised = [UNIT if p is UNIT else self.raised(p, abs(exponent)) for p in (top, bottom)]
        return self.quotient(*raised)


def _reduced(exponents: Mapping[Atom, Fraction]) -> tuple[Monomial, Fraction, list[tuple[Atom, int]]]:
    """A monomial with exponents in [0, 1) of primes and sums; the number and sums that were taken out."""
    left, number, sums = [], Fraction(1), []
    for atom, e in exponents.items():
        if atom.kind == NUMBER and not atom.exponent:
            whole = math.floor(e)
            number *= number_power(Fraction(int(atom.name)), whole) if whole else 1
            e -= whole
        elif atom.kind == SUM and not atom.exponent:
            if whole := math.floor(e):
                sums.append((atom, whole))
            e -= whole
        elif atom.name == "-1" and all(below.kind == VARIABLE for below, _ in atom.exponent):
            e %= 2
        if e:
            left.append((atom, e))
    return tuple(sorted(left)), number, sums
