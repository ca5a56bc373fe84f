r"""Splits an answer into tokens: LaTeX, plain notation and Unicode become one spelling.

`\dfrac`, `½`, `√3`, `sqrt(3)`, `x²`, `≤`, `<=`, `\leqslant`, `pi`, `2*x` and `\text{cm}` all arrive at the
grammar (`reading`) as the same tokens as `\frac`, `\sqrt`, `^`, `\le`, `\pi`, `\cdot`, an upright word `cm`.
Nothing is computed here but repeating decimals, and no part of the text is lost but decoration: dollar signs
around formulas, sizes, colours, spaces, a full stop at the end.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
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
"""An answer of more tokens is text."""

OPENING = frozenset(["(", "[", "{", "\\{", "\\lfloor", "\\lceil", "\\langle", "\\begin"])
CLOSING = frozenset([")", "]", "}", "\\}", "\\rfloor", "\\rceil", "\\rangle", "\\end"])
_BRACKETS = OPENING | CLOSING


def _table(lines: str) -> dict[str, str]:
    """What each spelling becomes; a line begins with the one spelling, then come the others."""
    rows = map(str.split, lines.splitlines())
    return {other: row[0] for row in rows for other in row[1:]}


_SPELLINGS = MappingProxyType(
    _table(r"""
    - − – — ‒ ― ‐ ‑ ﹣ － -- ---
    \cdot · ⋅ ∙ • × ✕ ⨯ \times \ast \star *
    / ÷ ⁄ ∕ \div \slash
    ^ **
    = == \triangleq
    < \lt
    > \gt
    \le ≤ ⩽ ≦ \leq \leqslant <= =<
    \ge ≥ ⩾ ≧ \geq \geqslant >=
    \ne ≠ \neq \not= != <>
    \pm ± +- +/-
    \to → -> \rarr \rightarrow \longrightarrow
    \Rightarrow ⇒ => \implies \Longrightarrow
    \setminus ∖ \backslash \smallsetminus
    \wedge \land
    \vee \lor
    \text{~or~} 或
    \text{~and~} 和 且 与
    \frac \dfrac \tfrac \cfrac
    \binom \dbinom \tbinom
    \operatorname \operatorname*
    \hspace \hspace*
    \{ \lbrace
    \} \rbrace
    [ \lbrack
    ] \rbrack
    | \mid \vert \lvert \rvert \lVert \rVert \Vert \|
    : ： ∶ ꞉ \colon
    , ， 、
    . 。 ．
    ' “ ” „ ‘ ’ ′
    \\ \newline \cr
    ° º ˚ \degree
    °C ℃
    °F ℉
    % \% \percent
    $ \$
    € \euro
    £ \pounds
    ¥ ￥ \yen
    \emptyset ∅ \varnothing
    \R ℝ \reals
    \mu µ
    \ldots …
    \theta \vartheta
    \phi \varphi
    \epsilon \varepsilon
    \infty ∞ infinity inf oo
    \arcsin asin
    \arccos acos
    \arctan atan
    \cbrt cbrt
    \abs abs
    """)
    | {  # names without a backslash
        name: f"\\{name}"
        for name in "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln lg log exp sqrt pi infty"
        " theta alpha beta gamma delta lambda sigma omega phi".split()
    }
    | {
        character: f"\\{name}"
        for character, name in zip(
            "αβγδεζηθκλμνξπρσςτφϕχψωΓΔΘΛΞΠΣΦΨΩ≈∠△∪∩∓∈∉≡∥⊥∼≅∝ℕℤℚ∘",
            "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho sigma sigma tau phi"
            " phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega approx angle triangle cup"
            " cap mp in notin equiv parallel perp sim cong propto N Z Q circ".split(),
            strict=True,
        )
    }
)
_CHARACTERS = MappingProxyType(
    {
        ord(character): f"{spelling} " if spelling[0] == "\\" else spelling
        for character, spelling in _SPELLINGS.items()
        if not character.isascii()
    }
)
_SCRIPT = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿˣ]+)|[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_ROOT = re.compile(r"([√∛])\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\)|\{[^{}]*\})")
_NOT_CIRCLED = re.compile("[^①-⓿]+")  # ① names a statement; it is not the number 1
_UPRIGHT = frozenset(
    "text textbf textit textrm textsf texttt textnormal textup textsc textmd emph mathrm mathnormal mbox hbox"
    " operatorname".split()
)
_WRAPPERS = _UPRIGHT | frozenset(
    "mathbf mathit mathsf mathtt mathcal boldsymbol bm pmb underline uline boxed fbox framebox"
    " ensuremath mathbin mathrel mathop".split()
)
_DROPPED = frozenset(
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr large Large small tiny"
    " huge normalsize displaystyle textstyle scriptstyle limits nolimits bf it rm sf tt bfseries checkmark"
    " blacksquare square Box qed quad qquad nobreakspace nonumber noindent hline hfill hfil".split()
)
_DROPPED_WITH_ARGUMENT = frozenset(
    "color textcolor colorbox hspace vspace phantom hphantom label tag".split()
)
_DECORATION = _DROPPED | _DROPPED_WITH_ARGUMENT | _WRAPPERS | {"mathbb"}
"""Commands for which tokens are looked at one by one."""
_TOKEN = re.compile(
    r"(?P<space>(?:\s|~|\\[,;:! >]|\\(?=\s))+)"
    r"|(?P<number>(?:\d+(?:\.\d+|\.(?![\w.]))?|\.\d+)(?:[eE][+-]?\d+(?![\d.]))?)"
    r"|(?P<row>\\\\(?:\[[^\]]*\])?)"
    r"|(?P<dropped>\\[()\[\]]|\\(?:left|right) ?\.|`)"
    r"|(?P<command>\\not\s*=|\\(?:operatorname|hspace)\*|\\[A-Za-z]+|\\[{}$%&#_|])"
    r"|(?P<word>[^\W\d_⺀-￿]+|(?:(?=[⺀-￿])[^\W\d_])+|[^\W\d_]+)"
    r"|(?P<sign>\+/-|---?|<=|=<|>=|(?<!\d)!=|<>|==|\*\*|->|=>|\+-|.)",
    re.DOTALL,
)
_DEGREE = re.compile(r"(?:\{\})?\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))|\{°\}")
_EXPLICIT_GROUP = re.compile(r"(?<=\d)(?:\{,\}|,(?=\\!))(?:\\!|\s)*(?=\d{3}(?!\d))")
_BRACKET = re.compile(r"((?<!\\)[()\[\]]|\\[{}])")
_SPACE = r"(?:\s|~|\\[,;: ])"
_BY_SPACES = re.compile(
    rf"(?<![\d.,])(?<!\d\s)\d{{1,3}}(?:{_SPACE}+\d{{3}})+(?!\d|\s*/|\s*\\frac)"
)  # a fraction after it makes a mixed number
_BY_COMMAS = re.compile(r"(?<![\d.,])(?<!\d\s)\d{1,3}(?:,\d{3})+(?!,?\d)")
_DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")
_EMPTY_OR_SIGN = re.compile(r"(?<![\\}])\{\s*([-+=:]?)\s*\}")
_STARRED = re.compile(r"(\\(?:begin|end)\s*\{[A-Za-z]+)\*")
_CIRCLED = re.compile(r"\\textcircled\s*\{?([1-9])\}?")
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar|dot) ?\{?(\d{1,30})\}?")


@lru_cache(maxsize=4096)
def tokenise(text: str) -> tuple[Token, ...]:
    """Split an answer into at most `MAX_TOKENS` + 1 tokens. Equal texts give the same from a cache."""
    text = text.replace("\x0crac", "\\frac")  # some data sets have the escape \f (form feed) and "rac"
    text = text if text.isascii() else _without_unicode(text)
    if "{" in text or "\\" in text:  # without either the text has nothing that these would change
        text = _DEGREE.sub("°", text)
        text = _CIRCLED.sub(lambda m: chr(ord("①") - 1 + int(m[1])), _STARRED.sub(r"\1", text))
        text = _REPEATING.sub(_spell_repeating, text)
    if "," in text:
        text = _EXPLICIT_GROUP.sub("", text)
    text = _DECIMAL_COMMA.sub(".", _join_digit_groups(text))
    return tuple(_without_decoration(_spell(_EMPTY_OR_SIGN.sub(r"\1", text))))


def _without_unicode(text: str) -> str:
    """Rewrite characters as LaTeX or ASCII; compatibility forms (NFKC) become the plain ones."""
    plain = partial(unicodedata.normalize, "NFKC")
    text = _SCRIPT.sub(lambda m: f"{'^' if m[1] else '_'}{{{plain(m[0])}}}", text)
    text = _VULGAR.sub(lambda m: "\\frac{{{}}}{{{}}}".format(*plain(m[0]).split("\u2044")), text)
    text = _NOT_CIRCLED.sub(lambda m: plain(m[0]), text.translate(_CHARACTERS)).translate(_CHARACTERS)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")  # zero-width and direction marks
    return _ROOT.sub(_spell_root, text)


def _spell_root(match: re.Match[str]) -> str:
    inside = match[2][1:-1] if match[2][0] in "({" else match[2]
    return f"\\sqrt{'' if match[1] == '√' else '[3]'}{{{inside}}}"


def _spell_repeating(match: re.Match[str]) -> str:
    r"""Write a repeating decimal as a fraction: 0.1\overline{6} is (16 - 1)/90."""
    whole, once, period = match[1] or "0", match[2], match[3]
    if len(match[0]) > 60:
        return match[0]
    over = int(whole + once + period) - int(whole + once)
    return f"\\frac{{{over}}}{{{'9' * len(period)}{'0' * len(once)}}}"


def _join_digit_groups(text: str) -> str:
    r"""Write `1,000` and `1\,000` as one number.

    In brackets a comma alone separates, `(100,200)`, unless others have a space after them: `(1,000, 2,000)`.
    """
    text = _BY_SPACES.sub(_only_digits, text)
    if "," not in text:
        return text
    pieces, depth = _BRACKET.split(text), 0
    for index, piece in enumerate(pieces):
        depth = max(0, depth + (piece in OPENING) - (piece in CLOSING))
        if depth == 0 or re.search(f",{_SPACE}", piece):
            pieces[index] = _BY_COMMAS.sub(_only_digits, piece)
    return "".join(pieces)


def _only_digits(match: re.Match[str]) -> str:
    return re.sub(r"\D", "", match[0])


def _spell(text: str) -> list[Token]:
    """Cut the text into tokens in their one spelling, with spaces as gaps."""
    money = text.replace("\\$", "").count("$") == 1  # two dollar signs enclose a formula
    tokens: list[Token] = []
    gap = False
    for match in _TOKEN.finditer(text):
        kind, piece = str(match.lastgroup), match[0]
        if kind == "space":
            gap = gap or piece != "\\!"
        if kind in ("space", "dropped") or (piece == "$" and not money):
            continue
        if kind == "number":
            piece = piece.removesuffix(".")
        elif kind != "word":
            piece = "\\\\" if kind == "row" else "".join(piece.split())
        key = piece.lower() if kind == "word" and len(piece) > 3 else piece
        piece = _SPELLINGS.get(key, piece)
        if piece[0] == "\\" != piece:
            kind = "command"
        elif kind not in ("number", "word"):
            kind = "sign"
        tokens.append(Token(kind, piece, gap))
        gap = False
        if len(tokens) > MAX_TOKENS:
            break
    return tokens


def _without_decoration(tokens: Tokens) -> list[Token]:
    r"""Drop sizes, colours and wrappers; words in `\text{}` and the like become upright."""
    if not any(token.kind == "command" and token.text[1:] in _DECORATION for token in tokens):
        return [token._replace(gap=False) if token.gap else token for token in tokens[:1]] + list(tokens[1:])
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
            position = end_of_group(tokens, position)
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


def end_of_group(tokens: Tokens, start: int) -> int:
    """The position after the brace that closes the group opened at `start`; past the end if none does."""
    depth = 0
    for position in range(start, len(tokens)):
        depth += {"{": 1, "}": -1}.get(tokens[position].text, 0)
        if depth == 0:
            return position + 1
    return len(tokens) + 1


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
        pieces.append((" " if space else "") + token.text)
    return re.sub(r"([\^_])\{(\w)\}(?!\w)", r"\1\2", "".join(pieces))


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
        if token.text in _BRACKETS:
            depth += 1 if token.text in OPENING else -1
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
    if separators.isdisjoint([token.text for token in tokens]):
        return [tokens[:]], []
    parts: list[Tokens] = []
    found: list[str] = []
    start = 0
    for position, (token, depth) in enumerate(zip(tokens, steps(tokens), strict=True)):
        if depth == 0 and token.text in separators:
            parts.append(tokens[start:position])
            found.append(token.text)
            start = position + 1
    return [*parts, tokens[start:]], found
