"""Whether two formulas are equal, tested by evaluating both: in floating point and in finite fields.

Two different polynomials agree at hardly any point, so a random point tells whether they are the same
(Schwartz, "Fast probabilistic algorithms for verification of polynomial identities", 1980; Zippel,
"Probabilistic algorithms for sparse polynomials", 1979). Modulo a prime p, values are exact and never grow.
Roots and powers have values there as well (Gonnet, "Determining equivalence of expressions in random
polynomial time", 1984): p = 2q + 1 with q prime, and the variables are squares modulo p; these form a group
of order q, so exponents are numbers modulo q: x^(1/2) is x to the inverse of 2. Complex numbers are pairs
(real, imaginary) modulo p; those of absolute value 1 form a group of order p + 1 = 5040 r with r prime, where
rational parts of a turn are powers of a 5040th root of unity and other angles are numbers modulo r; sine and
cosine are the two parts. A function of which nothing is known has a random value for each argument. Floating
point tells what the fields cannot: which of two roots is meant, at points where both formulas are real.
"""

import cmath
import functools
import math
import operator
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from hashlib import blake2b

from rlcs.grading import tree
from rlcs.grading.tree import MINUS_ONE, Call, Const, Node, Num, PlusMinus, Power, Product, Sum, Sym, walk

MAX_BITS = 8_000
INTEGERS = frozenset(["base", *"kmnN"])
"""Variables that stand for positive integers where values are compared; `base` is that of a logarithm."""
_INFINITIES = (Const("infinity"), Product((MINUS_ONE, Const("infinity"))))
_PI = (Const("pi"), Sym("degree"))
_TURN = 5_040
_FIELDS = (  # the prime p and e^(2 pi i / 5040) modulo p; the primes below 54 are squares modulo each p
    (1766779003997553738081793679, 834344209449980686958236312, 1704441204244903841376256399),
    (1341543266362508902270154639, 514647888194138476343861145, 884671876534010027050819528),
    (1941459480913075300695152879, 133817255887518067772756522, 47838687554913219610896549),
    (1132697203801876905393403439, 923712547467161333378840406, 561314131863700055930078504),
)
_SCALES, _POSITIVE = (0.6, 2.7, 17.0, -2.1, -31.0), 3
"""Sizes of the variables where floating point is used; at the first three points all are positive."""
_FAILURES = (ArithmeticError, ValueError, KeyError)
Pair = tuple[int, int]


class TooLargeError(ValueError):
    """A number or a formula is too large to work out."""


def equal(a: Node, b: Node) -> bool | None:
    """Whether two formulas are equal, for all variables for which both are real; None if not certain."""
    if a == b:
        return True
    if a in _INFINITIES or b in _INFINITIES:
        other = b if a in _INFINITIES else a
        return False if other in _INFINITIES or number(other) is not None else None
    values = _known(a), _known(b)
    if None not in values:
        return values[0] == values[1]
    if _is_plain(a) and _is_plain(b):
        same = {_field_equal(a, b, seed) for seed in range(2)}
        return None if None in same or (same == {True} and True in _apart(a, b, 1)) else same == {True}
    apart = _apart(a, b, _POSITIVE)
    if True in apart:
        return False
    # The signs of roots are a matter of the draw: floating point has seen to it that they are right.
    draws = (_field_equal(a, b, seed) for seed in range(8))
    return True if (any(draws) if apart else all(draws)) and True not in _apart(a, b, len(_SCALES)) else None


