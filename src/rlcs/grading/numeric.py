"""The value of an expression in floating point, and how far rounding may have moved it."""

import cmath
import math
import random
from collections.abc import Callable, Mapping

from rlcs.grading import functions, tree
from rlcs.grading.polynomials import UndecidedError

NOISE = 1e-12
"""Every result is changed by up to this much of it: where that changes the value, rounding would as well."""
MAX_STEPS = 3_000
FAILURES = (ArithmeticError, ValueError, KeyError)
"""What is raised where an expression has no value in floating point (UndecidedError is a ValueError)."""

FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "ln": cmath.log,
    "sin": cmath.sin,
    "arcsin": cmath.asin,
    "arctan": cmath.atan,
    "abs": abs,
    "factorial": lambda z: math.gamma(z.real + 1),
    **functions.ROUNDINGS,
}
OF_REALS = {"factorial", *functions.ROUNDINGS}


def estimate(node: tree.Node, point: Mapping[str, float]) -> tuple[complex, float]:
    """The value where the variables are these positive numbers, and a bound of its error.

    Fails with one of FAILURES where there is no value, or where it is a matter of convention: an odd root of
    a negative number, anything that is not real once variables take part.
    """
    symbols = tree.symbols(node)
    values = [_Evaluation(seed, real=bool(symbols)).value(node, point) for seed in range(3)]
    if not all(map(cmath.isfinite, values)):
        raise UndecidedError("out of range")
    return values[0], 10 * max(abs(value - values[0]) for value in values)


class _Evaluation:
    """One evaluation with its own noise."""

    def __init__(self, seed: int, *, real: bool) -> None:
        self.random = random.Random(seed)
        self.real = real
        self.steps = 0

    def noisy(self, z: complex) -> complex:
        return z * (1 + NOISE * (self.random.random() - 0.5))

    def value(self, node: tree.Node, point: Mapping[str, complex]) -> complex:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise UndecidedError("too long")
        match node:
            case tree.Num(number):
                return complex(float(number))
            case tree.Const("pi" | "e" as name):
                return complex(getattr(math, name))
            case tree.Const("i"):
                return 1j
            case tree.Sym(name):
                return complex(point[name])
            case tree.Sum(terms):
                return sum(self.noisy(self.value(term, point)) for term in terms)
            case tree.Product(terms):
                return self.noisy(math.prod((self.value(term, point) for term in terms), start=complex(1)))
            case tree.Power(base, exponent):
                return self.noisy(self.power(self.value(base, point), self.value(exponent, point)))
            case tree.Call(name, arguments):
                values = [self.value(argument, point) for argument in arguments]
                if made := functions.definition(name, len(values)):
                    return self.value(made, dict(zip(functions.PLACES, values, strict=False)))
                if name in FUNCTIONS and len(values) == 1:
                    return self.noisy(self.call(name, self.noisy(values[0])))
        raise UndecidedError("no one value")

    def power(self, base: complex, exponent: complex) -> complex:
        near = round(exponent.real)
        if abs(exponent - near) < 1e-9 and abs(near) < 2**20 and (base or near > 0):
            return base**near
        # Square roots of negative numbers are the same by every convention.
        odd = self.real or base.imag or abs(exponent * 2 - round(exponent.real * 2)) > 1e-9
        if base.real < 0 and abs(base.imag) < 1e-9 * abs(base) and odd:
            raise UndecidedError("a root of a negative number")
        return cmath.exp(exponent * cmath.log(base))

    def call(self, name: str, z: complex) -> complex:
        if name in OF_REALS and z.imag:
            raise UndecidedError("a function of real numbers")
        if name == "ln" and z.real < 0 and (self.real or 0 < abs(z.imag) < 1e-9 * abs(z)):
            raise UndecidedError("the logarithm of a negative number")
        result = complex(FUNCTIONS[name](z.real if name in OF_REALS else z))
        if self.real and result.imag and not z.imag:
            raise UndecidedError("not real")
        return result
