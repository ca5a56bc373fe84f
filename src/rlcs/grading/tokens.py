r"""Splits an answer into tokens: LaTeX, plain notation and Unicode become one spelling.

`\dfrac`, `½`, `√3`, `sqrt(3)`, `x²`, `≤`, `<=`, `\leqslant`, `pi`, `2*x` and `\text{cm}` all arrive at the
grammar (`reading`) as the same tokens as `\frac`, `\sqrt`, `^`, `\le`, `\pi`, `\cdot`, an upright word `cm`.
Nothing is computed here, and no part of the text is lost but decoration: dollar signs around formulas, sizes,
colours, spaces, a full stop at the end.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple


class Token(NamedTuple):
    r"""A piece of an answer.

    `kind` is `number`, `word` (letters), `command` (`\frac`, also operators such as `\le`) or `sign` (one
    character). `gap`: a space stood before it. `upright`: it stood in `\text{}`, `\mathrm{}` or the like.
    """

    kind: str
    text: str
    gap: bool = False
    upright: bool = False


Tokens = Sequence[Token]

MAX_TOKENS = 600

OPENING = frozenset(["(", "[", "{", "\\{", "\\lfloor", "\\lceil", "\\langle", "\\begin"])
CLOSING = frozenset([")", "]", "}", "\\}", "\\rfloor", "\\rceil", "\\rangle", "\\end"])

_CHARACTERS = MappingProxyType(
    {
        **dict.fromkeys("−–—‒―‐‑﹣－", "-"),
        **dict.fromkeys("×✕⨯", r"\times "),
        **dict.fromkeys("·⋅∙•", r"\cdot "),
        **dict.fromkeys("°º˚", "°"),
        **dict.fromkeys("“”„‘’′`", "'"),
        **dict.fromkeys("÷⁄∕", "/"),
        **dict.fromkeys("：∶꞉", ":"),
        **dict.fromkeys("，、", ","),
        **dict.fromkeys("。．", "."),
        **dict.fromkeys("￥", "¥"),
        **dict.fromkeys("≤⩽≦", r"\le "),
        **dict.fromkeys("≥⩾≧", r"\ge "),
        **dict.fromkeys("或", r"\text{ or }"),
        **dict.fromkeys("和且与", r"\text{ and }"),
        "µ": r"\mu ",
        "Ω": r"\Omega ",
        "ℝ": r"\mathbb{R}",
        "℃": "°C",
        "℉": "°F",
        "…": r"\ldots ",
    }
    | {
        character: f"\\{name} "
        for character, name in zip(
            "αβγδεζηθκλμνξπρσςτφϕχψωΓΔΘΛΞΠΣΦΨΩ≈∠△∞∪∩≠±∓∅∈∉≡∥⊥→⇒∼≅∝∖ℕℤℚ∘",
            "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho sigma sigma tau phi"
            " phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega approx angle triangle"
            " infty cup cap ne pm mp emptyset in notin equiv parallel perp to Rightarrow sim cong propto"
            " setminus N Z Q circ".split(),
            strict=True,
        )
    }
)
_TABLE = str.maketrans(dict(_CHARACTERS))
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿˣ]+")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_ROOT = re.compile(r"([√∛])\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\)|\{[^{}]*\})")
_CIRCLED = re.compile("[①-⓿]")  # ① names a statement; it is not the number 1

_SPELLINGS = MappingProxyType(
    {
        **dict.fromkeys("dfrac tfrac cfrac".split(), "frac"),
        **dict.fromkeys("dbinom tbinom".split(), "binom"),
        **dict.fromkeys("leq leqslant".split(), "le"),
        **dict.fromkeys("geq geqslant".split(), "ge"),
        "neq": "ne",
        "varnothing": "emptyset",
        **dict.fromkeys("rarr longrightarrow".split(), "to"),
        **dict.fromkeys("implies Longrightarrow".split(), "Rightarrow"),
        **dict.fromkeys("backslash smallsetminus".split(), "setminus"),
        **dict.fromkeys("lbrace".split(), "{"),
        **dict.fromkeys("rbrace".split(), "}"),
        "vartheta": "theta",
        "varphi": "phi",
        "varepsilon": "epsilon",
        **dict.fromkeys("mid vert lvert rvert lVert rVert Vert".split(), "|"),
        **dict.fromkeys("ast star".split(), "cdot"),
        "operatorname*": "operatorname",
        "colon": ":",
        "lbrack": "[",
        "rbrack": "]",
        "degree": "°",
        "percent": "%",
        "land": "wedge",
        "lor": "vee",
        "reals": "R",
        "triangleq": "=",
        "euro": "€",
        "pounds": "£",
        "yen": "¥",
    }
)
_SIGNS = frozenset("{ } [ ] | : = ° % € £ ¥ $ < >".split())  # commands that are written as one character
_UPRIGHT = frozenset(
    "text textbf textit textrm textsf texttt textnormal textup textsc textmd emph mathrm mathnormal mbox hbox"
    " operatorname".split()
)
_WRAPPERS = _UPRIGHT | frozenset(
    "mathbf mathit mathsf mathtt mathcal boldsymbol bm pmb underline uline boxed fbox framebox"
    " ensuremath".split()
)
_DROPPED = frozenset(
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr large Large small tiny"
    " huge normalsize displaystyle textstyle scriptstyle limits nolimits bf it rm sf tt bfseries checkmark"
    " blacksquare square Box qed quad qquad nobreakspace nonumber noindent hline hfill hfil".split()
)
_DROPPED_WITH_ARGUMENT = frozenset(
    "color textcolor colorbox hspace vspace phantom hphantom label tag".split()
)
_NAMES = frozenset(  # spelled without a backslash
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln lg log exp sqrt pi infty theta alpha"
    " beta gamma delta lambda sigma omega phi".split()
)
_PLAIN_NAMES = MappingProxyType(
    {
        **{name: name for name in _NAMES},
        "infinity": "infty",
        "inf": "infty",
        "asin": "arcsin",
        "acos": "arccos",
    }
    | {"atan": "arctan", "oo": "infty", "cbrt": "cbrt", "abs": "abs"}
)
_OPERATORS = MappingProxyType(
    {
        "<=": "\\le",
        "=<": "\\le",
        ">=": "\\ge",
        "!=": "\\ne",
        "<>": "\\ne",
        "==": "=",
        "**": "^",
        "*": "\\cdot",
    }
    | {"+-": "\\pm", "+/-": "\\pm", "->": "\\to", "=>": "\\Rightarrow", "--": "-", "---": "-", "-": "-"}
    | {"\\lt": "<", "\\gt": ">", "\\not=": "\\ne", "\\times": "\\cdot", "\\div": "/", "\\slash": "/"}
)

_TOKEN = re.compile(
    r"(?P<space>(?:\s|~|\\[,;:! >]|\\(?=\s))+)"
    r"|(?P<number>(?:\d+(?:\.\d+|\.(?![\w.]))?|\.\d+)(?:[eE][+-]?\d+(?![\d.]))?)"
    r"|(?P<row>\\\\(?:\[[^\]]*\])?|\\newline(?![A-Za-z])|\\cr(?![A-Za-z]))"
    r"|(?P<delimiter>\\[()\[\]]|\\(?:left|right) ?\.)"
    r"|(?P<command>\\not\s*=|\\[A-Za-z]+\*?|\\[{}$%&#_|])"
    r"|(?P<word>[^\W\d_⺀-￿]+|[^\W\d_]+)"
    r"|(?P<operator>\+/-|---?|<=|=<|>=|!=|<>|==|\*\*|->|=>|\+-|\*)"
    r"|(?P<sign>.)",
    re.DOTALL,
)
_DEGREE = re.compile(r"(?:\{\})?\^ ?\{? ?\\circ(?![A-Za-z]) ?\}?|\{°\}")
_EXPLICIT_GROUP = re.compile(r"(?<=\d)(?:\{,\}|,(?=\\!))(?:\\!|\s)*(?=\d{3}(?!\d))")
_DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar|dot) ?\{?(\d{1,30})\}?")


def plain_unicode(text: str) -> str:
    """Rewrite Unicode characters as LaTeX or ASCII; compatibility forms (NFKC) become the plain ones."""
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = _SUBSCRIPT.sub(lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = _VULGAR.sub(_spell_fraction, text)
    parts = re.split(f"({_CIRCLED.pattern})", text.translate(_TABLE))
    parts[::2] = [unicodedata.normalize("NFKC", part).translate(_TABLE) for part in parts[::2]]
    text = "".join(
        c for c in "".join(parts) if unicodedata.category(c) != "Cf"
    )  # zero-width and direction marks
    return _ROOT.sub(_spell_root, text)


def _spell_fraction(match: re.Match[str]) -> str:
    over, under = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return f"\\frac{{{over}}}{{{under}}}"


def _spell_root(match: re.Match[str]) -> str:
    inside = match[2][1:-1] if match[2][0] in "({" else match[2]
    return f"\\sqrt{{{inside}}}" if match[1] == "√" else f"\\sqrt[3]{{{inside}}}"


def _spell_repeating(match: re.Match[str]) -> str:
    r"""Write a repeating decimal as a fraction: 0.1\overline{6} is (16 - 1)/90."""
    whole, once, period = match[1] or "0", match[2], match[3]
    if len(match[0]) > 60:
        return match[0]
    over = int(whole + once + period) - int(whole + once)
    return f"\\frac{{{over}}}{{{'9' * len(period)}{'0' * len(once)}}}"


def tokenise(text: str) -> tuple[Token, ...]:
    """Split an answer into at most `MAX_TOKENS` + 1 tokens."""
    text = plain_unicode(
        text.replace("\x0crac", "\\frac")
    )  # a data set's "\frac" read as a form feed and "rac"
    text = _REPEATING.sub(_spell_repeating, _DEGREE.sub("°", text))
    text = _DECIMAL_COMMA.sub(".", _EXPLICIT_GROUP.sub("", text))
    tokens = _without_decoration(_spell(text))
    return tuple(_join_digit_groups(tokens))


def _spell(text: str) -> list[Token]:
    """Cut the text into tokens in their one spelling, with spaces as gaps."""
    money = text.replace("\\$", "").count("$") == 1
    tokens: list[Token] = []
    gap = False
    for match in _TOKEN.finditer(text):
        kind, piece = str(match.lastgroup), match[0]
        if kind == "space":
            gap = gap or piece != "\\!"
            continue
        if kind == "number":
            piece = piece.removesuffix(".")
        elif kind == "command":
            piece = _spell_command(piece)
            kind = "command" if piece.startswith("\\") else "sign"
        elif kind == "operator" or piece in _OPERATORS:
            piece = _OPERATORS[piece]
            kind = "command" if piece.startswith("\\") else "sign"
        elif kind == "word" and piece.lower() in _PLAIN_NAMES and (piece.islower() or len(piece) > 3):
            kind, piece = "command", "\\" + _PLAIN_NAMES[piece.lower()]
        elif kind == "delimiter" or (kind == "sign" and (piece in "\0`" or (piece == "$" and not money))):
            continue
        tokens.append(Token(kind, piece, gap))
        gap = False
        if len(tokens) > MAX_TOKENS:
            break
    return tokens


def _spell_command(piece: str) -> str:
    name = piece[1:].rstrip("*") if len(piece) > 2 else piece[1:]
    name = "not=" if name.startswith("not") and name.endswith("=") else name
    name = _SPELLINGS.get(name, name)
    if name in ("{", "}"):
        return "\\" + name
    return name if name in _SIGNS else _OPERATORS.get("\\" + name, "\\" + name)


def _without_decoration(tokens: Tokens) -> list[Token]:
    r"""Drop sizes, colours and wrappers; words in `\text{}` and the like become upright."""
    kept: list[Token] = []
    braces: list[str] = []  # for each open brace: "{", or the wrapper that it belongs to
    position, gap = 0, False
    while position < len(tokens):
        token = tokens[position]
        position += 1
        name = token.text[1:] if token.kind == "command" else ""
        opens = position < len(tokens) and tokens[position].text == "{"
        if name in _DROPPED:
            gap = gap or token.gap
        elif name in _DROPPED_WITH_ARGUMENT and opens:
            position = _end_of_group(tokens, position)
        elif name == "mathbb" and opens and position + 2 < len(tokens):
            kept.append(Token("command", "\\" + tokens[position + 1].text, token.gap))
            position += 3
        elif name in _WRAPPERS and opens:
            braces.append(name)
            position += 1
            gap = gap or token.gap or name.startswith("text")
        elif name in _WRAPPERS or (token.text == "}" and braces and braces.pop() != "{"):
            gap = gap or token.gap
        else:
            if token.text == "{":
                braces.append("{")
            upright = any(brace in _UPRIGHT for brace in braces)
            kept.append(token._replace(gap=(gap or token.gap) and bool(kept), upright=upright))
            gap = False
    return kept


def _end_of_group(tokens: Tokens, start: int) -> int:
    """The position after the brace that closes the group which opens at `start`."""
    depth = 0
    for position in range(start, len(tokens)):
        depth += {"{": 1, "}": -1}.get(tokens[position].text, 0)
        if depth == 0:
            return position + 1
    return len(tokens)


def _join_digit_groups(tokens: list[Token]) -> Iterator[Token]:
    """Join `1,000` and `1 000` to one number; `(100,200)` stays two numbers."""
    spaced = _levels_with_spaced_commas(tokens)
    depth: list[int] = [0]
    brackets, position = 0, 0
    while position < len(tokens):
        token = tokens[position]
        if token.text in ("(", "[", "\\{"):
            brackets += 1
            depth.append(brackets)
        elif token.text in (")", "]", "\\}") and len(depth) > 1:
            depth.pop()
        end = _end_of_digit_groups(tokens, position, commas=len(depth) == 1 or depth[-1] in spaced)
        if end > position + 1:
            digits = "".join(t.text for t in tokens[position:end] if t.kind == "number")
            token = token._replace(text=digits)
        yield token
        position = end


def _levels_with_spaced_commas(tokens: Tokens) -> set[int]:
    """The bracket pairs, by number, in which a comma with a space separates: `(1,000, 2,000)`."""
    levels: set[int] = set()
    stack, brackets = [0], 0
    for token, after in pairwise(tokens):
        if token.text in ("(", "[", "\\{"):
            brackets += 1
            stack.append(brackets)
        elif token.text in (")", "]", "\\}") and len(stack) > 1:
            stack.pop()
        elif token.text == "," and after.gap:
            levels.add(stack[-1])
    return levels


def _end_of_digit_groups(tokens: Tokens, start: int, *, commas: bool) -> int:
    """The position after a number written in groups of three digits that starts at `start`."""
    first, before = tokens[start], tokens[start - 1] if start else Token("sign", "")
    if first.kind != "number" or not (first.text.isdigit() and len(first.text) <= 3):
        return start + 1
    if (before.text == "," and not first.gap) or (before.kind == "number" and first.gap):
        return start + 1
    by_comma = start + 1
    while commas and by_comma + 1 < len(tokens) and tokens[by_comma][1:3] == (",", False):
        group = tokens[by_comma + 1]
        if group.gap or not _is_digit_group(group):
            break
        by_comma += 2
    by_space = start + 1
    while by_space < len(tokens) and tokens[by_space].gap and _is_digit_group(tokens[by_space]):
        by_space += 1
    follows = tokens[by_space].text if by_space < len(tokens) else ""
    if by_space > start + 1 and follows not in ("/", "\\frac") and tokens[by_space - 1].kind == "number":
        return by_space
    return by_comma


def _is_digit_group(token: Token) -> bool:
    whole, _, decimals = token.text.partition(".")
    return (
        token.kind == "number"
        and len(whole) == 3
        and whole.isdigit()
        and (not decimals or decimals.isdigit())
    )


def latex(tokens: Tokens, *, gaps: bool = False) -> str:
    """Write tokens as LaTeX again, in their one spelling; equal text means an equal answer.

    Spaces stand only where letters or digits would meet, or with `gaps` wherever they stood.
    """
    pieces: list[str] = []
    for token in tokens:
        words = token.kind in ("word", "number") and token.gap and pieces and pieces[-1][-1:].isalnum()
        after_command = (
            pieces and pieces[-1][:1] == "\\" and pieces[-1][-1:].isalpha() and token.text[:1].isalpha()
        )
        space = words or after_command or (gaps and token.gap and pieces)
        pieces.append((" " if space else "") + ("\\\\" if token.kind == "row" else token.text))
    return "".join(pieces)


def spoken(tokens: Tokens) -> str:
    """The tokens as plain text: words apart, no braces, `*` for products."""
    text = "".join(
        (" " if token.gap else "") + token.text.replace("\\cdot", "*").replace("\\", "")
        for token in tokens
        if token.text not in ("{", "}")
    )
    return text.strip()


def steps(tokens: Tokens) -> Iterator[int]:
    """The depth of brackets after each token."""
    depth = 0
    for token in tokens:
        depth += (token.text in OPENING) - (token.text in CLOSING)
        yield depth


def depth_of(tokens: Tokens) -> int:
    """The depth of the deepest bracket."""
    return max(steps(tokens), default=0)


def enclosed(tokens: Tokens) -> bool:
    """Whether the first token is a bracket that the last one closes."""
    if len(tokens) < 2 or tokens[0].text not in OPENING or tokens[-1].text not in CLOSING:
        return False
    depths = list(steps(tokens))
    return depths[-1] == 0 and 0 not in depths[:-1]


def split(tokens: Tokens, separators: frozenset[str]) -> tuple[list[Tokens], list[str]]:
    """Cut at separators outside brackets; the parts, and the separators between them."""
    parts: list[Tokens] = []
    found: list[str] = []
    start = 0
    for position, (token, depth) in enumerate(zip(tokens, steps(tokens), strict=True)):
        if depth == 0 and token.text in separators:
            parts.append(tokens[start:position])
            found.append(token.text)
            start = position + 1
    return [*parts, tokens[start:]], found
