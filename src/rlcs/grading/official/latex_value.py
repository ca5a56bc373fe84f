r"""The number that a LaTeX text means to MATH-Vision's official script (latex2sympy2 1.9.1, then Python).

Its quirks decide published scores and are kept: `2\frac{1}{2}` is a product, `1 2` is 2, `12:30` is
0.4, angles are radians, `\frac12` cannot be read, letters have no value, and what follows a complete
expression is often ignored (`5)3` is 5). Unlike there, nothing is evaluated as a program, and
numbers, nesting and length are bounded.
"""

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

Number = int | float

_MAX_BITS = 20_000
_MAX_DEPTH = 60
_MAX_TOKENS = 2_000
_MAX_FACTORIAL = 1_000
_SPACES = re.compile(r"\\(?:displaystyle|quad|qquad|,)|[$~\s]")
_TOKEN = re.compile(
    r"(?P<number>\d*(?:,\d{3})*\.\d+|\d+(?:,\d{3})*)(?P<percent>\\%)?"
    r"|(?P<op>\\[a-z]+|\\[\\{}|]|[-+*/^(){}\[\]:!'e_.&])| +"
)
_SUMS = MappingProxyType({"+": 1, "-": -1})
_PRODUCTS = frozenset(("*", "\\times", "\\cdot"))
_QUOTIENTS = frozenset(("/", ":", "\\div"))
_OPENING = "( { [ \\{ \\lbrace \\lbrack \\lgroup".split()
_CLOSING = MappingProxyType(dict(zip(_OPENING, ") } ] \\} \\rbrace \\rbrack \\rgroup".split(), strict=True)))
_ENDS = frozenset(_CLOSING.values()) | frozenset(
    "_ . & \\\\ \\right \\rfloor \\rceil \\to \\rightarrow \\end \\choose".split()
)
_FRACTIONS = frozenset(("\\frac", "\\dfrac", "\\tfrac"))
_BEGIN = _FRACTIONS | {"\\left", "\\lfloor", "\\pi", "\\binom"}
_ANGLES = "sin cos tan sinh cosh tanh".split()
_FUNCTIONS: Mapping[str, Callable[[Number], Number]] = MappingProxyType(
    {f"\\{name}": getattr(math, name) for name in (*_ANGLES, "exp")}
    | {f"\\arc{name}": getattr(math, f"a{name}") for name in _ANGLES}
)


class NoValueError(ValueError):
    """The text has no value for the official script."""


def rounded(text: str) -> Number:
    """The value of lower-case LaTeX, rounded to two places as Python rounds. Raises NoValueError."""
    return _value(text, ends=_ENDS, finish=lambda value: round(value, 2))


def number(text: str) -> float:
    """The value of the whole text, in which nothing is ignored. Raises NoValueError."""
    return float(_value(text, ends=frozenset(), finish=float))


def _value(text: str, *, ends: frozenset[str], finish: Callable[[Number], Number]) -> Number:
    reader = _Reader(_tokens(_SPACES.sub(" ", text)))
    try:
        value = reader.sum()
        if reader.peek() and reader.peek() not in ends:
            raise NoValueError("something else follows")
        return finish(value)
    except (ArithmeticError, ValueError, TypeError) as error:
        raise NoValueError(str(error)) from error


def _tokens(text: str) -> list[str]:
    """Tokens up to the first character that no token begins with: the reader stumbles there if it must."""
    tokens: list[str] = []
    position = 0
    while position < len(text) and len(tokens) < _MAX_TOKENS:
        match = _TOKEN.match(text, position)
        if match is None:
            return [*tokens, "?"]
        if token := match["number"] or match["op"]:
            tokens.append(token + ("%" if match["percent"] else ""))
        position = match.end()
    return tokens


