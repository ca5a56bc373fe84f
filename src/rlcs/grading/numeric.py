"""The value of an expression in floating point, with a bound of its error."""

import cmath
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from rlcs.grading import tree
from rlcs.grading.polynomials import UndecidedError

EPSILON = 4e-16


class Estimate(NamedTuple):
    """A complex value and how far from the truth it may be."""

    value: complex
    error: float


FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "ln": cmath.log,
    "exp": cmath.exp,
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda z: 1 / cmath.tan(z),
    "sec": lambda z: 1 / cmath.cos(z),
    "csc": lambda z: 1 / cmath.sin(z),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "abs": abs,
    "factorial": lambda z: math.gamma(_real(z) + 1),
}


def estimate(node: tree.Node, point: Mapping[str, float]) -> Estimate:
    """The value where the variables are these positive numbers.

    Fails with UndecidedError or an ArithmeticError where there is none, or where it is a matter of convention
    (an odd root of a negative number; anything that is not real once variables take part).
    """
    match node:
        case tree.Num(number):
            value = complex(float(number))
            return Estimate(value, abs(value) * EPSILON)
        case tree.Const("pi" | "e" as name):
            return Estimate(complex(getattr(math, name)), EPSILON)
        case tree.Const("i"):
            return Estimate(1j, 0.0)
        case tree.Sym(name):
            return Estimate(complex(point[name]), EPSILON * point[name])
        case tree.Sum(terms):
            parts = [estimate(term, point) for term in terms]
            size = math.fsum(abs(part.value) for part in parts)
            return Estimate(
                sum(part.value for part in parts),
                math.fsum(part.error for part in parts) + EPSILON * size * len(parts),
            )
        case tree.Product(terms):
            parts = [estimate(term, point) for term in terms]
            value = math.prod((part.value for part in parts), start=complex(1))
            if any(part.value == 0 for part in parts):
                if any(part.error and part.value == 0 for part in parts):
                    raise UndecidedError("perhaps zero")
                return Estimate(0j, 0.0)
            relative = math.fsum(part.error / abs(part.value) + EPSILON for part in parts)
            return Estimate(value, abs(value) * relative)
        case tree.Power(base, exponent):
            return _power(estimate(base, point), estimate(exponent, point), bool(point))
        case tree.Call(name, arguments):
            return _call(name, [estimate(argument, point) for argument in arguments], bool(point))
    raise UndecidedError("no one value")


def _real(z: complex) -> float:
    if z.imag:
        raise UndecidedError("a function of real numbers")
    return z.real


def _power(base: Estimate, exponent: Estimate, real: bool) -> Estimate:
    b, e = base.value, exponent.value
    if base.error >= abs(b) / 4:
        if b or base.error or e.imag or e.real <= 0:
            raise UndecidedError("a power of what may be zero")
        return Estimate(0j, 0.0)
    whole = not e.imag and e.real == round(e.real) and abs(e.real) < 2**20
    if not whole and b.real <= 0 and abs(b.imag) <= base.error:
        root = 1 / e.real if e.real else 0.0
        if real or b.imag or abs(root - round(root)) > 1e-9 or round(root) % 2:
            raise UndecidedError("a root of a negative number")
    value = b ** round(e.real) if whole else cmath.exp(e * cmath.log(b))
    logarithm = cmath.log(b)
    relative = abs(e) * (base.error / abs(b) + EPSILON) + abs(logarithm) * (
        exponent.error * (not whole or exponent.error > 1e-9) + EPSILON * abs(e)
    )
    return Estimate(value, abs(value) * (1.5 * relative + EPSILON))


def _call(name: str, arguments: list[Estimate], real: bool) -> Estimate:
    if name == "log" and len(arguments) == 2:
        top, bottom = (_call("ln", [argument], real) for argument in arguments)
        return _quotient(top, bottom)
    if name == "binom" and len(arguments) == 2:
        n, k = arguments
        rest = Estimate(n.value - k.value, n.error + k.error)
        parts = [_call("factorial", [part], real) for part in (n, k, rest)]
        return _quotient(_quotient(parts[0], parts[1]), parts[2])
    if name not in FUNCTIONS or len(arguments) != 1:
        raise UndecidedError("a function that is not known")
    [(z, error)] = arguments
    if name == "ln" and z.real <= error and abs(z.imag) <= error and (real or z.imag or abs(z.real) <= error):
        raise UndecidedError("the logarithm of a negative number")
    function, step = FUNCTIONS[name], max(error, EPSILON * abs(z))
    value = complex(function(z))
    if real and value.imag and not z.imag:
        raise UndecidedError("not real")
    change = 0.0
    if step:
        change = max(abs(function(z + s) - value) for s in (step, -step))
    return Estimate(value, 2 * change + EPSILON * abs(value))


def _quotient(top: Estimate, bottom: Estimate) -> Estimate:
    if bottom.error >= abs(bottom.value) / 4:
        raise UndecidedError("a division by what may be zero")
    value = top.value / bottom.value
    error = (top.error + abs(value) * bottom.error) / abs(bottom.value)
    return Estimate(value, 2 * error + EPSILON * abs(value))
