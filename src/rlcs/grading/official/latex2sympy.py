r"""Computes the value of LaTeX text: exactly, or as MATH-Vision's official script does.

`exact` reads integers with thousands commas, decimals, scientific notation, `a/b`, `\frac`, mixed numbers
(`2\frac{1}{2}` and `2 1/2` are 5/2), the four operations, integer powers, factorials and roots of perfect
squares. It computes with fractions.

`rounded` and `number` read as the official script does (latex2sympy2 1.9.1, then Python), with the quirks
that decide published scores: `2\frac{1}{2}` is a product, `1 2` is 2, `12:30` is 0.4, angles are radians,
`\frac12` cannot be read, letters have no value, and what follows a complete expression is often ignored
(`5)3` is 5).

No text is evaluated as a program, and digits, nesting and length are bounded: larger numbers are refused.
"""

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import ClassVar, Generic, TypeVar

Number = int | float
Value = TypeVar("Value", Fraction, int | float)

_MEANING = MappingProxyType(
    {
        **dict.fromkeys(("\\times", "\\cdot"), "*"),
        **dict.fromkeys(("\\div", ":"), "/"),
        **dict.fromkeys(("\\dfrac", "\\tfrac"), "\\frac"),
        "**": "^",
    }
)
_SIGNS = ("+", "-")
_OPENING = "( { [ \\{ \\lbrace \\lbrack \\lgroup".split()
_CLOSING = MappingProxyType(dict(zip(_OPENING, ") } ] \\} \\rbrace \\rbrack \\rgroup".split(), strict=True)))
_UNKNOWN = "?"


class NoValueError(ValueError):
    """The text has no value that this module can compute; it may still be a valid expression."""


class TooLargeError(ValueError):
    """The text exceeds the bounds on numbers, length or nesting."""


def exact(text: str) -> Fraction:
    """Compute the value of the whole text as a fraction. Raises NoValueError or TooLargeError."""
    tokens = _tokens(text, _EXACT_TOKEN, _MAX_EXACT_TOKENS + 1)
    if _UNKNOWN in tokens:
        raise NoValueError(text[:80])
    if len(tokens) > _MAX_EXACT_TOKENS:
        raise TooLargeError("too many terms")
    try:
        return _ExactReader(tokens).read()
    except ZeroDivisionError as error:
        raise NoValueError("division by zero") from error


def rounded(text: str) -> Number:
    """Compute the official script's value of lower-case LaTeX, to two places. Raises NoValueError."""
    return _official(text, ends=_OFFICIAL_ENDS, finish=lambda value: round(value, 2))


def number(text: str) -> float:
    """Compute the official script's value, but only if it reads the whole text. Raises NoValueError."""
    return float(_official(text, ends=frozenset(), finish=float))


def _official(text: str, *, ends: frozenset[str], finish: Callable[[Number], Number]) -> Number:
    tokens = _tokens(_OFFICIAL_SPACES.sub(" ", text), _OFFICIAL_TOKEN, _MAX_OFFICIAL_TOKENS)
    try:
        return finish(_OfficialReader(tokens).read(ends))
    except (ArithmeticError, ValueError, TypeError) as error:
        raise NoValueError(str(error)) from error


def _tokens(text: str, pattern: re.Pattern[str], most: int) -> list[str]:
    """Split into at most `most` tokens; the list ends with `?` at a character that begins no token."""
    text = text.strip()
    tokens: list[str] = []
    position = 0
    while position < len(text) and len(tokens) < most:
        match = pattern.match(text, position)
        if match is None:
            return [*tokens, _UNKNOWN]
        tokens.append(_MEANING.get(match[1], match[1]))
        position = match.end()
    return tokens


def _is_number(token: str) -> bool:
    return token[:1].isdigit() or (token[:1] == "." and len(token) > 1)


def _factorial(value: Fraction | Number, most: int) -> int:
    if isinstance(value, float) or value.denominator != 1 or value < 0:
        raise NoValueError("factorial of no whole number")
    if value > most:
        raise TooLargeError("a factorial is too large")
    return math.factorial(int(value))


class _Reader(Generic[Value]):
    """Recursive descent over tokens; subclasses define products, numbers, arguments and commands."""

    max_bits: ClassVar[int]
    max_depth: ClassVar[int]

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def read(self, ends: frozenset[str] = frozenset()) -> Value:
        """Compute the value of all tokens, or of those before one of `ends`."""
        value = self.sum()
        if self.peek() and self.peek() not in ends:
            raise NoValueError("more text follows")
        return value

    def peek(self, ahead: int = 0) -> str:
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise NoValueError(f"{token or 'the end'} where {expected or 'a value'} should be")
        self.position += 1
        return token

    def deeper(self, rule: Callable[[], Value]) -> Value:
        """Apply a rule one level deeper; bounds the recursion, as every cycle of the grammar calls this."""
        self.depth += 1
        if self.depth > self.max_depth:
            raise TooLargeError("too deeply nested")
        value = rule()
        self.depth -= 1
        return value

    def bounded(self, value: Value) -> Value:
        whole = () if isinstance(value, float) else (value.numerator, value.denominator)
        if any(part.bit_length() > self.max_bits for part in whole):
            raise TooLargeError("a number is too large")
        return value

    def signs(self) -> int:
        """Read any number of + and -; return the resulting sign."""
        sign = 1
        while self.peek() in _SIGNS:
            sign = -sign if self.take() == "-" else sign
        return sign

    def sum(self) -> Value:
        value = self.product()
        while self.peek() in _SIGNS:
            value = self.bounded(value + self.product())  # the product reads its sign
        return value

    def group(self) -> Value:
        if self.peek() == "\\left":
            self.take()
        closing = _CLOSING.get(self.take(), _UNKNOWN)
        value = self.sum()
        if self.peek() == "\\right":
            self.take()
        self.take(closing)
        return value

    def primary(self) -> Value:
        token = self.peek()
        if token in _CLOSING or token == "\\left":
            return self.group()
        self.take()
        if _is_number(token):
            return self.number(token)
        if token == "\\frac":
            over, under = self.argument(), self.argument()
            return self.bounded(over / under)
        return self.command(token)

    def product(self) -> Value:
        raise NotImplementedError

    def number(self, token: str) -> Value:
        raise NotImplementedError

    def argument(self) -> Value:
        """Read the argument of a command."""
        raise NotImplementedError

    def command(self, name: str) -> Value:
        raise NotImplementedError


