r"""Reads tokens as a formula: sums, products, powers, roots, functions, in LaTeX or plain notation.

The readings are those of school books: `2\frac{1}{2}` is two and a half, `1/2x` is read from left to right,
`\sin 2x` is the sine of 2x, `x^10` the tenth power, `f(x)` a function of x, but `a(x+1)` a product.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from rlcs.grading.tokens import Token, end_of_group, latex
from rlcs.grading.tree import HALF, MINUS_ONE, Call, Const, Node, Num, PlusMinus, Power, Product, Sum, Sym

MAX_DEPTH = 40
"""Most brackets, powers and arguments inside one another."""
_MAX_DIGITS, _MAX_SUFFIXES = 2_000, 150

FUNCTIONS = frozenset("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln lg log exp abs".split())
"""Commands of functions of one argument."""
_INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi omega"
    " Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar nabla".split()
)
"""Commands that are variables."""
_ACCENTS = frozenset(
    "overline bar vec hat widehat tilde overrightarrow overleftrightarrow overset dot angle triangle odot"
    " measuredangle parallelogram arc wideparen overparen".split()
)
"""Commands that make a name of what follows: `\\overline{AB}`, `\\angle ABC`."""
_FUNCTION_LETTERS = frozenset(["f", "g", "h", "F", "G", "O", "\\Theta"])
_CLOSING = dict(
    pair.split() for pair in ("( )", "[ ]", "{ }", "\\{ \\}", "| |", "\\lfloor \\rfloor", "\\lceil \\rceil")
)
_SIGNS = frozenset(["+", "-", "\\pm", "\\mp"])
_COMMANDS = frozenset("frac sqrt cbrt binom pi infty".split()) | FUNCTIONS | GREEK | _ACCENTS
"""Commands at which a value begins."""
_NUMBERS = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_BASES = {name: base for base, name in enumerate(_NUMBERS.split(), 2)}
_NOTHING = Token("sign", "")  # what stands after the end
_FUNCTION_IN_WORD = re.compile(r"([A-Za-z]?)(sin|cos|tan|cot|sec|csc|ln|log)([A-Za-z]?)")


class NotAFormulaError(ValueError):
    """The tokens are not a formula that this grammar knows."""


def read_formula(tokens: Sequence[Token]) -> Node:
    """Read all tokens as one formula. Raises NotAFormulaError."""
    reader = _Reader(tokens)
    node = reader.quotient()
    if reader.position < len(reader.tokens):
        raise NotAFormulaError(f"{reader.text()} follows a formula")
    return node


def is_word(token: Token) -> bool:
    """Whether a run of letters is a word of a language, not a product of variables such as `ab` or `ABCD`."""
    return token.kind == "word" and (
        not token.text.isascii()
        or (token.upright and len(token.text) > 1)
        or (len(token.text) > 3 and not token.text.isupper() and not _FUNCTION_IN_WORD.fullmatch(token.text))
    )


def base_of(tokens: Sequence[Token]) -> int | None:
    """The number base that an index names: `8`, `eight`, `{(8)}`, `base 8`; None if it names none."""
    words = [t.text.lower() for t in tokens if t.text not in "(){}_" and t.text.lower() not in ("in", "base")]
    if len(words) != 1:
        return None
    base = int(words[0]) if words[0].isdecimal() and len(words[0]) < 3 else _BASES.get(words[0], 0)
    return base if 2 <= base <= 36 else None


def number_in_base(digits: str, base: int) -> Fraction | None:
    """The value of digits such as `101.1` or `7A` in a base; None if a digit is too large for it."""
    whole, _, part = digits.upper().partition(".")
    if len(digits) > 200:
        return None
    try:
        return Fraction(int(whole + part, base), base ** len(part))
    except ValueError:
        return None


def _number(text: str) -> Fraction:
    digits, _, power = text.lower().partition("e")
    if len(digits) > _MAX_DIGITS or len(power) > 4 or abs(int(power or 0)) > _MAX_DIGITS:
        raise NotAFormulaError("too many digits")
    value = Fraction(int(digits)) if digits.isdecimal() else Fraction(digits)
    return value * Fraction(10) ** int(power) if power else value


def _product(factors: Sequence[Node]) -> Node:
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def _is_simple_fraction(node: Node) -> bool:
    r"""Whether a node is `\frac{a}{b}` of whole numbers with a < b, which makes a mixed number."""
    match node:
        case Product((Num(over), Power(Num(under), Num(power)))):
            return power == -1 and over.denominator == under.denominator == 1 and 0 < over < under
    return False


class _Reader:
    """Recursive descent over tokens; every cycle of the grammar passes `primary`, which bounds the depth."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = list(tokens)
        self.position = 0
        self.depth = 0
        self.num_suffixes = 0
        """How many powers, factorials and the like were read: each makes the tree deeper, or wider."""

    def peek(self, ahead: int = 0) -> Token:
        index = self.position + ahead
        return self.tokens[index] if 0 <= index < len(self.tokens) else _NOTHING

    def text(self, ahead: int = 0) -> str:
        index = self.position + ahead  # as `peek`: most of the time of reading is spent here
        return self.tokens[index].text if 0 <= index < len(self.tokens) else ""

    def found(self, sign: str) -> bool:
        """Take the next token if it is a certain sign."""
        found = self.text() == sign
        self.position += found
        return found

    def take(self, expected: str = "") -> Token:
        text = self.text()
        if not text or (expected and text != expected):
            raise NotAFormulaError(f"{text or 'the end'} where {expected or 'a value'} should be")
        self.position += 1
        return self.peek(-1)

    def sum(self) -> Node:
        terms = [self.signed()]
        while self.text() in _SIGNS:
            terms.append(self.signed())
        node = terms[0] if len(terms) == 1 else Sum(tuple(terms))
        if self.text() == "(" and self.text(1) == "mod":
            self.position += 2
            node = Call("mod", (node, self.sum()))
            self.take(")")
        elif self.text() in ("\\pmod", "\\bmod", "\\mod", "mod"):
            self.take()
            node = Call("mod", (node, self.primary()))
        return node

    def signed(self) -> Node:
        """Read a term and the signs before it."""
        if self.text() in ("\\pm", "\\mp"):
            opposite = self.take().text == "\\mp"
            return PlusMinus(self.term(), opposite=opposite)
        negative = False
        while self.text() in ("+", "-"):
            negative ^= self.take().text == "-"
        return Product((MINUS_ONE, self.term())) if negative else self.term()

    def term(self) -> Node:
        factors = [self.factor()]
        while True:
            if self.found("/"):
                negative = self.found("-")
                factors += [Power(self.factor(), MINUS_ONE), *([MINUS_ONE] if negative else [])]
            elif self.found("\\cdot"):
                factors += [MINUS_ONE] if self.found("-") else []
                factors.append(self.factor())
            elif self.starts_factor():
                factors.append(self.factor())
            else:
                return _product(factors)

    def starts_factor(self) -> bool:
        """Whether a factor follows without an operator; two numbers in a row have no value."""
        token = self.peek()
        if token.kind == "number":
            return self.peek(-1).kind != "number" or self.text(-2) == "^"
        if token.kind == "word":
            return token.text != "mod"
        if token.text == "(":
            return self.text(1) != "mod"
        return token.text in ("[", "{", "\\lfloor", "\\lceil") or token.text[1:] in _COMMANDS

    def factor(self) -> Node:
        """Read a factor with its powers."""
        node = self.primary()
        while self.text() in ("^", "!", "°", "%", "'"):
            self.num_suffixes += 1
            if self.num_suffixes > _MAX_SUFFIXES:
                raise NotAFormulaError("too many powers and factorials")
            match self.take().text:
                case "^":
                    node = Power(node, self.exponent())
                case "!" if self.text() == "!":
                    raise NotAFormulaError("a double factorial")
                case "!":
                    node = Call("factorial", (node,))
                case "°" if self.text() == "°":
                    raise NotAFormulaError("two degree signs")
                case "°":
                    node = Product((node, Sym("degree")))
                case "%":
                    node = Product((node, Num(Fraction(1, 100))))
                case _ if isinstance(node, Sym):
                    node = Sym(node.name + "'")
                case _:
                    raise NotAFormulaError("a prime after a value")
        return node

    def exponent(self) -> Node:
        negative = self.found("-")
        node = self.primary()
        if self.found("^"):  # 9^9^9 is 9^(9^9)
            node = Power(node, self.deeper(self.exponent))
        return Product((MINUS_ONE, node)) if negative else node

    def deeper(self, rule: Callable[[], Node]) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotAFormulaError("too deeply nested")
        node = rule()
        self.depth -= 1
        return node

    def primary(self) -> Node:
        return self.deeper(self.unbounded_primary)

    def unbounded_primary(self) -> Node:
        token = self.peek()
        if token.kind == "number":
            return self.number()
        if token.kind == "word":
            return self.word(self.take())
        if token.text in _CLOSING:
            node = self.group()
            name = {"\\lfloor": "floor", "\\lceil": "ceil", "|": "abs"}.get(token.text)
            return Call(name, (node,)) if name else node
        self.take()
        return self.command(token.text.removeprefix("\\"))

    def group(self) -> Node:
        closing = _CLOSING[self.take().text]
        node = self.quotient()
        self.take(closing)
        return node

    def quotient(self) -> Node:
        r"""Read a sum, or `a \over b`, which divides all that stands in the same braces."""
        node = self.sum()
        if self.text() != "\\over":
            return node
        self.take()
        return Product((node, Power(self.sum(), MINUS_ONE)))

    def argument(self) -> Node:
        r"""Read a group, or the next single digit or letter: `\frac12`, `\frac{360}7`, `\frac ab`."""
        token = self.peek()
        if token.kind == "number" and not token.text.isdigit():
            raise NotAFormulaError("a decimal as an argument without braces")
        if token.kind in ("number", "word") and len(token.text) > 1:
            self.tokens[self.position] = token._replace(text=token.text[1:])
            first = token.text[0]
            return Num(Fraction(int(first))) if first.isdecimal() else self.symbol(first)
        return self.primary()

    def number(self) -> Node:
        """Read a number; a whole number and a simple fraction after it are a mixed number."""
        token = self.take()
        if self.found("_"):
            return self.based(token.text)
        node = Num(_number(token.text))
        start = self.position
        if token.text.isdigit() and self.text() == "\\frac":
            fraction = self.primary()
            if _is_simple_fraction(fraction):
                return Sum((node, fraction))
            self.position = start
        if token.text.isdigit() and self.text().isdigit() and self.text(1) == "/" and self.text(2).isdigit():
            over, under = int(self.text()), int(self.text(2))
            if 0 < over < under:
                self.position += 3
                return Sum((node, Num(Fraction(over, under))))
        return node

    def based(self, digits: str) -> Node:
        """Read the base after a number, inside a larger formula: `12_3 + 4`."""
        base = base_of(self.index())
        value = number_in_base(digits, base) if base else None
        if value is None:
            raise NotAFormulaError("an index of a number that is no base")
        return Num(value)

    def index(self) -> Sequence[Token]:
        """The tokens in braces, or the next token."""
        start = self.position
        if self.text() != "{":
            return [self.take()]
        self.position = end_of_group(self.tokens, start)
        if self.position > len(self.tokens):
            raise NotAFormulaError("a brace that is not closed")
        return self.tokens[start + 1 : self.position - 1]

    def word(self, token: Token) -> Node:
        """Read a run of letters as a product of variables."""
        letters = token.text
        if letters == "m" and self.text() == "\\angle":
            return self.primary()  # the measure of an angle
        if match := _FUNCTION_IN_WORD.fullmatch(letters):
            before, name, after = match.groups()
            if after:
                self.position -= 1
                self.tokens[self.position] = token._replace(text=after, gap=True)
            call = self.function(name)
            return Product((self.symbol(before), call)) if before else call
        if is_word(token):
            raise NotAFormulaError(f"the word {letters[:30]}")
        factors = [self.letter(letter) for letter in letters[:-1]]
        node = self.symbol(letters[-1])
        if not factors:
            return node
        while self.found("^"):  # the power belongs to the last letter: mv^2
            node = Power(node, self.exponent())
        return Product((*factors, node))

    def letter(self, name: str) -> Node:
        return Const(name) if name in ("e", "i") else Sym(name)

    def symbol(self, name: str) -> Node:
        """Make a variable, with its index, or a function of what stands in brackets after it."""
        if self.found("_"):
            index = latex(self.index()).strip("{}() ")
            return Sym(f"{name}_{index}")
        while self.found("'"):
            name += "'"
        inverse = latex(self.tokens[self.position : self.position + 6])
        if name in _FUNCTION_LETTERS and inverse.startswith("^{-1}("):
            self.position += 5
            name += "^{-1}"
        of_number = self.text(2) == ")" and self.text(1)[:1].isdigit()  # I(0) is the current at time 0
        if self.text() == "(" and (name[0] in _FUNCTION_LETTERS or of_number):
            return Call(name, (self.group(),))
        return self.letter(name)

    def command(self, name: str) -> Node:
        match name:
            case "frac":
                over, under = self.argument(), self.argument()
                return Product((over, Power(under, MINUS_ONE)))
            case "sqrt" | "cbrt":
                degree = self.group() if self.text() == "[" else Num(Fraction(3 if name == "cbrt" else 2))
                exponent = HALF if degree == Num(Fraction(2)) else Power(degree, MINUS_ONE)
                return Power(self.primary(), exponent)
            case "binom":
                return Call("binom", (self.argument(), self.argument()))
            case "pi":
                return Const("pi")
            case "infty":
                return Const("infinity")
        if name in FUNCTIONS:
            return self.function(name)
        if name in GREEK:
            return self.symbol("\\Theta" if name == "Theta" and self.text() == "(" else name)
        if name in _ACCENTS:
            return self.accented(name)
        raise NotAFormulaError(f"\\{name}")

    def accented(self, name: str) -> Node:
        r"""Read `\overline{AB}`, `\vec a`, `\angle ABC`: a name, of which nothing is computed."""
        return Sym(f"{name} {latex(self.index()).strip('{} ')}")

    def function(self, name: str) -> Node:
        base: Node | None = None
        power: Node | None = None
        while self.text() in ("^", "_"):
            if self.take().text == "^":
                power = self.exponent()
            else:
                base = self.argument()
        if power == Product((MINUS_ONE, Num(Fraction(1)))) or power == MINUS_ONE:
            if name not in _INVERSES:
                raise NotAFormulaError("an inverse of no known function")
            name, power = _INVERSES[name], None
        argument = self.function_argument()
        if name == "exp":
            node: Node = Power(Const("e"), argument)
        elif name in ("log", "lg"):
            node = Call("log", (argument, base or (Num(Fraction(10)) if name == "lg" else Sym("base"))))
        else:
            node = Call(name, (argument,))
        return node if power is None else Power(node, power)

    def function_argument(self) -> Node:
        """Read a group in brackets, or the factors up to the next function or operator."""
        if self.text() in ("(", "[", "{", "|"):
            opening = self.text()
            node = self.primary()
            return Product((node, self.primary())) if opening == "{" and self.text() == "(" else node
        if self.text()[1:] in FUNCTIONS:
            return self.primary()
        factors: list[Node] = [MINUS_ONE] if self.found("-") else []
        factors.append(self.factor())
        while self.starts_factor() and self.text() not in ("(", "[") and self.text()[1:] not in FUNCTIONS:
            factors.append(self.factor())
        return _product(factors)