class _Reader:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.peek()
        if not token or (expected and token not in expected):
            raise NoValueError(f"{token or 'the end'} where {' '.join(expected) or 'a value'} should be")
        self.position += 1
        return token

    def sum(self) -> Number:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise NoValueError("too deeply nested")
        value = self.product()
        while (token := self.peek()) in _SUMS:
            self.take()
            value = value + _SUMS[token] * self.product()
        self.depth -= 1
        return value

    def product(self, *, bare: bool = False) -> Number:
        """With `bare`, the argument of a function without brackets: another function ends it."""
        value = self.signed(bare=bare)
        while (token := self.peek()) in _PRODUCTS | _QUOTIENTS:
            self.take()
            factor = self.signed(bare=bare)
            value = _bounded(value * factor) if token in _PRODUCTS else value / factor
        return value

    def signed(self, *, bare: bool) -> Number:
        sign = 1
        while self.peek() in _SUMS:
            sign *= _SUMS[self.take()]
        value = self.power()
        while self.starts_value() and not (bare and self.is_function()):
            value = _bounded(value * self.power())
        return sign * value

    def is_function(self) -> bool:
        return self.peek() in _FUNCTIONS or self.peek() in ("\\sqrt", "\\log", "e")

    def starts_value(self) -> bool:
        token = self.peek()
        return token in _CLOSING or token in _BEGIN or _is_number(token) or self.is_function()

    def power(self) -> Number:
        value = self.primary()
        while self.peek() in ("^", "!", "'"):
            token = self.take()
            if token == "^":
                value = _power(value, self.exponent())
            elif token == "!":
                value = _factorial(value)
        return value

    def exponent(self) -> Number:
        """A number, a constant or a group in braces."""
        if self.peek() == "{":
            return self.group()
        if self.peek() == "\\pi" or _is_number(self.peek()):
            return self.primary()
        raise NoValueError("no exponent")

    def group(self) -> Number:
        if self.peek() == "\\left":
            self.take()
        closing = _CLOSING.get(self.take(), "?")
        value = self.sum()
        if self.peek() == "\\right":
            self.take()
        self.take(closing)
        return value

    def primary(self) -> Number:
        token = self.peek()
        if token in _CLOSING or token == "\\left":
            return self.group()
        self.take()
        if _is_number(token):
            return _literal(token)
        if token == "\\pi":
            return math.pi
        if token in _FRACTIONS:
            return self.braced() / self.braced()
        if token == "\\binom":
            return _binomial(self.braced(), self.braced())
        if token == "\\sqrt":
            return self.root()
        if token == "\\lfloor":
            value = math.floor(self.sum())
            self.take("\\rfloor")
            return value
        if token == "e":
            return self.exponential()
        return self.function(token)

    def braced(self) -> Number:
        if self.peek() != "{":
            raise NoValueError("no braces")
        return self.group()

    def root(self) -> Number:
        degree: Number = 2
        if self.peek() == "[":
            degree = self.group()
        return _power(self.braced(), 1 / degree) if degree != 2 else math.sqrt(self.braced())

    def exponential(self) -> Number:
        """`e^2` has a value there, e itself has none."""
        self.take("^")
        power = self.exponent()
        if power == 1:
            raise NoValueError("e has no value")
        return math.exp(power)

    def function(self, name: str) -> Number:
        if name != "\\log" and name not in _FUNCTIONS:
            raise NoValueError(f"{name} has no value")
        base: Number = 10
        power: Number | None = None
        while self.peek() in ("^", "_"):
            if self.take() == "^":
                power = self.exponent()
            else:
                base = self.exponent()
        argument = self.group() if self.peek() in ("(", "\\left") else self.product(bare=True)
        if name == "\\log":
            value = math.log(argument, base)
        elif power == -1 and name.replace("\\", "\\arc") in _FUNCTIONS:
            return _FUNCTIONS[name.replace("\\", "\\arc")](argument)
        else:
            value = _FUNCTIONS[name](argument)
        return _power(value, power) if power else value


def _is_number(token: str) -> bool:
    return token[:1].isdigit() or (token[:1] == "." and len(token) > 1)


def _literal(token: str) -> Number:
    digits = token.rstrip("%").replace(",", "")
    if len(digits) > 4_000:
        raise NoValueError("too many digits")
    whole, _, part = digits.partition(".")
    over, under = int(whole + part), int("1" + "0" * len(part)) * (100 if token.endswith("%") else 1)
    return over // under if over % under == 0 else over / under


def _bounded(value: Number) -> Number:
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise NoValueError("a number is too large")
    return value


def _power(base: Number, power: Number) -> Number:
    if isinstance(base, int) and isinstance(power, int) and abs(power) * base.bit_length() > _MAX_BITS:
        raise NoValueError("a number is too large")
    value = base**power
    if isinstance(value, complex):
        raise NoValueError("a complex number")
    return int(value) if isinstance(value, int) else float(value)


def _factorial(value: Number) -> Number:
    if not isinstance(value, int) or not 0 <= value <= _MAX_FACTORIAL:
        raise NoValueError("no factorial, or too large a one")
    return math.factorial(value)


def _binomial(over: Number, under: Number) -> Number:
    if not (isinstance(over, int) and isinstance(under, int) and 0 <= over <= _MAX_FACTORIAL and under >= 0):
        raise NoValueError("no binomial coefficient, or too large a one")
    return math.comb(over, under)
