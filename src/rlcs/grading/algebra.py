"""Whether two formulas are equal: rational numbers exactly, others by their values at a few points.

Values are worked out to 256 bits (77 digits). Formulas that people write do not agree so far by chance:
those that agree in the first half of the bits at every point are equal, and a sum that cancels down to the
second half is zero. Where numbers of very different sizes meet, there are eight times as many bits, or no
verdict. A function of which nothing is known (`f`) has a random value for each argument.
"""

import functools
import math
import operator
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from hashlib import blake2b
from typing import Any

from rlcs.grading import tree
from rlcs.grading.tree import MINUS_ONE, Call, Const, Node, Num, Power, Product, Sum, Sym, walk

MAX_BITS = 8_000
"""Most bits of an exact number; a longer one is too large to work out."""
_BITS = 256
_SHORT = 2**32
"""No rational number with a denominator of up to 10,000 agrees in `_BITS` / 2 bits with a multiple of pi by a
fraction of smaller numbers."""
_MAX_ARGUMENT, _MAX_SIZE = 2**11, 2**40
"""Bounds of the arguments of functions, and of any value, as exponents of 2."""
_SCALES, _USUAL = (0.6, 2.7, 17.0, -2.1, -31.0, 1e4), 3
"""Sizes of variables at each point; the first `_USUAL` are as people mean them: positive, or integers."""
_INTEGERS = {"base": (2, 3, 10), "k": (2, 3, 5), "m": (5, 4, 7), "n": (7, 9, 6), "N": (8, 11, 13)}
"""Variables that stand for integers, with values for the first points; `base` is that of a logarithm."""
_INFINITIES = (Const("infinity"), Product((MINUS_ONE, Const("infinity"))))
_NO_VALUE = (ArithmeticError, ValueError, KeyError, TypeError)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: lambda mp, x, its_name=name: getattr(mp, its_name.replace("arc", "a"))(x)
    for name in "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln".split()
} | {
    "log": lambda mp, x, base: mp.ln(x) / mp.ln(base),
    "abs": lambda mp, x: abs(x),
    "factorial": lambda mp, n: mp.gamma(n + 1),
    "binom": lambda mp, n, k: mp.gamma(n + 1) * mp.rgamma(k + 1) * mp.rgamma(n - k + 1),
    "floor": lambda mp, x: mp.floor(x + mp.eps * 2**60),  # 3, if x is 3 but for rounding
    "ceil": lambda mp, x: mp.ceil(x - mp.eps * 2**60),
}
_Point = dict[str, Any]


class TooLargeError(ValueError):
    """A number or a formula is too large to work out."""


def equal(a: Node, b: Node) -> bool | None:
    """Whether two formulas are equal, for all variables for which both are real; None if not certain."""
    if a == b:
        return True
    if a in _INFINITIES or b in _INFINITIES:
        other = b if a in _INFINITIES else a
        return False if other in _INFINITIES or number(other) is not None else None
    exactly = _rational_or_none(a), _rational_or_none(b)
    if None not in exactly:
        return exactly[0] == exactly[1]
    points, agreed = _points(a, b), 0
    for turn, point in enumerate(points):
        if values := _values(point, a, b):
            if not _agree(*values):
                return False if turn < _USUAL and _has_known_functions(a, b) else None
            agreed += 1
    steps = any(
        isinstance(n, Call) and n.name in ("floor", "ceil") and tree.symbols(n) for n in (*walk(a), *walk(b))
    )
    return True if agreed >= min(2, len(points)) and not steps else None  # steps agree at many points


def same_equation(a: Node, b: Node) -> bool | None:
    """Whether a = 0 and b = 0 have the same solutions; None where it is not certain.

    They have if a is b times a constant, both times their denominators. They have not if a solution of
    one does not solve the other.
    """
    a, b = (Product((node, *_denominators(node))) for node in (a, b))
    points = _points(a, b)
    pairs = [values for point in points if (values := _values(point, a, b))]
    ratios = [x / y for x, y in pairs if x and y]
    if equal(a, b) or (1 < len(ratios) == len(pairs) and all(_agree(ratios[0], x) for x in ratios)):
        return True
    for one, other in ((a, b), (b, a)) if _has_known_functions(a, b) else ():
        for point in points[:_USUAL]:
            for solution in _solutions(one, point):
                if (values := _values(solution, one, other)) and not values[0] and values[1]:
                    return False
    return None


