"""A gold answer equals its rewritings, and no value with another digit, sign, name, unit, bracket or base."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plain_grading import grade
from rlcs.grading.rewards import quick_grade
from rlcs.records import Problem


@dataclass(frozen=True)
class Case:
    """A gold answer, other ways to write it, and answers that are close to it but wrong."""

    gold: str
    same: tuple[str, ...]
    different: tuple[str, ...]
    choices: tuple[str, ...] = ()


def ways(text: str) -> tuple[str, ...]:
    """Several answers in one text."""
    return tuple(text.split(" || "))


def spelled(text: str) -> tuple[str, ...]:
    """Spellings of any answer that change nothing."""
    return (f"${text}$", f" {text} ", rf"\,{text}\,", rf"\mathbf{{{text}}}", rf"\({text}\)", f"{text}.")


def other_digit(draw: st.DrawFn, text: str) -> str:
    """The text with one of its digits replaced by another one."""
    place = draw(st.sampled_from([index for index, letter in enumerate(text) if letter.isdigit()]))
    digit = draw(st.sampled_from("123456789".replace(text[place], "")))
    return text[:place] + digit + text[place + 1 :]


def listed(values: list[int]) -> str:
    return ", ".join(map(str, values))


@st.composite
def whole_numbers(draw: st.DrawFn) -> Case:
    value = draw(st.integers(3, 10**7)) * draw(st.sampled_from([1, -1]))
    gold, grouped = str(value), f"{value:,}"
    groups = [grouped.replace(",", comma) for comma in (",", "{,}", r",\!", r"\,", r"\ ")]
    units = [f"{text}{unit}" for text in (gold, grouped) for unit in (" cm", r"\text{ apples}")]
    units += [rf"{gold}\%"] if value > 0 else []
    same = ways(
        rf"{gold}.0 || \text{{{gold}}} || \frac{{{2 * value}}}{{2}} || n={gold} || {value - 3}+3={value}"
    )
    different = ways(
        f"{other_digit(draw, gold)} || {other_digit(draw, gold)} cm || {-value} || {gold}0 || {gold}, 1 || "
        f"{gold} x || {gold}n || {gold} million || {gold} thousandths || {gold} dozen || {gold}i || {gold}!"
    )
    return Case(gold, (*spelled(gold), *groups, *units, *same), different)


@st.composite
def decimals(draw: st.DrawFn) -> Case:
    whole, part = draw(st.integers(1, 9999)), draw(st.integers(1, 999))
    gold, below = f"{whole}.{part}", 10 ** len(str(part))
    same = ways(
        rf"{whole:,}.{part} || {gold}0 || "
        rf"\frac{{{whole * below + part}}}{{{below}}} || {gold}\text{{ kg}} || "
        rf"\${gold} || x = {gold} || +{gold}"
    )
    different = ways(
        f"{other_digit(draw, gold)} || -{gold} || {whole}{part} || {whole} || {gold}9 || {whole}, {part}"
    )
    return Case(gold, spelled(gold) + same, different)


@st.composite
def fractions(draw: st.DrawFn) -> Case:
    below = draw(st.integers(2, 60))
    above = draw(st.integers(1, 90).filter(lambda number: number % below))
    gold = rf"\frac{{{above}}}{{{below}}}"
    same = ways(
        rf"\dfrac{{{above}}}{{{below}}} || \tfrac{{{above}}}{{{below}}} || "
        rf"{above}/{below} || {above}\div {below} || "
        rf"\frac{{{3 * above}}}{{{3 * below}}} || \left({gold}\right) || \frac{{ {above} }} {{ {below} }} || "
        rf"\frac{{-{above}}}{{-{below}}} || {{{above} \over {below}}}"
    )
    if above > below:
        same += (rf"{above // below}\frac{{{above % below}}}{{{below}}}",)
    different = ways(
        rf"\frac{{{below}}}{{{above}}} || -{gold} || "
        rf"\frac{{{above + 1}}}{{{below}}} || \frac{{{above}}}{{{below + 1}}} || "
        rf"{above} || {above}:{below + 1} || {above / below:.3f}1"
    )
    return Case(gold, spelled(gold) + same, different)


UNITS = {
    "cm": "centimeters",
    "kg": "kilograms",
    "s": "seconds",
    "m/s": "meters per second",
    "kPa": "kilopascals",
}


@st.composite
def quantities(draw: st.DrawFn) -> Case:
    unit, name = draw(st.sampled_from(sorted(UNITS.items())))
    other = draw(st.sampled_from(sorted(set(UNITS) - {unit})))
    value = draw(st.integers(2, 5000))
    wrong = other_digit(draw, str(value))
    same = ways(
        rf"{value} || {value:,} {unit} || {value}{unit} || {value} {name} || {value}\text{{ {unit}}} || "
        rf"{value}\,\mathrm{{{unit}}} || {value}\mathrm{{~{unit}}} || {value} \ {{\rm {unit}}} || "
        rf"t = {value} {unit}"
    )
    different = ways(
        rf"{wrong} || {wrong} {unit} || -{value} {unit} || "
        rf"{value} {other} || {value}\text{{ {UNITS[other]}}} || "
        rf"{value} {'m' if '/' in unit else unit + '^2'}"
    )
    return Case(f"{value} {unit}", same, different)


@st.composite
def expressions(draw: st.DrawFn) -> Case:
    x, y, z = draw(st.permutations("abnxyz"))[:3]
    number, power = draw(st.integers(2, 97)), draw(st.integers(2, 6))
    shapes = {
        f"{number}{x}": rf"{number} \cdot {x} || {x} \times {number} || {number}*{x}",
        f"{number} {x} {y}": rf"{number}{y}{x} || {y} \cdot {number} {x}",
        rf"\frac{{{x}}}{{{y}}}": rf"{x}/{y} || \dfrac {{{x}}} {{{y}}} || \frac{{3{x}}}{{3{y}}}",
        rf"{number}^{{{x}}}": rf"{number}^{x} || {number} ^ {{ {x} }}",
        rf"{number}{x}^{{{power}}}+{y}": rf"{y}+{number}{x}^{power} || {number}*{x}**{power} + {y}",
        rf"\sqrt{{{x}}}-{number}": rf"-{number}+\sqrt {x} || {x}^{{1/2}}-{number} || sqrt({x})-{number}",
        rf"e^{{{number}{x}}}": rf"\mathrm{{e}}^{{{number}{x}}} || \exp({number}{x}) || e^{{{x}*{number}}}",
    }
    gold = draw(st.sampled_from(sorted(shapes)))
    different = [f"-({gold})", f"{gold}+1", rf"\left({gold}\right)^2", f"{gold}-{z}", str(number)]
    different += [gold + y if x == "a" else gold.replace(x, z)]  # "a" is in \frac
    different += [other_digit(draw, gold)] if any(letter.isdigit() for letter in gold) else []
    return Case(gold, spelled(gold)[:3] + ways(shapes[gold]), tuple(different))


@st.composite
def equations(draw: st.DrawFn) -> Case:
    one, two, three = draw(st.permutations("abnxyz"))[:3]
    first, second, right = draw(st.integers(2, 9)), draw(st.integers(2, 9)), draw(st.integers(1, 30))
    left = f"{first}{one}+{second}{two}"
    same = ways(
        f"{right}={left} || {second}{two}+{first}{one}={right} || {left}-{right}=0 || "
        f"-{first}{one}-{second}{two}=-{right} || {3 * first}{one}+{3 * second}{two}={3 * right} || "
        f"{first}{one} = {right} - {second}{two}"
    )
    different = ways(
        f"{first}{one}-{second}{two}={right} || {left}={right + 1} || "
        f"{first}{one}+{second}{three}={right} || "
        f"{first}{one}+{second + 1}{two}={right} || {right} || {left} || {left}=-{right}"
    )
    return Case(f"{left}={right}", spelled(f"{left}={right}")[:3] + same, different)


@st.composite
def named_values(draw: st.DrawFn) -> Case:
    one, two = draw(st.permutations("abkmnpxyz"))[:2]
    first, second = draw(st.integers(-40, 49)), draw(st.integers(50, 99))
    right, turned = f"{first},{second}", f"{second},{first}"
    gold = draw(st.sampled_from([f"{one}={first}, {two}={second}", f"({one},{two})=({right})"]))
    same = ways(
        rf"{two}={second}, {one}={first} || {one} = {first} \text{{ and }} {two} = {second} || "
        rf"{one}={first},{two}={second} || \begin{{cases}}{one}={first}\\{two}={second}\end{{cases}}"
    )
    different = ways(
        f"{one}={second}, {two}={first} || {one}={first} || {one}={first}, {two}={second + 1} || "
        f"{one}={first + 1}, {two}={second} || {first + second}"
    )
    bracketed = gold.startswith("(")
    return Case(
        gold,
        (*same, f"({right})" if bracketed else right),
        (*different, f"({turned})" if bracketed else turned),
    )


@st.composite
def intervals(draw: st.DrawFn) -> Case:
    low = draw(st.integers(-40, 40))
    high = low + draw(st.integers(1, 50))
    left, below, under = draw(st.sampled_from([("(", "<", ">"), ("[", r"\leq ", ">=")]))
    right, above, over = draw(st.sampled_from([(")", "<", ">"), ("]", r"\le ", r"\ge ")]))
    gold, chain = f"{left}{low},{high}{right}", f"{low}{below}x{above}{high}"
    same = ways(
        rf"\left{left}{low}, {high}\right{right} || {left}{low};{high}{right} || "
        rf"{chain} || \{{x \mid {chain}\}} || "
        rf"x \in {gold} || {high}{over}x{under}{low} || {left}{low}.0,{high}.0{right}"
    )
    other_left, other_right = ("[" if left == "(" else "("), ("]" if right == ")" else ")")
    different = ways(
        rf"{other_left}{low},{high}{right} || {left}{low},{high}{other_right} || "
        rf"{left}{low},{high + 1}{right} || "
        rf"{left}{low - 1},{high}{right} || x{above}{high} || {left}{low},\infty) || \{{{low},{high}\}} || "
        rf"(-\infty,{low})\cup({high},\infty)"
    )
    return Case(gold, same, different)


@st.composite
def rays(draw: st.DrawFn) -> Case:
    name, other = draw(st.permutations("akmtxy"))[:2]
    bound = draw(st.integers(-60, 60))
    sign, turned, left, more, closed = draw(
        st.sampled_from([(">", "<", "(", r"\gt", ">="), (r"\geq", r"\leq", "[", r"\geqslant", ">")])
    )
    gold = f"{name} {sign} {bound}"
    same = ways(
        rf"{bound} {turned} {name} || {left}{bound},\infty) || "
        rf"{left}{bound}, +\infty) || \{{{name} : {gold}\}} || "
        rf"{name} \in {left}{bound},\infty) || {name} {more} {bound}"
    )
    different = ways(
        rf"{name} {turned} {bound} || {name} {sign} {bound + 1} || {other} {sign} {bound} || {bound} || "
        rf"{name}={bound} || {name} {closed} {bound} || (-\infty,{bound}] || (-\infty,{bound})"
    )
    return Case(gold, same, different)


@st.composite
def sets(draw: st.DrawFn) -> Case:
    values = draw(st.lists(st.integers(-99, 99), min_size=2, max_size=5, unique=True))
    mixed = listed(draw(st.permutations(values)))
    text = listed(values)
    gold = draw(st.sampled_from([rf"\{{{text}\}}", text]))
    same = ways(
        rf"\{{{mixed}\}} || \left\{{{mixed}\right\}} || {mixed} || {mixed.replace(', ', '; ')} || "
        rf"{mixed.replace(', ', ' and ')} || {mixed.replace(' ', '')}"
    )
    changed = listed([values[0] + 1000, *values[1:]])
    different = ways(f"{listed(values[1:])} || {text}, 1000 || {changed} || {sum(values)}.5")
    if draw(st.booleans()):
        gold, same, different = f"x={text}", (*same, f"x={mixed}"), (*different, f"y={text}", f"n={mixed}")
    return Case(gold, same, different)


@st.composite
def tuples(draw: st.DrawFn) -> Case:
    values = draw(st.lists(st.integers(-99, 99), min_size=2, max_size=4, unique=True))
    inner = listed(values)
    decimal = ", ".join(f"{number}.0" for number in values)
    same = ways(
        rf"({inner.replace(' ', '')}) || \left({inner}\right) || "
        rf"({inner.replace(', ', ',' + chr(92) + ' ')}) || "
        rf"({inner.replace(', ', '; ')}) || P=({inner}) || ({decimal})"
    )
    different = ways(
        f"({listed(values[::-1])}) || ({listed([values[0] + 1, *values[1:]])}) || ({inner}, 0) || "
        f"({listed(values[1:])}) || [{listed(values[:2])}] || ({listed([-values[0] or 5, *values[1:]])})"
    )
    return Case(f"({inner})", same, different)


def matrix(rows: list[list[int]], left: str = r"\begin{pmatrix}", right: str = r"\end{pmatrix}") -> str:
    return left + r" \\ ".join(" & ".join(map(str, row)) for row in rows) + right


@st.composite
def matrices(draw: st.DrawFn) -> Case:
    width = draw(st.integers(2, 3))
    row = st.lists(st.integers(-99, 99), min_size=width, max_size=width)
    rows = draw(st.lists(row, min_size=1, max_size=3))
    gold, columns = matrix(rows), "c" * width
    same = (
        matrix(rows, r"\begin{bmatrix}", r"\end{bmatrix}"),
        matrix(rows, r"\begin{pmatrix} ", r" \\ \end{pmatrix}"),
        matrix(rows, rf"\left[\begin{{array}}{{{columns}}}", r"\end{array}\right]"),
        matrix(rows, r"\left(\begin{matrix}", r"\end{matrix}\right)"),
        gold.replace(" ", ""),
        f"A={gold}",
    )
    changed, turned = (
        [[rows[0][0] + 1, *rows[0][1:]], *rows[1:]],
        [list(column) for column in zip(*rows, strict=True)],
    )
    wider = [[*values, 0] for values in rows]
    wrong = [matrix(changed), matrix([*rows, rows[0]]), matrix(wider), str(rows[0][0])]
    return Case(gold, same, tuple(wrong + ([matrix(turned)] if turned != rows else [])))


@st.composite
def ratios(draw: st.DrawFn) -> Case:
    first, second = draw(st.integers(1, 40)), draw(st.integers(41, 99))
    name = draw(st.sampled_from(["", "AB:BC=", "S_1:S_2="]))
    same = ways(
        rf"{first}:{second} || {first} : {second} || {first} \colon {second} || {first}∶{second} || "
        rf"{first}：{second} || \text{{{first}:{second}}} || {first}\!:\!{second}"
    )
    different = ways(
        rf"{second}:{first} || {2 * first}:{2 * second} || "
        rf"{first}:{second + 1} || \frac{{{first}}}{{{second}}} || "
        rf"{first}/{second} || {first}:{second}:1 || {name}{second}:{first} || {first}"
    )
    return Case(f"{name}{first}:{second}", same, different)


WORDS = {2: "two", 3: "three", 5: "five", 8: "eight", 16: "sixteen"}


@st.composite
def numbers_in_a_base(draw: st.DrawFn) -> Case:
    base, other = draw(st.permutations(sorted(WORDS)))[:2]
    text = st.text("0123456789ABCDEF"[:base], min_size=1, max_size=5)
    digits = "1" + draw(text)
    gold = draw(st.sampled_from(ways(rf"{digits}_{{{base}}} || {digits}_{{\text{{{WORDS[base]}}}}}")))
    same = ways(
        rf"{digits}_{{{base}}} || {digits}_{{\text{{{WORDS[base]}}}}} || {digits}_{{\text{{{base}}}}} || "
        rf"({digits})_{{{base}}} || \text{{{digits}}}_{{{base}}}"
    )
    wrong = digits[:-1] + ("0" if digits[-1] != "0" else "1")
    different = ways(
        rf"{digits}_{{{other}}} || {wrong}_{{{base}}} || {digits}0_{{{base}}} || -{digits}_{{{base}}} || "
        rf"{digits}_{{\text{{{WORDS[other]}}}}}"
    )
    return Case(gold, same, different)


@st.composite
def single_choices(draw: st.DrawFn) -> Case:
    values = draw(st.lists(st.integers(10, 99), min_size=3, max_size=5, unique=True))
    unit = draw(st.sampled_from(["", " cm"]))
    right = draw(st.integers(0, len(values) - 1))
    wrong = (right + 1) % len(values)
    letter, other, value, close = (
        "ABCDE"[right],
        "ABCDE"[wrong],
        f"{values[right]}{unit}",
        f"{values[wrong]}{unit}",
    )
    golds = f"{letter} || ({letter}) || {value} || ({letter}) {value} || Option {letter} || {letter.lower()}"
    same = ways(
        rf"{letter} || ({letter}) || {letter}. || "
        rf"\text{{{letter}}} || \textbf{{({letter})}}\ {values[right]} || "
        rf"{letter}. {value} || {value} || {letter.lower()} || {values[right]} || Option {letter}"
    )
    different = ways(
        rf"{other} || ({other}) || {close} || {letter}. {close} || {other}. {value} || {letter}, {other} || "
        rf"{letter} \text{{ or }} {other} || Z || {close.replace('cm', '')} || 1{values[right]}"
    )
    return Case(
        draw(st.sampled_from(ways(golds))), same, different, tuple(f"{number}{unit}" for number in values)
    )


@st.composite
def several_choices(draw: st.DrawFn) -> Case:
    letters = sorted(draw(st.lists(st.sampled_from("ABCD"), min_size=2, max_size=3, unique=True)))
    mixed = draw(st.permutations(letters))
    gold = draw(st.sampled_from(["", ",", ", ", " and "])).join(letters)
    same = [separator.join(mixed) for separator in ("", ",", ", ", " and ", "、", ";")]
    other = next(letter for letter in "ABCD" if letter not in letters)
    wrong = (letters[0], "".join(letters[1:]), "".join([*letters, other]), "".join([*letters[1:], other]))
    colours = ("red", "blue", "green", "white")
    return Case(
        gold, (*same, rf"\text{{{', '.join(letters)}}}"), (*wrong, other, f"{letters[0]}, {other}"), colours
    )


MONTHS = ("January", "March", "April", "June", "August", "October", "December")


@st.composite
def dates_times_and_ranges(draw: st.DrawFn) -> Case:
    month, year, day = draw(st.integers(0, 6)), draw(st.integers(1900, 2030)), draw(st.integers(1, 27))
    hour, minute = draw(st.integers(1, 12)), draw(st.integers(10, 58))
    name, wrong, date = MONTHS[month], MONTHS[(month + 1) % 7], f"{year}-0{month + 1}-{day:02}"
    span = f"{year}-{year + day}"
    cases = [
        Case(
            f"{name} {day}, {year}",
            ways(rf"{day} {name} {year} || \text{{{name} {day}, {year}}}"),
            ways(f"{name} {day + 1}, {year} || {wrong} {day}, {year} || {name} {day}, {year + 1} || {year}"),
        ),
        Case(
            date,
            (rf"\text{{{date}}}",),
            ways(
                f"{date[:-1]}{(day + 1) % 10} || {year}-0{month + 2}-{day:02} || {year} || "
                f"{year - month - 1 - day}"
            ),
        ),
        Case(
            f"{hour}:{minute} p.m.",
            ways(rf"{hour}:{minute} PM || {hour}:{minute}\text{{ pm}}"),
            ways(f"{hour}:{minute} a.m. || {hour}:{minute + 1} p.m. || {hour}.{minute}"),
        ),
        Case(
            span,
            ways(rf"{year}–{year + day} || {year}\text{{--}}{year + day}"),
            ways(f"-{day} || {year}-{year + day + 1} || {2 * year + day} || {year}"),
        ),
    ]
    return draw(st.sampled_from(cases))


@st.composite
def money_and_percent(draw: st.DrawFn) -> Case:
    value = draw(st.integers(2, 90))
    wrong = other_digit(draw, str(value))
    money = Case(
        rf"\${value}.50",
        ways(f"{value}.5 || {value}.50 dollars || {value}.50"),
        ways(rf"\${wrong}.50 || €{value}.50 || \${value}.05 || \${value}.50\text{{ million}} || {value}50"),
    )
    percent = Case(
        rf"{value}\%",
        ways(rf"{value} || {value / 100:.2f} || {value} percent || \frac{{{value}}}{{100}} || {value}%"),
        ways(rf"{wrong} || {wrong}\% || {value / 1000:.3f} || -{value} || {value}00"),
    )
    return draw(st.sampled_from([money, percent]))


@st.composite
def worked_values(draw: st.DrawFn) -> Case:
    base, power = draw(st.integers(2, 9)), draw(st.integers(2, 5))
    number = base**power
    left = draw(
        st.sampled_from(ways(rf"\log_{{{base}}} {number} || \log_{{{base}}} {{({number})}} || {power - 1}+1"))
    )
    different = ways(
        f"{left}={power + 1} || {left}=-{power} || {power + 1} || {left.replace(left[-2], '1')}={number}"
    )
    return Case(f"{left}={power}", (str(power), f"{left} = {power}.0"), different)


@st.composite
def plus_minus(draw: st.DrawFn) -> Case:
    middle, inside = draw(st.integers(1, 30)), draw(st.sampled_from([2, 3, 5, 7, 11]))
    root = rf"\sqrt{{{inside}}}"
    same = ways(
        rf"{middle} \pm {root} || {middle}+{root},{middle}-{root} || "
        rf"\{{{middle}-{root},{middle}+{root}\}} || "
        rf"{middle}±√{inside} || x={middle}+{root} \text{{ or }} x={middle}-{root}"
    )
    different = ways(
        rf"{middle}+{root} || {middle}-{root} || -{middle}\pm{root} || {middle + 1}\pm{root} || \pm{root} || "
        rf"{middle}\pm\sqrt{{{inside + 2}}} || {middle}"
    )
    name = draw(st.sampled_from(["", "x="]))
    wrong_name = (
        (rf"y={middle}\pm{root}", rf"x={middle}+{root} \text{{ or }} y={middle}-{root}") if name else ()
    )
    return Case(rf"{name}{middle}\pm{root}", same, different + wrong_name)


KINDS = [whole_numbers, decimals, fractions, quantities, money_and_percent, numbers_in_a_base]
KINDS += [expressions, equations, named_values, intervals, rays, plus_minus, worked_values]
KINDS += [dates_times_and_ranges, sets, tuples, matrices, ratios, single_choices, several_choices]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_gold_equals_its_rewritings_and_no_neighbour(
    kind: Callable[[], st.SearchStrategy[Case]], data: st.DataObject
) -> None:
    case = data.draw(kind())
    problem = Problem(id="p", source="test", question="?", answer=case.gold, choices=case.choices)
    for answers, expected in (((case.gold, *case.same), True), (case.different, False)):
        for answer in answers:
            result = grade(problem, rf"\boxed{{{answer}}}", allow_fallbacks=False)
            assert result.correct is expected, f"gold {case.gold!r}, answer {answer!r}: {result.why}"


PIECES = ways(
    r"\frac || \sqrt || \left( || \right) || \text{ || \log_ || \sin || \pm || \cup || \infty || "
    r"\begin{pmatrix} || \end{pmatrix} || { || } || ( || ] || ^ || _ || ! || = || <= || , || : || $ || "
    r"% || & || \\ || 7 || 0. || 1,000 || x || i || cm || or || ½ || °"
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(PIECES), max_size=9), st.lists(st.sampled_from(PIECES), max_size=9))
def test_no_text_raises(gold: list[str], answer: list[str]) -> None:
    problem = Problem(id="p", source="test", question="?", answer="7" + "".join(gold))
    for text in ("".join(answer), "7" + "".join(answer), problem.answer + "".join(answer)):
        assert quick_grade(problem, f"\\boxed{{{text}}}", allow_fallbacks=False)
