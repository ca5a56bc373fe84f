"""Splits units from the end of answers: `5 cm` is the value 5 with the unit cm.

Either answer may lack its unit; different units never agree (5 m is not 5 cm), and units are not
converted.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

_NAMES = """
mm millimeter millimetre, cm centimeter centimetre, dm decimeter decimetre, m meter metre,
km kilometer kilometre, in inch inches, ft foot feet, yd yard, mi mile,
mg milligram, g gram, kg kilogram, lb pound lbs, oz ounce,
ml milliliter millilitre, l liter litre,
s sec second, min minute, h hr hour, day, week, month, year yr,
degree deg ° °t, radian rad,
°c c celsius, °f fahrenheit,
mph, n newton, j joule, w watt, v volt, a ampere amp, pa pascal, hz hertz, k kelvin,
cent, dollar, unit
"""
"""The names of each unit, the short one first; every name may end in a plural s."""


def _short_names() -> dict[str, str]:
    units = [names.split() for names in _NAMES.split(",")]
    return {name + plural: names[0] for names in units for name in names for plural in ("", "s")}


_UNITS: Mapping[str, str] = MappingProxyType(_short_names())
_NOT_UNITS = frozenset(
    "and but not nor per plus minus times over none except without about "
    "half dozen hundred thousand million billion trillion "
    "sin cos tan cot sec log max gcd lcm mod".split()
)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_IN_BRACKETS = re.compile(r"(?<=\d) ?\(([A-Za-z]+)\)$")
_POWER = re.compile(r"\^ ?\{?([23])\}?$")
_COMMAND = re.compile(r"[A-Za-z]+")


def split_unit(text: str) -> tuple[str, str]:
    r"""Split text into the value and the unit's short name, or into the text and "".

    `\%` and "percent" are not units: "percent" becomes a trailing `%`.
    """
    if (apart := _IN_BRACKETS.search(text)) and apart[1].lower() in _UNITS:
        text = text[: apart.start()] + " " + apart[1]
    body, power = text, ""
    if (match := _POWER.search(body)) and body[: match.start()].rstrip(" }")[-1:].isalpha():
        body, power = body[: match.start()], match[1]
    body = body.rstrip()
    braced = body.endswith("}") and body[:-1].rstrip()[-1:] in _LETTERS + "°."
    body = body[:-1] if braced else body
    head = body.rstrip(_LETTERS + " °/.")
    tail = body[len(head) :]
    if braced:
        if not head.endswith("{"):
            return text, ""
        head = head[:-1]
    elif head.endswith("\\"):  # the letters begin with a command: 3\pi cm
        command = _COMMAND.match(tail)
        head, tail = (head + command[0], tail[command.end() :]) if command else (head, "")
    if not tail or not any(char.isdigit() or char == "\\" for char in head):
        return text, ""
    if tail.strip() in ("percent", "per cent") and not power:
        return head.rstrip() + "%", ""
    unit = _unit(tail, power, apart=braced or tail[0] == " ")
    return (head.rstrip(), unit) if unit else (text, "")


def _unit(tail: str, power: str, *, apart: bool) -> str:
    """The short name of a unit, or "" if `tail` is none; one letter is a unit only apart from the value."""
    name = tail.strip().rstrip(".").replace(".", "")
    if len(name) == 1 and not apart and name != "°":
        return ""
    name = re.sub(r"^(?:square|sq) ?", "2 ", re.sub(r"^(?:cubic|cu) ?", "3 ", name.lower()))
    if name[:2] in ("2 ", "3 "):
        name, power = name[2:], name[0]
    words = [_UNITS.get(word, "") for word in re.split(r"/| per ", name)]
    if all(words):
        return "/".join(words) + (f"^{power}" if power else "")
    spelled = name.split()
    noun = len(spelled) <= 2 and all(2 < len(w) < 16 and w.isalpha() and w not in _NOT_UNITS for w in spelled)
    return " ".join(spelled) + (f"^{power}" if power else "") if noun else ""