def _denominators(node: Node) -> tuple[Node, ...]:
    """What a formula with variables is divided by, each once: x in y - 3/x."""
    if isinstance(node, Power) and node.exponent == MINUS_ONE and tree.symbols(node.base):
        return (node.base,)
    parts = tree.children(node) if isinstance(node, Sum | Product) else ()
    return tuple(dict.fromkeys(found for part in parts for found in _denominators(part)))


def exact(node: Node) -> Fraction | None:
    """The value if it is a rational number; None if it is not, not known, or too large to work out."""
    value = _rational_or_none(node)
    if value is None and (share := _share_of_pi(node)) and max(map(abs, share.as_integer_ratio())) < _SHORT:
        return None
    values = _values({}, node, node) if value is None else None
    if values and not values[0].imag and abs(values[0]) < 2**_BITS:  # sqrt(16), sin(pi/6), log_2 8
        scaled = int(values[0].real * 2**_BITS)
        guess = Fraction(scaled, 2**_BITS).limit_denominator(10_000)
        return guess if equal(node, Num(guess)) else None
    return value


def _share_of_pi(node: Node) -> Fraction | None:
    r"""The 2/3 of `\frac{2\pi}{3}`; None for what is no product of pi and numbers."""
    if node == Const("pi"):
        return Fraction(1)
    if not isinstance(node, Product):
        return None
    shares = [_rational_or_none(factor) for factor in node.factors]
    if shares.count(None) != 1:
        return None
    of_pi = _share_of_pi(node.factors[shares.index(None)])
    return of_pi and functools.reduce(operator.mul, [share for share in shares if share is not None], of_pi)


def too_large(node: Node) -> bool:
    """Whether a power or factorial in a formula is too large to work out."""
    try:
        return _rational(node) is None and _At({}).value(node) is None
    except _NO_VALUE as error:
        return isinstance(error, TooLargeError)


def number(node: Node) -> complex | None:
    """The value of a formula without variables in floating point; None where it has none."""
    values = _values({}, node, node)
    return complex(values[0]) if values and abs(values[0]) < 1e300 else None


@functools.lru_cache(maxsize=2_000)
def _rational_or_none(node: Node) -> Fraction | None:
    """As `_rational`, and None where the value is too large."""
    try:
        return _rational(node)
    except TooLargeError:
        return None


def _rational(node: Node) -> Fraction | None:
    """The value by rational arithmetic; None where a part is not rational or there is no value."""
    parts = [_rational(child) for child in tree.children(node)]
    values = [part for part in parts if part is not None]
    if len(values) < len(parts):
        return None
    match node:
        case Num(value):
            return _bounded(value)
        case Sum() | Product():
            step = operator.add if isinstance(node, Sum) else operator.mul
            return functools.reduce(lambda x, y: _bounded(step(x, y)), values)
        case Power() if values[1].denominator == 1 and (values[0] or values[1] > 0):
            base, exponent = values
            if (max(abs(base.numerator), base.denominator).bit_length() - 1) * abs(exponent) > MAX_BITS:
                raise TooLargeError("a power is too large to work out")
            return base**exponent.numerator
        case Call("factorial" | "binom" as name) if all(v.denominator == 1 and v >= 0 for v in values):
            n, k = int(values[0]), int(values[-1])
            if n > 500 if name == "factorial" else min(k, abs(n - k)) * n.bit_length() > MAX_BITS:
                raise TooLargeError("a factorial or a binomial coefficient is too large to work out")
            return Fraction(math.factorial(n) if name == "factorial" else math.comb(n, k))
    return None


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise TooLargeError("a number is too large to work out")
    return value


def _has_known_functions(*nodes: Node) -> bool:
    calls = {part.name for node in nodes for part in walk(node) if isinstance(part, Call)}
    return calls <= set(_FUNCTIONS)


def _points(a: Node, b: Node) -> list[_Point]:
    """Values for the variables, always the same for the same names."""
    names = sorted((tree.symbols(a) | tree.symbols(b)) - {"degree"})
    points: list[_Point] = [{} for _ in (_SCALES if names else _SCALES[:1])]
    for turn, point in enumerate(points):
        for index, name in enumerate(names):
            share = zlib.crc32(f"{turn} {name}".encode()) / 2**32
            point[name] = _SCALES[turn] * (0.4 + share) * (-1 if turn == 4 and index % 2 else 1)
            if turn < _USUAL and name in _INTEGERS:
                point[name] = _INTEGERS[name][turn]
    return points


