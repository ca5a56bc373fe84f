r"""Computes the value of LaTeX text as MATH-Vision's official script does (latex2sympy2 1.9.1, then Python).

The quirks that decide published scores are kept: `2\frac{1}{2}` is a product, `1 2` is 2, `12:30` is 0.4,
angles are radians, `\frac12` cannot be read, letters have no value, and what follows a complete expression
is often ignored (`5)3` is 5). No text is evaluated as a program, and digits, nesting and length are bounded.
"""

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType

Number = int | float

_MEANING = MappingProxyType(
    {
        **dict.fromkeys(("\\times", "\\cdot"), "*"),
        **dict.fromkeys(("\\div", ":"), "/"),
        **dict.fromkeys(("\\dfrac", "\\tfrac"), "\\frac"),
    }
)
_SIGNS = ("+", "-")
_OPENING = "( { [ \\{ \\lbrace \\lbrack \\lgroup".split()
_CLOSING = MappingProxyType(dict(zip(_OPENING, ") } ] \\} \\rbrace \\rbrack \\rgroup".split(), strict=True)))
_UNKNOWN = "?"
_MAX_TOKENS, _MAX_BITS, _MAX_DEPTH, _MAX_DIGITS, _MAX_FACTORIAL = 2_000, 20_000, 60, 4_000, 1_000
_SPACES = re.compile(r"\\(?:displaystyle|quad|qquad|,)|[$~\s]")
_TOKEN = re.compile(
    r"\s*((?:\d*(?:,\d{3})*\.\d+|\d+(?:,\d{3})*)(?:\\%)?|\\[a-z]+|\\[\\{}|]|[-+*/^(){}\[\]:!'e_.&])"
)
_ENDS = frozenset(_CLOSING.values()) | frozenset(
    "_ . & \\\\ \\right \\rfloor \\rceil \\to \\rightarrow \\end \\choose".split()
)
_ANGLES = "sin cos tan sinh cosh tanh".split()
_FUNCTIONS: Mapping[str, Callable[[Number], Number]] = MappingProxyType(
    {f"\\{name}": getattr(math, name) for name in (*_ANGLES, "exp")}
    | {f"\\arc{name}": getattr(math, f"a{name}") for name in _ANGLES}
)


class NoValueError(ValueError):
    """The official script reads no value from the text, or one that exceeds the bounds here."""


def rounded(text: str) -> Number:
    """Compute the official script's value of lower-case LaTeX, to two places. Raises NoValueError."""
    reader = _Reader(_tokens(_SPACES.sub(" ", text)))
    try:
        value = reader.sum()
        if reader.peek() and reader.peek() not in _ENDS:
            raise NoValueError("more text follows")
        return round(value, 2)
    except (ArithmeticError, ValueError, TypeError) as error:
        raise NoValueError(str(error)) from error


def _tokens(text: str) -> list[str]:
    """Split into at most `_MAX_TOKENS` tokens; the list ends with `?` at a character that begins no token."""
    text = text.strip()
    tokens: list[str] = []
    position = 0
    while position < len(text) and len(tokens) < _MAX_TOKENS:
        match = _TOKEN.match(text, position)
        if match is None:
            return [*tokens, _UNKNOWN]
        tokens.append(_MEANING.get(match[1], match[1]))
        position = match.end()
    return tokens


def _is_number(token: str) -> bool:
    return token[:1].isdigit() or (token[:1] == "." and len(token) > 1)


def _bounded(value: Number) -> Number:
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise NoValueError("a number is too large")
    return value


def _number(token: str) -> Number:
    digits = token.rstrip("\\%").replace(",", "")
    if len(digits) > _MAX_DIGITS:
        raise NoValueError("too many digits")
    value = Fraction(digits) / (100 if token.endswith("%") else 1)
    return value.numerator / value.denominator if value.denominator > 1 else value.numerator


def _power(base: Number, power: Number) -> Number:
    whole = isinstance(base, int) and isinstance(power, int)
    if whole and abs(power) * int(base).bit_length() > _MAX_BITS:
        raise NoValueError("a power is too large")
    value = base**power
    if isinstance(value, complex):
        raise NoValueError("a complex number")
    return int(value) if isinstance(value, int) else float(value)


def _binomial(over: Number, under: Number) -> Number:
    whole = isinstance(over, int) and isinstance(under, int)
    if not whole or not 0 <= over <= _MAX_FACTORIAL or under < 0:
        raise NoValueError("no binomial coefficient, or too large a one")
    return math.comb(int(over), int(under))


def _factorial(value: Number) -> int:
    if isinstance(value, float) or not 0 <= value <= _MAX_FACTORIAL:
        raise NoValueError("no factorial, or too large a one")
    return math.factorial(value)


class _Reader:
    """Recursive descent over tokens; every cycle of the grammar passes `product`, which bounds the depth."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise NoValueError(f"{token or 'the end'} where {expected or 'a value'} should be")
        self.position += 1
        return token

    def sum(self) -> Number:
        value = self.product()
        while self.peek() in _SIGNS:
            value = _bounded(value + self.product())  # the product reads its sign
        return value

    def product(self, *, in_function: bool = False) -> Number:
        """Read a product; `in_function`, in an argument without brackets, another function ends it."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise NoValueError("too deeply nested")
        value = self.factor(in_function=in_function)
        while (token := self.peek()) in ("*", "/"):
            self.take()
            factor = self.factor(in_function=in_function)
            value = _bounded(value / factor if token == "/" else value * factor)
        self.depth -= 1
        return value

    def factor(self, *, in_function: bool) -> Number:
        sign = 1
        while self.peek() in _SIGNS:
            sign = -sign if self.take() == "-" else sign
        value = self.powers()
        while self.starts_value() and not (in_function and self.is_function()):
            value = _bounded(value * self.powers())
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
                value = _power(value, self.exponent())
            elif token == "!":
                value = _factorial(value)
        return value

    def exponent(self) -> Number:
        """Read an exponent: a number, pi or a group in braces."""
        if self.peek() in ("{", "\\pi") or _is_number(self.peek()):
            return self.primary()
        raise NoValueError("no exponent")

    def group(self) -> Number:
        if self.peek() == "\\left":
            self.take()
        closing = _CLOSING.get(self.take(), _UNKNOWN)
        value = self.sum()
        if self.peek() == "\\right":
            self.take()
        self.take(closing)
        return value

    def argument(self) -> Number:
        """Read the argument of a command, which must stand in braces."""
        if self.peek() != "{":
            raise NoValueError("no braces")
        return self.group()

    def primary(self) -> Number:
        if self.peek() in _CLOSING or self.peek() == "\\left":
            return self.group()
        token = self.take()
        if _is_number(token):
            return _number(token)
        match token:
            case "\\frac":
                over, under = self.argument(), self.argument()
                return _bounded(over / under)
            case "\\pi":
                return math.pi
            case "\\sqrt":
                degree = self.group() if self.peek() == "[" else 2
                value = self.argument()
                return math.sqrt(value) if degree == 2 else _power(value, 1 / degree)
            case "\\binom":
                return _binomial(self.argument(), self.argument())
            case "\\lfloor":
                value = math.floor(self.sum())
                self.take("\\rfloor")
                return value
            case "e":
                return self.exponential()
        return self.function(token)

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
        return _power(value, power) if power else value