def same_equation(a: Node, b: Node) -> bool | None:
    """Whether a = 0 and b = 0 are the same equation up to a constant factor; None where it is not certain."""
    plain = _is_plain(a) and _is_plain(b)
    draws, p = [_Draw(0, seed) for seed in range(3)], _FIELDS[0][0]
    try:
        pairs = [(draw.value(a, p), draw.value(b, p)) for draw in draws]
        if any((0, 0) in pair for pair in pairs):
            return all(x == y for x, y in pairs) if plain else None
        if _is_constant(pairs, p):
            ratios = [x / y for x, y, _ in _points(a, b, len(_SCALES)) if y]
            near = len(ratios) > 1 and all(abs(x - ratios[0]) <= 1e-6 * abs(x) for x in ratios)
            return True if plain or near else None
        tops = [(draw.numerator(a), draw.numerator(b)) for draw in draws]
        if not plain or _is_constant(tops, p):
            return True if plain else None
        # The top of a quotient may have a factor too many, so it tells only where there is no quotient.
        sides = ([(x[i], y[i]) for x, y in zip(pairs, tops, strict=True)] for i in (0, 1))
        return False if all(_is_constant(side, p) for side in sides) else None
    except ValueError:
        return None


def exact(node: Node) -> Fraction | None:
    """The value if it is a rational number; None if it is not, or not known. Raises TooLargeError."""
    value = _rational(node)
    for part in walk(node):
        power = abs(number(part.exponent) or 0) if isinstance(part, Power) else 0
        if power > 100 and abs(math.log2(abs(number(tree.children(part)[0]) or 1))) * power > MAX_BITS:
            raise TooLargeError("a power is too large to work out")
    if value is not None or tree.symbols(node) - {"degree"}:
        return value
    try:  # sin(pi/6), log_2 8: a guess that a field confirms
        near, error = _estimate(node, {})
        guess = Fraction(near.real).limit_denominator(10_000)
        confirmed = (_field_equal(node, Num(guess), seed) for seed in range(4))
        return guess if abs(near - guess) <= 10 * error < 1e-6 and any(confirmed) else None
    except _FAILURES:
        return None


def too_large(node: Node) -> bool:
    """Whether a power or factorial in a formula is too large to work out."""
    try:
        exact(node)
    except TooLargeError:
        return True
    return False


def number(node: Node) -> complex | None:
    """The value of a formula without variables in floating point; None where it has none."""
    try:
        return _estimate(node, {})[0]
    except _FAILURES:
        return None


def both_signs(node: Node) -> tuple[Node, ...]:
    r"""The formulas that one with `\pm` stands for: all upper signs, then all lower ones."""
    both = any(isinstance(below, PlusMinus) for below in walk(node))
    return (_with_sign(node, upper=True), _with_sign(node, upper=False)) if both else (node,)


def _with_sign(node: Node, *, upper: bool) -> Node:
    parts = tuple(_with_sign(child, upper=upper) for child in tree.children(node))
    if isinstance(node, PlusMinus):
        return parts[0] if upper != node.opposite else Product((MINUS_ONE, parts[0]))
    if isinstance(node, Power | Call):
        return Power(*parts) if isinstance(node, Power) else Call(node.name, parts)
    return type(node)(parts) if isinstance(node, Sum | Product) else node


def _is_plain(node: Node) -> bool:
    """Whether other values in a field are certain to be other formulas: integer powers, roots of numbers."""
    for part in walk(node):
        match part:
            case Call("factorial", (argument,)) if _known(argument) is not None:
                continue
            case Power(base, exponent) if power := _known(exponent):
                if power.denominator > 1 and (_known(base) or 0) <= 0:
                    return False
            case Call() | PlusMinus() | Power():
                return False
    return True


@functools.lru_cache(maxsize=2_000)
def _known(node: Node) -> Fraction | None:
    try:
        return _rational(node)
    except TooLargeError:
        return None


def _rational(node: Node) -> Fraction | None:
    """The value by rational arithmetic; None where a part is not rational or there is no value."""
    if isinstance(node, Num):
        return _bounded(node.value)
    parts = [_rational(child) for child in tree.children(node)]
    values = [part for part in parts if part is not None]
    if len(values) < len(parts) or not values:
        return None
    match node:
        case Sum() | Product():
            add = isinstance(node, Sum)
            return functools.reduce(lambda x, y: _bounded(x + y if add else x * y), values)
        case Power():
            return _rational_power(*values)
        case Call("abs", _):
            return abs(values[0])
        case Call("lfloor" | "lceil" as name, _):
            return Fraction(math.floor(values[0]) if name == "lfloor" else math.ceil(values[0]))
        case Call("factorial" | "binom" as name, _) if all(v.denominator == 1 and v >= 0 for v in values):
            n, k = int(values[0]), int(values[-1])
            if n > 500 if name == "factorial" else min(k, abs(n - k)) * n.bit_length() > MAX_BITS:
                raise TooLargeError("a factorial or a binomial coefficient is too large to work out")
            return Fraction(math.factorial(n) if name == "factorial" else math.comb(n, k))
    return None


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise TooLargeError("a number is too large to work out")
    return value