# --- MATH-Vision's official script ------------------------------------------------------------------

_MAX_OFFICIAL_TOKENS = 2_000
_MAX_FACTORIAL = 1_000
_OFFICIAL_SPACES = re.compile(r"\\(?:displaystyle|quad|qquad|,)|[$~\s]")
_OFFICIAL_TOKEN = re.compile(
    r"\s*((?:\d*(?:,\d{3})*\.\d+|\d+(?:,\d{3})*)(?:\\%)?|\\[a-z]+|\\[\\{}|]|[-+*/^(){}\[\]:!'e_.&])"
)
_OFFICIAL_ENDS = frozenset(_CLOSING.values()) | frozenset(
    "_ . & \\\\ \\right \\rfloor \\rceil \\to \\rightarrow \\end \\choose".split()
)
_ANGLES = "sin cos tan sinh cosh tanh".split()
_FUNCTIONS: Mapping[str, Callable[[Number], Number]] = MappingProxyType(
    {f"\\{name}": getattr(math, name) for name in (*_ANGLES, "exp")}
    | {f"\\arc{name}": getattr(math, f"a{name}") for name in _ANGLES}
)


class _OfficialReader(_Reader[Number]):
    max_bits = 20_000
    max_depth = 60

    def sum(self) -> Number:
        return self.deeper(super().sum)

    def product(self, *, in_function: bool = False) -> Number:
        """Read a product; `in_function`, in an argument without brackets, another function ends it."""
        value = self.factor(in_function=in_function)
        while (token := self.peek()) in ("*", "/"):
            self.take()
            factor = self.factor(in_function=in_function)
            value = self.bounded(value / factor if token == "/" else value * factor)
        return value

    def factor(self, *, in_function: bool) -> Number:
        sign, value = self.signs(), self.powers()
        while self.starts_value() and not (in_function and self.is_function()):
            value = self.bounded(value * self.powers())
        return sign * value

    def is_function(self) -> bool:
        return self.peek() in _FUNCTIONS or self.peek() in ("\\sqrt", "\\log", "e")

    def starts_value(self) -> bool:
        token = self.peek()
        begins = token in _CLOSING or token in ("\\frac", "\\left", "\\lfloor", "\\pi", "\\binom")
        return begins or _is_number(token) or self.is_function()

    def powers(self) -> Number:
        value = self.primary()
        while self.peek() in ("^", "!", "'"):
            token = self.take()
            if token == "^":
                value = self.power(value, self.exponent())
            elif token == "!":
                value = _factorial(value, _MAX_FACTORIAL)
        return value

    def power(self, base: Number, power: Number) -> Number:
        whole = isinstance(base, int) and isinstance(power, int)
        if whole and abs(power) * int(base).bit_length() > self.max_bits:
            raise TooLargeError("a power is too large")
        value = base**power
        if isinstance(value, complex):
            raise NoValueError("a complex number")
        return int(value) if isinstance(value, int) else float(value)

    def exponent(self) -> Number:
        """Read an exponent: a number, pi or a group in braces."""
        if self.peek() == "{":
            return self.group()
        if self.peek() == "\\pi" or _is_number(self.peek()):
            return self.primary()
        raise NoValueError("no exponent")

    def number(self, token: str) -> Number:
        digits = token.rstrip("\\%").replace(",", "")
        if len(digits) > 4_000:
            raise TooLargeError("too many digits")
        value = Fraction(digits) / (100 if token.endswith("%") else 1)
        return value.numerator / value.denominator if value.denominator > 1 else value.numerator

    def argument(self) -> Number:
        if self.peek() != "{":
            raise NoValueError("no braces")
        return self.group()

    def command(self, name: str) -> Number:
        if name == "\\pi":
            return math.pi
        if name == "\\sqrt":
            degree = self.group() if self.peek() == "[" else 2
            value = self.argument()
            return math.sqrt(value) if degree == 2 else self.power(value, 1 / degree)
        if name == "\\binom":
            return self.binomial(self.argument(), self.argument())
        if name == "\\lfloor":
            value = math.floor(self.sum())
            self.take("\\rfloor")
            return value
        return self.exponential() if name == "e" else self.function(name)

    def binomial(self, over: Number, under: Number) -> Number:
        whole = isinstance(over, int) and isinstance(under, int)
        if not whole or not 0 <= over <= _MAX_FACTORIAL or under < 0:
            raise NoValueError("no binomial coefficient, or too large a one")
        return math.comb(int(over), int(under))

    def exponential(self) -> Number:
        """Read a power of e; e alone and `e^1` have no value in the official script."""
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
        argument = self.group() if self.peek() in ("(", "\\left") else self.product(in_function=True)
        inverse = name.replace("\\", "\\arc")
        if power == -1 and inverse in _FUNCTIONS:
            return _FUNCTIONS[inverse](argument)
        value = math.log(argument, base) if name == "\\log" else _FUNCTIONS[name](argument)
        return self.power(value, power) if power else value
