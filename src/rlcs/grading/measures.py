"""Units of answers: `cm^2`, `m/s`, `dollars`, `days`, `平方厘米`, and whether two are the same unit.

A unit is a product of powers of named units (the tables below) and of what is counted (`red balls`). pint,
which takes a quarter of a second to load, says what names mean only when units with different names are
compared. Nothing is converted: 60 minutes are not 1 hour.
"""

import functools
import itertools
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

_MEASURES = """
+m ~meter ~metre ~米, km 公里, cm 公分, um micron, in inch 英寸, ft foot 英尺, yd yard, mi mile 英里, +g
gm ~gram ~gramme ~克, nmi nautical_mile 海里, kg kilo Kg kgs 公斤, t tonne metric_ton Mg, t|ton ton 吨, lb
lbs, oz ounce 盎司, +L +l ~liter ~litre ~升, mL cc, gal gallon 加仑, qt quart, pt pint, cup, tbsp tablespoon,
tsp teaspoon, floz fluid_ounce fl_oz, ha hectare 公顷, acre 英亩, +s sec ~second ~秒 秒钟, min minute
分钟, h hr hrs hour 小时 时 钟头, day 天 日, week wk 周 星期, month mo 月, year yr yrs 年 岁, +N ~newton
牛顿, N*m Nm, +J ~joule 焦耳, +W ~watt ~瓦特 ~瓦, +Wh ~瓦时, +V ~volt ~伏特 ~伏, hPa, bar, +A ~amp ~ampere
~安培 ~安, +Pa ~pascal ~帕斯卡 ~帕, +Hz ~hertz ~赫兹 ~赫, +ohm +Ω ~ohm ~欧姆 ~欧, +C ~coulomb 库仑, C|°C
C, +F ~farad 法拉, F|°F F, +H ~henry, +T ~tesla, +mol ~mole ~摩尔, +cal ~calorie 卡路里, kcal 千卡 大卡,
+eV, atm atmosphere, mph, kph kmh, kohm kilohm, Mohm megohm, +B ~byte, bit
"""
"""Rows of names of one unit, with commas between rows; the first name is the one that pint knows.

`+` before a name: with short prefixes too (`km`); `~`: with long ones (`kilometer`, `千米`). `a|b`: the names
of the row may mean either unit. `_` stands for a space.
"""
_OTHERS = """
° degree deg 度, rad radian 弧度, rpm, +K ~kelvin 开尔文, dollar $ US$ USD US_dollar 美元, cent ¢ 美分,
euro € EUR 欧元, °C degC celsius °celsius centigrade degree_celsius degrees_celsius degree_C degrees_C
摄氏度, £ GBP 英镑, lb|£ pound, °F degF fahrenheit degree_fahrenheit degrees_fahrenheit degree_F degrees_F
华氏度, yuan 元 RMB CNY 人民币, unit 单位, yuan|yen ¥, yen JPY 日元, jiao 角, fen, min|fen|point 分, rupee
₹ Rs INR, won ₩, ruble ₽, pence penny, dB decibel
"""
"""Units that agree by name alone: angles, temperatures (whose zeros differ), money."""
# Short, long and Chinese.
_PREFIXES = "k kilo 千,c centi 厘,m milli 毫,d deci 分,u micro 微,n nano 纳,M mega 兆,G giga 吉"
_POWERS = MappingProxyType({"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": -2, "cubed": -3})
"""Words for powers of the next unit or, negative here, of the one before."""
_PAIRS = "m/s m/h g/L g/s L/s L/h N/m J/s J/K V/m W/m W/K N*m N*s J*s W*h W*s".split()
"""Products of two single letters that are units in plain maths."""
_LENGTHS = frozenset("m km cm mm dm nm um ft in yd mi".split())
_PLAIN = _LENGTHS | set(
    "s g h L N J W V K A mg kg Kg ml mL cL dL kN kJ MJ kW MW kV mA Pa Hz eV Wh Nm ms ns lb oz hr Rs".split()
)
"""Symbols of one or two letters that are units in plain maths; others (`C`, `F`) are variables."""
_NO_NOUN = re.compile(  # words that make another number, begin or join another statement, or are maths
    r"zero|(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|quarter|dozen|score|lakh|crore"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|\w*(?:hundred|thousand)|\w+illi(?:on|ard))s?|halves|half"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)ties|\w+teens?|once|double|triple|twice|thrice|gross"
    r"|(?:first|third|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+(?:teen|tie|dred|sand|lion))th)s?"
    r"|\w+[^e]ed|(?:square|cube)roots?|(?:co)?(?:sine|tangent|secant)|logarithm|plus|minus|times|over"
    r"|(?:a|arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|lg|exp|sqrt|max|min|gcd|lcm|lim|det|mod)h?"
    r"(?:[abntxyz]|theta|alpha|beta|phi)?|alpha|beta|gamma|delta|(?:var)?(?:epsilon|theta|phi)|zeta|eta|iota"
    r"|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma|tau|upsilon|chi|psi|omega|divided|multiplied|negative"
    r"|positive|modulo|choose|factorial|powers?"
    r"|exponent|remainder|sup|inf|sum|prod|frac|cdot|int|per|per\w*cent\w*|per\w*mille|infini\w+|imaginary"
    r"|(?:un|in)defined?|unknown|variables?|and|or|not|nor|but|except|none|with\w*|about|because|since|so"
    r"|therefore|hence|if|then|than|th[aeio]\w{1,2}|wh(?:at|en|ere|ich|o|ile)|here|there|from|to|in|into"
    r"|onto|on|at|by|for|of|is|are|was|were|be|has|ha[vd]e?|will|would|can|could|may|might|must|should|only"
    r"|also|just|exactly|approx\w*|rough\w*|around|near\w*|almost|more|less|most|least|fewer|greater|larger"
    r"|smaller|bigger|equals?|under|above|below|between|both|n?either|all|any|some|every|many|much|few"
    r"|several|other|another|same|base|true|false|yes|out|off|until|after|before|(?:al)?though|however|maybe"
    r"|possibly|unless|\w*fold|myriad|couple|googol|wan|reciprocal|opposite|complement|fake|nope|wrong"
    r"|incorrect|invalid|impossible|extraneous|inverse|guess|grand|mil|basis|answers?|options?|choices?"
)
# Words that may describe what is counted (prime numbers), but are not it.
_NO_HEAD = "square cubic cube root real prime even odd integer rational complex total whole".split()
# Three letters that count things in plain maths too, where other runs of three are variables.
_SHORT = "man men boy cat dog cow hen pig car bus box bag cup egg pen hat toy row way pie lap".split()
# Irregular plurals, each before its singular.
_SINGULAR = (
    "people person men man women woman children child mice mouse geese goose teeth tooth feet foot".split()
)
# Chinese measure words, which may stand without a noun.
_COUNTERS = (
    "个只本名人次支枝张条辆件块种组棵头匹座台架间层排行列朵颗粒把双对套盒袋瓶杯碗筐箱包盘页题场家户位段根片面"
)
# Chinese characters of numbers, negations and operations: a word with one of them is no noun.
_NO_HAN = re.compile(r"[零一二三四五六七八九十百千万亿兆半几或和与且不无是加减乘除约负]|平方|立方|[成折分]$")
_PIECE = re.compile(
    r"(sq\.|(?:square|sq|cubic)(?=[a-z]{2})|平方|立方)?(US\$|[^\W\d_]+|°[CF]?|[$€£¥₹₩₽¢])\.?"
    r"(?:\^?[{(]?(-?[1-9])[})]?)?"
)
_AFTER = re.compile(r" (?:in total|in all|altogether|old|long|tall|high|wide|deep|thick|left|each|total)$")

