r"""Normalises the spelling of answers: variants of Unicode and LaTeX become the same text.

Values are not computed here. `normalise` returns plain LaTeX-like text in which a degree sign is `°`, a
minus is `-`, `\dfrac` is `\frac`, and wrappers such as `\text{}`, `\left`, `$` and `\boxed{}` are removed;
spaces between words and digits are kept.
"""

import re
import unicodedata

_CHARACTERS = "αβγδθλμπρσφωΔΩ≈∠△∞∪∩≤≥≠±∅∈"
_COMMANDS = """
alpha beta gamma delta theta lambda mu pi rho sigma phi omega Delta Omega
approx angle triangle infty cup cap le ge ne pm emptyset in
"""
_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("−–—‒―‐‑﹣－", "-"),
        **dict.fromkeys("×✕⨯", "\\times "),
        **dict.fromkeys("·⋅∙", "\\cdot "),
        **dict.fromkeys("°º˚", "°"),
        **dict.fromkeys("“”„", '"'),
        **dict.fromkeys("‘’′", "'"),
        **dict.fromkeys("€£¥", ""),
        **dict.fromkeys("÷\u2044", "/"),
        **{character: f"\\{name} " for character, name in zip(_CHARACTERS, _COMMANDS.split(), strict=True)},
    }
)
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_ROOT = re.compile(r"([√∛])\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\)|\{[^{}]*\})")

_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|bigl|bigr|Bigl|Bigr|big|Big|bf|it|rm|sf|tt|!)(?![A-Za-z])|\\\$|\$"
    r"|\\[()\[\]]|\\checkmark|\0"
)
_SPACES = re.compile(r"\\[,;:> ]|\\q?quad(?![A-Za-z])|~")
_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|mathrm|mathbf|mathit|mathsf|mbox|operatorname|boldsymbol|bm)"
    r"\s*\{([^{}]*)\}"
)
_DEGREE = re.compile(r"(?:\{\})?\^ ?\{? ?\\circ(?![A-Za-z]) ?\}?|\\degree(?![A-Za-z])|\{°\}")
_LONG_NAMES = re.compile(r"\\([gln]e)q(?:slant)?(?![A-Za-z])")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot) ?\{?(\d+)\}?")
_GROUPED = re.compile(r"(?<![\w.] )\b\d{1,3}(?: \d{3})+\b(?! ?[/\d\\.])")
_GROUP = re.compile(r"^\{ ?([^{},]*?) ?\}$")
_PLAIN = re.compile(r"[^\\${}~\0]*")
_BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")  # three levels deep


def normalise(text: str) -> str:
    """Rewrite an answer in its plainest spelling; takes time linear in the length of `text`."""
    text = text.replace("\x0crac", "\\frac")  # a data set's "\frac" read as a form feed and "rac"
    if not text.isascii():
        text = _plain_unicode(text)
    text = _stripped(" ".join(text.split()))
    if not _PLAIN.fullmatch(text):
        text = " ".join(_plain_latex(text).split())
    return _stripped(_GROUPED.sub(lambda m: m[0].replace(" ", ""), text))


def repair_gold(text: str) -> str:
    """Repair published gold answers in which a degree sign has become the character U+63B3."""
    return re.sub(r"(?<=\d)\s*掳", "°", text)


def compact(text: str) -> str:
    r"""Remove redundant spaces and braces around one character from normalised text.

    A space between two words or two numbers stays: "1 2" is not "12".
    """
    text = re.sub(r"(?<=\d) (?=[A-Za-z])|(?<!\w) | (?!\w)", "", text)
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)


def peel(text: str) -> str:
    """Remove all but one of the bracket pairs that enclose the whole text: `(((5)))` becomes `(5)`."""
    lead = len(text) - len(text.lstrip("("))
    if lead < 2 or not text.endswith("))"):
        return text
    partner: dict[int, int] = {}
    stack: list[int] = []
    for position, char in enumerate(text):
        if char == "(":
            stack.append(position)
        elif char == ")" and stack:
            partner[stack.pop()] = position
    pairs = 0
    while pairs < lead and partner.get(pairs) == len(text) - 1 - pairs:
        pairs += 1
    return text[pairs - 1 : len(text) - pairs + 1] if pairs > 1 else text


def _stripped(text: str) -> str:
    """Remove quotes and markdown stars around the text, and punctuation at its end."""
    text = text.strip("*`\"' ")
    while text.endswith((".", ",", ";")):
        text = text[:-1].rstrip("*`\"' ")
    return text


def _plain_unicode(text: str) -> str:
    text = _SUPERSCRIPT.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = _SUBSCRIPT.sub(lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = _VULGAR.sub(_spell_fraction, text)
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOLS)).translate(_SYMBOLS)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")  # zero-width and direction marks
    return _ROOT.sub(_spell_root, text)


def _spell_fraction(match: re.Match[str]) -> str:
    over, under = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return f"\\frac{{{over}}}{{{under}}}"


def _spell_root(match: re.Match[str]) -> str:
    inside = match[2][1:-1] if match[2][0] in "({" else match[2]
    return f"\\sqrt{{{inside}}}" if match[1] == "√" else f"\\sqrt[3]{{{inside}}}"


def _plain_latex(text: str) -> str:
    text = _DROPPED.sub("", _SPACES.sub(" ", text)).strip()
    while box := _BOX.fullmatch(text):
        text = box[1].strip()
    for _ in range(4):  # \textbf{\text{B}}
        text, changed = _WRAPPER.subn(r" \1 ", text)
        if not changed:
            break
    text = _GROUP.sub(r"\1", text.strip())
    text = _LONG_NAMES.sub(r"\\\1", _FRACTION.sub(r"\\frac", text))
    text = _REPEATING.sub(_spell_repeating, text.replace("\\varnothing", "\\emptyset"))
    return _DEGREE.sub("°", text).replace("\\%", "%").replace("{,}", ",")


def _spell_repeating(match: re.Match[str]) -> str:
    r"""Write a repeating decimal as a fraction: 0.1\overline{6} is (16 - 1)/90."""
    whole, once, period = match[1] or "0", match[2], match[3]
    if len(match[0]) > 40:
        return match[0]
    over = int(whole + once + period) - int(whole + once)
    return f"\\frac{{{over}}}{{{'9' * len(period)}{'0' * len(once)}}}"