def _rational_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if base in (0, 1):
        return base if base or exponent > 0 else None
    if (max(abs(base.numerator), base.denominator).bit_length() - 1) * abs(exponent) > MAX_BITS:
        raise TooLargeError("a power is too large to work out")
    if (
        degree := exponent.denominator
    ) > 1:  # a root too large for floating point is not found, and not needed
        parts = [abs(base.numerator), base.denominator]
        roots = [round(math.exp(min(math.log(part) / degree, 50))) for part in parts]
        if [root**degree for root in roots] != parts or (base < 0 and degree % 2 == 0):
            return None
        base = Fraction(*roots) * (1 if base > 0 else -1)
    return base**exponent.numerator


def _real(z: complex, shift: int = 0) -> float:
    if abs(z.imag) > 1e-9 * abs(z):
        raise ValueError("a function of real numbers")
    return z.real + shift


_NUMERIC: dict[str, Callable[..., complex]] = {
    **{name: getattr(cmath, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp")},
    **{f"arc{name}": getattr(cmath, f"a{name}") for name in ("sin", "cos", "tan")},
    "cot": lambda z: 1 / cmath.tan(z),
    "sec": lambda z: 1 / cmath.cos(z),
    "csc": lambda z: 1 / cmath.sin(z),
    "ln": cmath.log,
    "log": lambda z, base: cmath.log(z) / cmath.log(base),
    "abs": abs,
    "factorial": lambda n: math.gamma(_real(n, 1)),
    "binom": lambda n, k: math.gamma(_real(n, 1)) / math.gamma(_real(k, 1)) / math.gamma(_real(n - k, 1)),
    "lfloor": lambda z: math.floor(_real(z)),
    "lceil": lambda z: math.ceil(_real(z)),
}


def _power(base: complex, exponent: complex, known: Fraction | None) -> complex:
    if known is not None and known.denominator > 1 and known.denominator % 2 and base.real < 0 == base.imag:
        return complex((-1) ** known.numerator * abs(base) ** exponent)  # the real root, as at school
    return complex(base**exponent) if base or exponent.real > 0 else 1 / base


def _estimate(node: Node, point: dict[str, float]) -> tuple[complex, float]:
    """The value at a point and a bound of its rounding error. Fails with _FAILURES where it has none."""
    function: Callable[..., complex]
    match node:
        case Num(value):
            return complex(float(value)), abs(float(value)) * 1e-16
        case Const("pi" | "e" as name):
            return complex(getattr(math, name)), 1e-15
        case Const("i"):
            return 1j, 0.0
        case Sym(name):
            return complex(math.pi / 180 if name == "degree" else point[name]), 1e-18
        case Sum() | Product():
            function = (lambda *z: sum(z)) if isinstance(node, Sum) else (lambda *z: math.prod(z))
        case Power(_, exponent):
            function = functools.partial(_power, known=_known(exponent))
        case Call(name) if name in _NUMERIC:
            function = _NUMERIC[name]
        case _:
            raise ValueError("no value is known")
    parts = [_estimate(child, point) for child in tree.children(node)]
    result = complex(function(*(z for z, _ in parts))) + 0j  # + 0j: there is no imaginary part -0.0
    # The error is what changes of the arguments change: all to one side (sums), all away from 0 (products).
    aside = function(*(z + off * (1 + 1j if z.imag else 1) for z, off in parts))
    away = function(*(z + off * z / abs(z) if z else complex(off) for z, off in parts))
    error = max(abs(aside - result), abs(away - result)) + 1e-15 * abs(result)
    is_real = not result.imag or any(z.imag for z, _ in parts)
    if not (cmath.isfinite(result) and math.isfinite(error) and (is_real or not point)):
        raise ValueError("out of range; or not real, where variables are meant to be such that it is")
    return result, error


def _points(a: Node, b: Node, turns: int) -> Iterator[tuple[complex, complex, float]]:
    """(value of a, value of b, error) at the points where both have a value."""
    names = sorted(tree.symbols(a) | tree.symbols(b))
    integers = [name for name in names if name in INTEGERS]
    for turn in range(turns if names else 1):
        point = {}
        for index, name in enumerate(names):
            share = zlib.crc32(f"{turn} {name}".encode()) / 2**32
            point[name] = _SCALES[turn] * (0.4 + share) * (-1 if turn > _POSITIVE and index % 2 else 1)
            if name in integers:  # odd and even ones, and so their sums
                point[name] = 4.0 + 2 * int(share * 3) + (turn + 1 >> integers.index(name) & 1)
        try:
            (x, x_error), (y, y_error) = (_estimate(node, point) for node in (a, b))
            yield x, y, x_error + y_error
        except _FAILURES:
            continue


def _apart(a: Node, b: Node, turns: int) -> list[bool]:
    """Whether the values are clearly apart, at each of the points that tell."""
    return [
        abs(x - y) > max(1e-6 * max(abs(x), abs(y)), 100 * error)
        for x, y, error in _points(a, b, turns)
        if error <= 1e-6 * max(abs(x), abs(y), 1.0)
    ]


def _times(x: Pair, y: Pair, m: int) -> Pair:
    return (x[0] * y[0] - x[1] * y[1]) % m, (x[0] * y[1] + x[1] * y[0]) % m


def _to_the(z: Pair, n: int, m: int) -> Pair:
    """An integer power modulo a prime m. Fails with ValueError for 0^0 and 0^-1."""
    if n <= 0 and z == (0, 0):
        raise ValueError("no value")
    if not z[1]:
        return pow(z[0], n if abs(n) < 100 else n % (m - 1), m), 0
    if n < 0:
        scale = pow(z[0] * z[0] + z[1] * z[1], -1, m)
        z, n = (z[0] * scale % m, -z[1] * scale % m), -n
    result, n = (1, 0), n % (m * m - 1)
    while n:
        result = _times(result, z, m) if n & 1 else result
        z, n = _times(z, z, m), n >> 1
    return result


class _Draw:
    """Values modulo p, of exponents modulo q, of angles modulo r. ValueError means that there is none."""

    def __init__(self, field: int, seed: int, *, with_pi: bool = True) -> None:
        self.p, *root = _FIELDS[field % len(_FIELDS)]
        self.q, self.r, self.root = self.p // 2, (self.p + 1) // _TURN, (root[0], root[1])
        self.seed, self.memo = seed, dict[tuple[int, int], tuple[Node, Pair]]()
        self.without_pi = _Draw(field, seed, with_pi=False) if with_pi else None

    def random(self, m: int, *what: object) -> int:
        return int.from_bytes(blake2b(repr((self.p, m, what)).encode(), digest_size=16).digest(), "big") % m

    def value(self, node: Node, m: int) -> Pair:
        """The value modulo p, q, r, or 2 (whether an exponent is odd)."""
        if (key := (id(node), m)) not in self.memo:
            self.memo[key] = node, self.new_value(node, m)  # with the node, so that its id stays its own
        return self.memo[key][1]

    def new_value(self, node: Node, m: int) -> Pair:
        known = _known(node.exponent) if isinstance(node, Power) else None
        match node:
            case Num(value):
                return value.numerator * pow(value.denominator, -1, m) % m, 0
            case Const("i"):
                return 0, 1
            case Const("pi") if not self.without_pi:
                return 0, 0
            case Const("pi" | "e" as name):
                return self.random(m, name) ** 2 % m, 0
            case Sym("degree"):
                return self.value(Const("pi"), m)[0] * pow(180, -1, m) % m, 0
            case Sym(name):
                return self.random(m, name, self.seed) ** 2 % m, 0
            case Sum(terms):
                values = [self.value(term, m) for term in terms]
                return sum(x for x, _ in values) % m, sum(y for _, y in values) % m
            case Product(factors):
                return functools.reduce(lambda x, f: _times(x, self.value(f, m), m), factors, (1, 0))
            case Power(base) if known is not None and known.denominator == 1:
                return _to_the(self.value(base, m), int(known), m)
            case Power() | Call() if m != self.p:
                return self.random(m, self.value(node, self.p)), 0
            case Power(base, exponent):
                return self.exponential(exponent) if base == Const("e") else self.power(base, exponent, known)
            case Call(name, arguments):
                found = self.call(name, *arguments)
                return found or (self.random(m, name, *(self.value(x, m) for x in arguments)), 0)
        raise ValueError("infinity, or both signs")

    def power(self, base: Node, exponent: Node, known: Fraction | None) -> Pair:
        (b, imaginary), p, q = self.value(base, self.p), self.p, self.q
        e, rest = self.value(exponent if known is None else Num(known), q)
        if imaginary or rest:
            return self.random(p, "power", (b, imaginary), self.value(exponent, p)), 0
        if b == 0 and not (known and known > 0):
            raise ValueError("no value")
        if b == 0 or pow(b, q, p) == 1:
            return pow(b, e, p), 0
        # No square modulo p, as a negative number: a positive one times -1 to this power, a part of a turn.
        half_turns = Fraction(self.value(exponent, 2)[0]) if known is None else known
        part = (half_turns if half_turns.denominator % 2 == 0 else half_turns.numerator) * Fraction(_TURN, 2)
        if part.denominator > 1:
            raise ValueError("a part of a turn that this field does not have")
        return _times((pow(p - b, e, p), 0), _to_the(self.root, int(part) % _TURN, p), p)

    def exponential(self, node: Node) -> Pair:
        """The constant e to the power of a formula."""
        factors = node.factors if isinstance(node, Product) else (node,)
        for i, factor in enumerate(factors):
            if isinstance(factor, Call) and factor.name == "ln":  # e^(x ln 2) = 2^x
                return self.value(Power(factor.arguments[0], Product(factors[:i] + factors[i + 1 :])), self.p)
        real, imaginary = self.value(node, self.q)
        size = pow(self.value(Const("e"), self.p)[0], real, self.p), 0
        return _times(size, self.on_circle(node, 1), self.p) if imaginary else size

    def on_circle(self, node: Node, part: int) -> Pair:
        """(cosine, sine) of the real (part 0) or imaginary (part 1) part of a formula."""
        angle, turn, r = self.value(node, self.r)[part], 0, self.r
        if self.without_pi and any(below in _PI for below in walk(node)):  # perhaps a rational part of pi
            rest = self.without_pi.value(node, r)[part]
            part_of_pi = (angle - rest) * pow(self.value(Const("pi"), r)[0], -1, r) * (_TURN // 2)
            turn = (part_of_pi + r // 2) % r - r // 2
            turn, angle = (turn, rest) if abs(turn) < 2**30 else (0, angle)
        z, p = (self.random(self.p, "circle"), 1), self.p
        step = _times(_times(z, z, p), (pow(z[0] * z[0] + 1, -1, p), 0), p)
        return _times(_to_the(self.root, turn % _TURN, p), _to_the(step, angle * _TURN, p), p)

    def call(self, name: str, x: Node, y: Node | None = None, *_: Node) -> Pair | None:
        """The value of a function of which something is known; None for another."""
        p = self.p
        match name:
            case "exp":
                return self.exponential(x)
            case "ln":
                return self.logarithm(x)
            case "log" if y:
                return _times(self.logarithm(x), _to_the(self.logarithm(y), -1, p), p)
            case "abs":
                return pow(sum(part * part for part in self.value(x, p)), (self.q + 1) // 2, p), 0
            case "factorial":
                return self.factorial(x)
            case "binom" if y:
                under = self.factorial(y), self.factorial(Sum((x, Product((MINUS_ONE, y)))))
                return _times(self.factorial(x), _to_the(_times(*under, p), -1, p), p)
            case "sin" | "cos" | "tan" | "cot" | "sec" | "csc" if not self.value(x, self.r)[1]:
                c, s = self.on_circle(x, 0)
                over = {"sin": s, "tan": s, "cos": c, "cot": c}.get(name, 1)
                return over * pow({"tan": c, "sec": c, "cot": s, "csc": s}.get(name, 1), -1, p) % p, 0
        return None

    def logarithm(self, node: Node) -> Pair:
        value, p = _known(node), self.p
        match node:
            case Const("e"):
                return 1, 0
            case Power(base, exponent) if value is None:
                return _times(self.value(exponent, p), self.logarithm(base), p)
            case Product(factors) if value is None:
                parts = [self.logarithm(factor) for factor in factors]
            case _ if value:
                parts = [(self.random(p, "ln", prime) * power, 0) for prime, power in _primes(value)]
                parts += [(0, self.value(Const("pi"), p)[0])] if value < 0 else []
            case _:
                parts = [(self.random(p, "ln", self.value(node, p)), 0)]
        return sum(x for x, _ in parts) % p, sum(y for _, y in parts) % p

    def factorial(self, node: Node) -> Pair:
        """The factorial, by (n + 1)! = (n + 1) n! brought to that of the argument without a whole number."""
        terms, p = node.terms if isinstance(node, Sum) else (node,), self.p
        whole = math.floor(sum(_known(term) or Fraction(0) for term in terms))
        value, imaginary = self.value(node, p)
        start = (value - whole) % p
        if abs(whole) > 5_000 or imaginary:
            raise ValueError("no factorial is known")
        result = self.random(p, "factorial", start) if start else 1
        for j in range(min(whole, 0) + 1, max(whole, 0) + 1):
            result = result * pow(start + j, 1 if whole > 0 else -1, p) % p
        return result, 0

    def numerator(self, node: Node) -> Pair:
        """The value times the common denominator."""
        unders = (_to_the(base, power, self.p) for base, power in self.denominators(node).items())
        return functools.reduce(lambda x, y: _times(x, y, self.p), unders, self.value(node, self.p))

    def denominators(self, node: Node) -> Counter[Pair]:
        """The values of what stands under fraction bars, with their powers."""
        match node:
            case Power(Product(factors), exponent):
                return self.denominators(Product(tuple(Power(factor, exponent) for factor in factors)))
            case Power(base, exponent) if power := math.ceil(_known(exponent) or 0):
                under = {self.value(base, self.p): -1} if power < 0 else self.denominators(base)
                return Counter({value: n * power for value, n in under.items()})
            case Sum() | Product():
                step = operator.or_ if isinstance(node, Sum) else operator.add
                return functools.reduce(step, map(self.denominators, tree.children(node)))
        return Counter()


def _primes(value: Fraction) -> Iterator[tuple[int, int]]:
    """The small primes in a rational number with their exponents, and what is left."""
    for left, sign in ((abs(value.numerator), 1), (value.denominator, -1)):
        for prime in range(2, 1_000):
            while left % prime == 0:
                left //= prime
                yield prime, sign
        if left > 1:
            yield left, sign


def _field_equal(a: Node, b: Node, seed: int) -> bool | None:
    """Whether two formulas have the same value in a draw; None where they have none."""
    try:
        draw = _Draw(seed, seed)
        return draw.value(a, draw.p) == draw.value(b, draw.p)
    except ValueError:
        return None


def _is_constant(pairs: list[tuple[Pair, Pair]], p: int) -> bool:
    """Whether the quotient of two values is the same in all draws."""
    return len({_times(x, _to_the(y, -1, p), p) for x, y in pairs}) == 1
