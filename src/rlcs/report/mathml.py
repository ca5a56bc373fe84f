r"""Draws the LaTeX in texts of models and data as MathML, which browsers show without scripts or fonts.

The texts are untrusted. A formula is converted to elements; only the elements, attributes and values in
the lists below are written, and all text is escaped. What cannot be converted stays as it was written.
"""

import re
from html import unescape
from itertools import accumulate
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_LONGEST = 1500
"""Characters of a formula that is converted; a longer one stays text."""
_DEEPEST = 50
"""Braces within each other in it: the library calls itself for each."""
_ELEMENTS = frozenset(
    "math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover "
    "mmultiscripts mprescripts mtable mtr mtd mstyle mpadded mphantom".split()
)
_CHILDREN = {
    "mfrac": 2,
    "mroot": 2,
    "msub": 2,
    "msup": 2,
    "munder": 2,
    "mover": 2,
    "msubsup": 3,
    "munderover": 3,
}
_ATTRIBUTES = {
    **dict.fromkeys(
        ("stretchy", "fence", "separator", "largeop", "movablelimits", "symmetric", "accent"),
        re.compile("true|false"),
    ),
    "form": re.compile("prefix|infix|postfix"),
    "displaystyle": re.compile("true|false"),
    "scriptlevel": re.compile(r"[+-]?\d"),
    "mathvariant": re.compile("normal"),
    "linethickness": re.compile("0|0px|0pt"),
    "width": re.compile(r"-?[0-3](\.\d{1,4})?em"),
    "minsize": re.compile(r"[0-4](\.\d{1,4})?em"),
    "maxsize": re.compile(r"[0-4](\.\d{1,4})?em"),
}
"""The attributes that are written, each with its values: none of them can load, hide or cover anything."""
_STRUTS = {
    "thinmathspace": "0.167em", "mediummathspace": "0.222em", "thickmathspace": "0.278em",
    "negativethinmathspace": "-0.167em",
}  # fmt: skip
_LINES, _BARS = {"mover": "over", "munder": "under"}, "―‾¯_"

_MATH = re.compile(
    r"(?<![\\$])\$\$(?P<display>[^$]+?)\$\$(?!\$)"
    r"|\\\[(?P<bracket>.+?)\\\]"
    r"|\\\((?P<paren>.+?)\\\)"
    r"|(?<!\\)\\begin\{(?P<name>align|aligned|equation|gather|cases|array|[pbv]?matrix)(?P<star>\*?)\}.+?"
    r"\\end\{(?P=name)(?P=star)\}"
    r"|(?<![\\$\w])\$(?P<inline>(?=\S)(?:[^$\\\n]|\\[^\n]){1,300}?(?<=\S))\$(?![\d$])"
    r"|(?<!\\)\\boxed\s*(?=\{)",
    re.S,
)
_PROSE = re.compile(r"[A-Za-z]{3,} +[A-Za-z]{3,}")
_IN_WORDS = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm|operatorname)\s*\{[^{}]*\}")
_LATEX = re.compile(r"\\[A-Za-z%$,;! {}]|\^|(?<![A-Za-z])[A-Za-z]_")
_MACROS = re.compile(r"\\(?:re)?newcommand|\\def|\\let|\\require")


def with_formulas(text: str) -> Markup:
    r"""A text with the formulas between `$`, `\(`, `\[` and in `\boxed{}` drawn, and the rest escaped."""
    found, end = Markup(), 0
    for match in _MATH.finditer(text):
        if match.start() < end:
            continue  # inside of a box
        stop = match.end()
        if match[0].startswith("\\boxed"):
            stop = _closing(text, stop)
            drawn = _box(text[match.end() + 1 : stop - 1]) if stop else None
        else:
            drawn = _drawn(match)
        if drawn is not None:
            alone = drawn.startswith('<math display="block"')  # on a line of its own: no empty ones around it
            before = text[end : match.start()]
            found += escape(before.removesuffix("\n") if alone else before) + drawn
            end = stop + (alone and text[stop : stop + 1] == "\n")
    return found + escape(text[end:])


