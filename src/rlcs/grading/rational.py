r"""Exact rational arithmetic on answers: a small parser to `Fraction`, with no `eval` and no floats.

It reads integers with thousands commas, decimals, scientific notation, `a/b`, `\frac`, mixed
numbers (`2\frac{1}{2}` and `2 1/2` are 5/2), the four operations, integer powers, factorials and
roots of perfect squares. Everything is bounded: a number of more than `MAX_BITS` bits is never made.
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction

MAX_BITS = 8_000
"""Bits of the largest numerator or denominator (about 2,400 digits)."""
_MAX_DEPTH = 40
_MAX_TOKENS = 500
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<op>\\frac|\\sqrt|\\times|\\cdot|\\div|\*\*|[-+*/^(){}!]))"
)
_MEANING = {"\\times": "*", "\\cdot": "*", "\\div": "/", "**": "^"}


class NotExactError(ValueError):
    """The text is not an exact rational number (it may still be an expression)."""


class TooLargeError(ValueError):
    """The text asks for a number or a nesting beyond the bounds."""


def exact(text: str) -> Fraction:
    """The value of `text`. Raises `NotExactError` or `TooLargeError`."""
    tokens = _tokens(text)
    parser = _Parser(tokens)
    value = parser.sum()
    if parser.position != len(tokens):
        raise NotExactError(text[:80])
    return value


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position, text = 0, text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise NotExactError(text[:80])
        if len(tokens) >= _MAX_TOKENS:
            raise TooLargeError("too many terms")
        token = match["number"] or match["op"]
        tokens.append(_MEANING.get(token, token))
        position = match.end()
    return tokens


def _literal(token: str) -> Fraction:
    digits, _, power = token.replace(",", "").lower().partition("e")
    if len(digits) > MAX_BITS // 4 or len(power) > 4 or (power and abs(int(power)) > MAX_BITS // 4):
        raise TooLargeError("too many digits")
    whole, _, part = digits.partition(".")
    value = Fraction(int(whole + part), 10 ** len(part))
    return value * Fraction(10) ** int(power or 0)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise TooLargeError("a number is too large")
    return value


class _Parser:
    """Recursive descent; `depth` bounds the recursion, `_bounded` every value."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def peek(self, ahead: int = 0) -> str:
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise NotExactError(f"expected {expected or 'a number'}")
        self.position += 1
        return token

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value = _bounded(value + sign * self.product())
        return value

    def product(self) -> Fraction:
        value, bare = self.signed()
        while True:
            token = self.peek()
            if token in ("*", "/"):
                self.take()
                factor, bare = self.signed()
                if token == "/" and factor == 0:
                    raise NotExactError("division by zero")
                value = _bounded(value / factor if token == "/" else value * factor)
            elif token in ("(", "{", "\\frac", "\\sqrt") or (_is_number(token) and not bare):
                factor, bare = self.signed()  # side by side: 2(3), 2^{12} 13^2
                value = _bounded(value * factor)
            else:
                return value

    def signed(self) -> tuple[Fraction, bool]:
        """A factor, and whether it is a bare number (two of which side by side mean nothing)."""
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        bare = _is_number(self.peek())
        value, start = self.atom(), self.position
        while self.peek() == "!":
            self.take()
            if value.denominator != 1 or value < 0:
                raise NotExactError("factorial of a fraction")
            if value > 500:
                raise TooLargeError("a factorial is too large")
            value = Fraction(math.factorial(int(value)))
        if self.peek() == "^":
            self.take()
            value = _power(value, self.exponent())
        return sign * value, bare and self.position == start

    def exponent(self) -> Fraction:
        if self.peek() == "-":
            self.take()
            return -self.atom()
        value = self.atom()
        if self.peek() == "^":  # 9^9^9 is 9^(9^9)
            self.take()
            value = _power(value, self.deeper(self.exponent))
        return value

    def deeper(self, rule: Callable[[], Fraction]) -> Fraction:
        """Apply a rule one level down; every cycle of the grammar passes through here."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise TooLargeError("too deeply nested")
        value = rule()
        self.depth -= 1
        return value

    def atom(self) -> Fraction:
        return self.deeper(self.primary)

    def primary(self) -> Fraction:
        token = self.take()
        if _is_number(token):
            return self.mixed(_literal(token), token)
        if token in ("(", "{"):
            value = self.sum()
            self.take(")" if token == "(" else "}")
            return value
        if token == "\\frac":
            over, under = self.argument(), self.argument()
            if under == 0:
                raise NotExactError("division by zero")
            return _bounded(over / under)
        if token == "\\sqrt":
            return _root(self.argument())
        raise NotExactError(token)

    def mixed(self, whole: Fraction, token: str) -> Fraction:
        """Add the fraction of a mixed number, if one follows the integer `token`."""
        if not token.isdigit():
            return whole
        if self.peek() == "\\frac":
            return whole + self.atom()
        if _is_number(self.peek()) and self.peek(1) == "/" and _is_number(self.peek(2)):
            over, _, under = self.take(), self.take(), self.take()
            if _literal(under) == 0:
                raise NotExactError("division by zero")
            return whole + _literal(over) / _literal(under)
        return whole

    def argument(self) -> Fraction:
        r"""What a LaTeX command takes: a group, or the next single digit (`\frac12`, `\frac{360}7`)."""
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.position] = token[1:]
            return Fraction(int(token[0]))
        return self.atom()


def _is_number(token: str) -> bool:
    return bool(token) and (token[0].isdigit() or (token[0] == "." and len(token) > 1))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or (base == 0 and exponent <= 0):
        raise NotExactError("a root, or a power of zero")
    power = int(exponent)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits > 1 and abs(power) * bits > MAX_BITS:
        raise TooLargeError("a power is too large")
    if bits <= 1:  # 0, 1 and -1: any exponent
        return base if power % 2 else base * base
    return base**power


def _root(value: Fraction) -> Fraction:
    if value < 0:
        raise NotExactError("root of a negative number")
    over, under = math.isqrt(value.numerator), math.isqrt(value.denominator)
    if over * over != value.numerator or under * under != value.denominator:
        raise NotExactError("an irrational root")
    return Fraction(over, under)