_Product = tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A unit of measure or what is counted; `str()` gives its name."""

    name: str
    products: frozenset[_Product]
    """Each way to understand the name, as powers of units in the tables."""
    nouns: _Product = ()
    """What is counted, as written, and the power: 1, or -1 after `per`."""

    def __str__(self) -> str:
        return self.name

    def same(self, other: "Unit") -> bool:
        """Whether both are one unit under any name: `m/s` and `meters per second`, `N*m` and `J`.

        Noun phrases agree when the last words agree and one has all words of the other.
        """
        nouns = list(itertools.zip_longest(self.nouns, other.nouns, fillvalue=("", 0)))
        if not all(mine[1] == theirs[1] and _same_noun(mine[0], theirs[0]) for mine, theirs in nouns):
            return False
        if self.products & other.products:
            return True
        return any(_same_product(a, b) for a in self.products for b in other.products)


@functools.lru_cache(4096)
def read_unit(text: str, *, upright: bool) -> Unit | None:
    r"""The unit that a text names, or None.

    Args:
        text: What follows a value (or precedes it: `$`), without LaTeX: `cm^2`, `m*s^{-2}`, `miles per hour`.
        upright: Whether it stood in `\text` or `\mathrm`. In plain maths single letters and short runs of
            letters are variables, unless they are symbols that people do write so (`m`, `kg`).
    """
    if len(text) > 60:
        return None
    text = unicodedata.normalize("NFKC", text.replace("·", "*").replace("×", "*")).replace("μ", "u")
    text = " ".join(text.split()).replace("° ", "°").strip("* ")
    factors: list[tuple[str, int]] = []
    nouns: list[tuple[str, int]] = []
    for place, side in enumerate(re.split(r" ?/ ?| per (?!cent\b)|每", _AFTER.sub("", text))):
        side = side[1:-1] if place and side[:1] == "(" and side[-1:] == ")" else side
        named = _factors(side, upright=upright)
        if named:
            factors += [(name, -power if place else power) for name, power in named]
        elif noun := _noun(side, upright=upright):
            nouns.append((noun, -1 if place else 1))
        else:
            return None
    if not nouns and not (upright or _plainly_written(text, factors)):
        return None
    ways = itertools.product(*([(name, power) for name in names.split("|")] for names, power in factors))
    products = frozenset(_collected(way) for way in ways)
    if not nouns and () in products:
        return None
    return Unit(name=_shown([*factors, *nouns]), products=products, nouns=tuple(nouns))


@functools.cache
def _names() -> tuple[Mapping[str, str], Mapping[str, str], frozenset[str]]:
    """The unit of every name, of every name in small letters, and the units that pint knows."""
    exact: dict[str, str] = {}
    folded: dict[str, str] = {}
    known: set[str] = set()
    prefixes = [["", "", ""], *(each.split() for each in _PREFIXES.split(","))]
    for table in (_MEASURES, _OTHERS):
        for row in table.split(","):
            unit = row.split()[0].lstrip("+")
            for item in row.split():
                name = item.lstrip("+~").replace("_", " ")
                kind = 0 if item[0] == "+" else 1 if name.isascii() else 2  # which form of a prefix it takes
                for prefix in prefixes if item[0] in "+~" else prefixes[:1]:
                    whole = prefix[0] + unit
                    exact[prefix[kind] + name] = whole
                    if name != "N*m" and (kind or prefix[0] in ("", "k", "c", "m")):
                        folded.setdefault((prefix[kind] + name).lower(), whole)
                    if table is _MEASURES:
                        known.update(whole.split("|"))
    return exact, folded, frozenset(known)


def _named(word: str, *, upright: bool) -> str:
    """The unit that a name stands for, singular or plural, or ""."""
    exact, folded, _ = _names()
    word = word.rstrip(".").removeprefix("个") if len(word) > 1 else word
    letters = word.isascii() and word.isalpha()
    if word in exact and (upright or word in _PLAIN or len(word) > 2 or not letters):
        return exact[word]
    if len(word) < 2 or (letters and not upright and (len(word) < 4 or not word[1:].islower())):
        return ""
    return next((folded[each] for each in _singulars(word.lower()) if len(each) > 1 and each in folded), "")


def _factors(text: str, *, upright: bool) -> list[tuple[str, int]]:
    """The named units whose product a text is, with their powers; [] if it is none."""
    if name := _named(text, upright=upright):
        return [(name, 1)]
    whole, of, what = text.partition(" of ")
    if of and _noun(what, upright=True):
        return _factors(whole, upright=upright)
    found: list[tuple[str, int]] = []
    power = 1
    for piece in re.split(r"[* ]+|-(?=[^\W\d])", text):
        word = _POWERS.get(piece.lower().rstrip("."), 0)
        if word > 0 and power == 1:
            power = word
        elif word < 0 and found and power == 1:
            found[-1] = (found[-1][0], found[-1][1] * -word)
        elif (match := _PIECE.fullmatch(piece)) and (name := _named(match[2], upright=upright)):
            glued = {None: 1, "立方": 3, "cubic": 3}.get(match[1], 2)
            found.append((name, power * glued * int(match[3] or 1)))
            power = 1
        else:
            return []
    sensible = power == 1 and len(found) < 5 and all(abs(each) < 5 for _, each in found)
    return found if sensible else []


def _plainly_written(text: str, factors: list[tuple[str, int]]) -> bool:
    """Whether symbols in plain maths are a unit (`N*m`, `m/s^2`) rather than variables (`m*g*h`)."""
    if re.search(r"[^\W\d_]{3}|[^\x00-\x7f]|[$]", text):
        return True
    if any(abs(power) > (3 if name in _LENGTHS or power < 0 else 1) for name, power in factors):
        return False
    above, below = ("*".join(name for name, power in factors if power * sign > 0) for sign in (1, -1))
    if max(len(name) for name, _ in factors) == 1 < len(factors):
        return (f"{above}/{below}" if below else above) in _PAIRS
    return bool(above)


def _noun(text: str, *, upright: bool) -> str:
    """A text that names what is counted, or ""."""
    if not text.isascii():
        text = text.replace(" ", "")
        return text if re.fullmatch(r"[\u4e00-\u9fff]{1,6}", text) and not _NO_HAN.search(text) else ""
    words = text.rstrip(".").split(" of ")
    head = re.split("[ -]", words[0])[-1].lower()
    words = re.split("[ -]", " ".join(words)) if len(words) < 3 else []
    short = 3 if upright or len(words) > 1 else 4
    good = 0 < len(words) < 4 and head not in _NO_HEAD and all(_noun_word(word, short) for word in words)
    return text.rstrip(".").lower() if good else ""


def _noun_word(word: str, short: int) -> bool:
    """Whether a word may stand in a noun phrase: it has a vowel and is no variables like `abcd` or `axyz`."""
    small = word.lower()
    if not (
        word.isalpha() and word[1:].islower() and (len(word) >= short or small in _SHORT) and len(word) < 20
    ):
        return False
    ascending = short == len(word) == 4 and list(word) == sorted(set(word))
    if ascending or not re.search("[aeiouy]", small[:4]):
        return False
    return not (set(small) <= set("abcde") or set(small) <= set("uvwxyz") or _NO_NOUN.fullmatch(small))


def _singulars(word: str) -> set[str]:
    """What the singular of a word may be."""
    if word in _SINGULAR[::2]:
        return {_SINGULAR[_SINGULAR.index(word) + 1]}
    found = {word} if re.search("(?:ss|us|is|[^s])$", word) else {word, word[:-1]}
    if re.search("(?:[sxzo]|ch|sh)es$", word):
        found.add(word[:-2])
    if re.search("[^aeiou]ies$", word):
        found.add(word[:-3] + "y")
    return found | ({word[:-3] + "f", word[:-3] + "fe"} if word.endswith("ves") else set())


def _same_noun(mine: str, theirs: str) -> bool:
    """Whether two noun phrases may count the same: `red balls` and `balls`, `个` and `个苹果`."""
    short, long = sorted((mine, theirs), key=len)
    if not long.isascii():
        return long.startswith(short) if short in _COUNTERS else not short.isascii() and long.endswith(short)
    heads = [_singulars(re.split("[ -]", text.split(" of ")[0])[-1]) for text in (short, long)]
    words = [[_singulars(word) for word in re.split(" of |[ -]", text)] for text in (short, long)]
    return bool(heads[0] & heads[1]) and all(any(a & b for b in words[1]) for a in words[0])


def _collected(factors: tuple[tuple[str, int], ...]) -> _Product:
    """Factors with the powers of each unit added up."""
    powers: dict[str, int] = {}
    for name, power in factors:
        powers[name] = powers.get(name, 0) + power
    return tuple(sorted((name, power) for name, power in powers.items() if power))


def _same_product(mine: _Product, theirs: _Product) -> bool:
    """Whether two products mean the same: angles and money by name, the rest by size and dimension."""
    known = _names()[2]
    a, b = (tuple(x for x in product if x[0] in known) for product in (mine, theirs))
    if [x for x in mine if x not in a] != [x for x in theirs if x not in b] or not (a and b):
        return False
    if len(a) == len(b) == 1 and (
        a[0][0] == b[0][0] or (a[0][1] == b[0][1] and "N*m" not in (a[0][0], b[0][0]))
    ):
        return False  # no two units of the tables are the same
    (size, dimension), (other_size, other) = _meaning(a), _meaning(b)
    return dimension == other and math.isclose(size, other_size, rel_tol=1e-9)


@functools.lru_cache(4096)
def _meaning(product: _Product) -> tuple[float, str]:
    """The size of a unit in basic units, and those units."""
    size, basic = _registry().get_root_units("*".join(f"({name})**{power}" for name, power in product))
    return float(size), str(basic)


@functools.cache
def _registry() -> Any:
    """What pint knows about units; its type is generic in ways that do not matter here."""
    from pint import UnitRegistry

    return UnitRegistry()


def _shown(factors: list[tuple[str, int]]) -> str:
    """A unit for people: `J/(kg*K)`."""
    texts: list[list[str]] = [[], []]
    for name, power in factors:
        texts[power < 0].append(name.split("|")[0] + (f"^{abs(power)}" if abs(power) > 1 else ""))
    above, below = ("*".join(each) for each in texts)
    return (above or "1") + (f"/({below})" if "*" in below else f"/{below}" if below else "")