def answer_with_formulas(text: str) -> Markup:
    r"""A short answer: all of it is a formula when it is LaTeX without any delimiters (`\frac{3}{4}`)."""
    if _MATH.search(text) is None and _LATEX.search(text) and "\n" not in text:
        return formula(text) or escape(text)
    return with_formulas(text)


def formula(latex: str, *, display: bool = False) -> Markup | None:
    """A formula as a MathML element; None where it cannot be converted."""
    from latex2mathml.converter import Converter

    if len(latex) > _LONGEST or _deepest(latex) > _DEEPEST or _MACROS.search(latex):
        return None
    try:
        written = _written(Converter().convert_to_element(latex.strip().replace("\\dfrac", "\\frac")))
    except Exception:  # the library raises many types, RecursionError and IndexError among them
        return None
    # An unknown command comes back as its name.
    return None if ">\\" in written else Markup("<math{}>{}</math>").format(
        Markup(' display="block"' if display else ""), Markup(written)  # noqa: S704 - escaped below
    )  # fmt: skip


def _deepest(latex: str) -> int:
    """The most braces that are open in one place."""
    return max(accumulate(1 if sign == "{" else -1 for sign in latex if sign in "{}"), default=0)


def _drawn(match: re.Match[str]) -> Markup | None:
    inline = match["inline"] or match["paren"]
    if match["inline"] and _PROSE.search(_IN_WORDS.sub("", match["inline"])):
        return None  # "$5 for one and $7"
    if inline is not None:
        return formula(inline)
    return formula(match["display"] or match["bracket"] or match[0], display=True)


def _box(inside: str) -> Markup | None:
    """The content of a box outside of a formula: a formula, or words; None where there is a box in it."""
    if "\\boxed" in inside:
        return None
    content = answer_with_formulas(inside)
    return Markup('<span class="boxed">{}</span>').format(content)


def _closing(text: str, start: int) -> int:
    """The index after the brace that closes the one at `start`; 0 without one, or where it is too far."""
    depth = 0
    for at in range(start, min(len(text), start + _LONGEST)):
        depth += {"{": 1, "}": -1}.get(text[at], 0) if text[at - 1] != "\\" else 0
        if depth == 0:
            return at + 1
    return 0


def _written(element: "Element") -> str:
    """The content of an element, and the element itself where it is not the root, as text of a page."""
    inside = escape(unescape(element.text or "")) + Markup("").join(
        Markup(_written(child)) + escape(unescape(child.tail or ""))  # noqa: S704 - escaped in the call
        for child in element
    )
    tag = element.tag
    if tag == "math":
        return str(inside)
    if tag == "menclose":  # browsers do not draw it: the style sheet does
        notation = element.get("notation", "")
        kind = "boxed" if notation == "box" else "struck" if "strike" in notation else "plain"
        return f'<mrow class="{kind}">{inside}</mrow>'
    if tag not in _ELEMENTS:
        return f"<mrow>{inside}</mrow>"
    if len(element) != _CHILDREN.get(tag, len(element)):
        raise ValueError(tag)
    side = element.get("columnalign")
    if tag == "mtd" and side in ("left", "right"):
        return f'<mtd class="{side}">{inside}</mtd>'
    line = _LINES.get(tag, "")
    if line and len(element) == 2 and unescape(element[1].text or "") in _BARS:  # fonts do not stretch it
        return f'<mrow class="{line}">{_written(element[0])}</mrow>'
    values = {name: _STRUTS.get(value, value) for name, value in element.attrib.items()}
    kept = "".join(
        f' {name}="{value}"'
        for name, value in values.items()
        if name in _ATTRIBUTES and _ATTRIBUTES[name].fullmatch(value)
    )
    return f"<{tag}{kept}>{inside}</{tag}>"