def _values(point: _Point, a: Node, b: Node) -> tuple[Any, Any] | None:
    """The values of two formulas at a point; None where one has none, or too few of its bits are certain."""
    for bits in (_BITS, 8 * _BITS):
        at = _At(point, bits)
        try:
            value = at.value(a)
            values = value, value if b is a else at.value(b)
        except _NO_VALUE:
            return None
        if at.lost * 8 <= bits:
            return values
    return None


def _agree(x: Any, y: Any) -> bool:
    half = min(x.context.prec, y.context.prec) // 2
    return bool(abs(x - y) <= max(abs(x), abs(y)) * x.context.ldexp(1, -half))


def _solutions(node: Node, point: _Point) -> Iterator[_Point]:
    """Points where the value is zero, each found by changing one variable (secant method)."""
    for name in point:
        at = _At(dict(point), 2 * _BITS)
        try:
            old, old_value, new = point[name], at.value(node), point[name] * 1.1
            for _ in range(30):
                at.point[name] = new
                if not (value := at.value(node)):
                    yield at.point
                    break
                old, old_value, new = new, value, new - value * (new - old) / (value - old_value)
        except _NO_VALUE:
            continue


@functools.cache
def _arithmetic(bits: int) -> Any:
    from mpmath.ctx_mp import MPContext  # takes a moment to load

    context = MPContext()
    context.prec = bits
    return context


class _At:
    """Values of formulas at one point; fails with one of _NO_VALUE where there is none."""

    def __init__(self, point: _Point, bits: int = _BITS) -> None:
        self.point, self.mp = point, _arithmetic(bits)
        self.tiny = self.mp.ldexp(1, -bits // 2)
        self.lost = 0  # the most bits that a sum or a function may have lost

    def value(self, node: Node) -> Any:
        mp, parts = self.mp, [self.value(child) for child in tree.children(node)]
        if isinstance(node, Power | Call):
            arguments = parts[1:] if isinstance(node, Power) else parts
            self.lost = max(self.lost, self.size(_MAX_ARGUMENT, *arguments))
        match node:
            case Num(number):
                return mp.mpf(number.numerator) / number.denominator
            case Const("pi" | "e" | "i" as name):
                return mp.j if name == "i" else +getattr(mp, name)
            case Sym(name):
                return mp.pi / 180 if name == "degree" else mp.mpf(self.point[name])
            case Sum():
                value = self.sum(parts)
            case Product():
                value = math.prod(parts)
            case Power(_, exponent):
                value = self.power(parts[0], parts[1], _rational_or_none(exponent))
            case Call(name):
                value = self.call(name, *parts)
            case _:
                raise ValueError("infinity, or both signs")
        if isinstance(value, mp.mpc):
            if abs(value.imag) <= abs(value.real) * self.tiny:
                value = value.real
            elif self.point and not any(isinstance(part, mp.mpc) for part in parts):
                raise ValueError("not real, where variables are meant to be such that it is")
        self.size(_MAX_SIZE, value)
        return value

    def size(self, most: int, *values: Any) -> int:
        """How far values are from 1 at most, as a power of 2."""
        size = max(abs(self.mp.mag(value)) if value else 0 for value in values)
        if not size < most:
            raise TooLargeError("a value is too large to work out")
        return int(size)

    def sum(self, terms: list[Any]) -> Any:
        total = sum(terms)
        if abs(total) <= max(map(abs, terms)) * self.tiny:
            total = self.mp.zero
        sizes = [self.mp.mag(term) for term in (total, *terms) if term] or [0]
        self.lost = max(self.lost, max(sizes) - min(sizes))
        return total

    def power(self, base: Any, exponent: Any, known: Fraction | None) -> Any:
        if not base and not exponent:
            raise ValueError("0^0")
        if known and known.denominator % 2 and isinstance(base, self.mp.mpf) and base < 0:
            return (-1) ** known.numerator * (-base) ** exponent  # the real root, as at school
        return base**exponent

    def call(self, name: str, *arguments: Any) -> Any:
        mp = self.mp
        if name in _FUNCTIONS:
            value = _FUNCTIONS[name](mp, *arguments)
        else:
            key = name, *(int(mp.nint(part * 2**64)) for z in arguments for part in (mp.re(z), mp.im(z)))
            hashed = int.from_bytes(blake2b(repr(key).encode()).digest(), "big")
            value = mp.mpf(hashed) / 2**511 - 1  # from -1 to 1, the same for the same arguments
        return value if abs(value) > self.tiny else mp.zero
