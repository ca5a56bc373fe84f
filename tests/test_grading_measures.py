"""Units: which texts name one, and which of them are the same."""

import itertools
import string
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlcs.grading import measures
from rlcs.grading.measures import Unit, read_unit

SPELLINGS = [
    "m/s, m s^{-1}, m*s^-1, meters per second, metre/second, 米/秒",
    "m/s^2, m*s^{-2}, m s^{-2}, meters per second squared, m/s/s",
    "cm^2, cm², cm2, ㎠, square centimeters, sq. cm, sq cm, square centimetres, cm squared, 平方厘米",
    "cm^3, cubic centimeters, mL, ml, cc, milliliters, 立方厘米, 毫升",
    "ft^2, sqft, squarefeet, sq ft, square feet, square foot",
    "km/h, kph, kilometers per hour, 千米/时, 千米/小时, 公里/小时, 千米每小时",
    "mph, mi/h, miles per hour, mile/hour",
    "N*m, N m, Nm, N·m, newton-meters, newton metres, J, joules",
    "N, newtons, kg*m/s^2",
    "kWh, kW*h, kilowatt hours, kilowatt-hours, 千瓦时",
    "J/(kg*K), J/kg/K, J*kg^-1*K^-1",
    "°C, ℃, ° C, celsius, degrees Celsius, degrees C, 摄氏度",
    "°, degrees, degree, deg, 度",
    "μm, µm, um, micrometers, microns, 微米",
    "kΩ, kΩ, kilohms, kohm",
    "$, dollars, dollar, USD, US dollars, 美元",
    "¢, cents, cent",
    "元, yuan, RMB, 人民币",
    "s, sec, seconds, 秒",
    "min, minutes, 分钟",
    "h, hr, hrs, hours, 小时, 个小时",
    "month, months, 个月, 月",
    "years, year, yrs, years old, 岁, 年",
    "kg, kilograms, Kg, 公斤, 千克",
    "units^2, square units, sq. units, sq units",
    "L, liters, litres, dm^3, 升",
    "$/hour, dollars per hour, $/h",
    "apples, apple, Apples, red apples, apples left",
    "boxes, box",
    "cities, city",
    "horses, horse",
    "people, person",
    "个, 个苹果",
    "红球, 球",
    "people per square mile, people/mi^2",
    "cups of flour, cups, cup",
    "pairs of socks, pairs",
]
EITHER = ["pounds, lb", "pounds, £", "tons, t", "分, 分钟", "C, °C", "C, coulombs", "¥, yen", "¥, 元"]
"""Names that stand for one of two units agree with both."""
DIFFERENT = (
    "cm, m; cm, cm^2; min, h; °, rad; °, °C; °C, °F; °C, K; cents, dollars; red balls, blue balls; "
    "card games, cards; "
    "apples, pears; apples, units; units, square units; square units, cm^2; units, cm; m/s, km/h; "
    "kg, lb; 元, $; 元, 角; 个, 只; m, mm; Hz, rad/s; rpm, Hz; planes, plans; m/s, m/s^2; N, J; €, $; "
    "天, 年; lb, £; yuan, yen; days, people; red balls, balls of wool; km/h, h/km; mg, Mg; mW, MW; "
    "分钟, 秒; 个, 球; people/km^2, people; dollars, dollars/h"
)
PLAIN_UNITS = (
    "m, s, g, h, L, N, J, W, V, K, cm, in, ft, kWh, Rs., kHz, mol, min, sec, °, $, days, ways, eggs, "
    "men, points, zeros, squares, square tiles, real solutions, people, 个, 倍, costs, tanks, m^3, "
    "cm^{2}, L/min, g/cm^3, kg*m^2"
)
NO_UNITS = (
    "a, c, d, f, j, k, n, t, v, w, x, y, z, C, F, l, ab, bn, mn, AB, CM, abc, xyz, ABC, ABCD, "
    "abcd, axyz, mns, KMs, halves, quarters, tenths, hundredths, sixths, ten, tens, hundreds, twenty, "
    "twenty-five, nineteen, million, trillions, dozen, dozen eggs, thousand dollars, million dollars, "
    "half, score, alpha, theta, pi, factorial, choose, negative, squared, cubed, root, squareroot, "
    "sqrt, times, plus, over, mod, max, gcd, sinx, sin x, cost, sintheta, and, or, not, without, "
    "about, because of symmetry, cm and, percent, per cent, infinity, square, m*g*h, m*g, s*h, L*h, "
    "s^2, g^2, m^4, a^2, x/y, V/h, L/K, /s, s^{-1}, of, per hour, m/m, 5 cm, (cm, cm), 2, *, ^2, 万元, "
    "百, 千, 亿, 半, 成, 折, 平方, 或, k m, apples^2, red red red balls, , x apples, m^99"
)


def unit(text: str, *, upright: bool = True) -> Unit:
    found = read_unit(text, upright=upright)
    assert found, f"{text!r} is no unit"
    return found


@pytest.mark.parametrize("row", SPELLINGS, ids=lambda row: row.split(",")[0])
def test_a_unit_is_itself_under_every_name(row: str) -> None:
    for one, other in itertools.permutations(map(unit, row.split(", ")), 2):
        assert one.same(other), (one, other)


@pytest.mark.parametrize("row", EITHER)
def test_a_name_of_two_units_agrees_with_either(row: str) -> None:
    one, other = map(unit, row.split(", "))
    assert one.same(other) and other.same(one)


@pytest.mark.parametrize("row", DIFFERENT.split("; "))
def test_different_units_never_agree(row: str) -> None:
    one, other = map(unit, row.split(", "))
    assert not one.same(other) and not other.same(one)


def test_units_of_two_rows_differ() -> None:
    rows = [[unit(text) for text in row.split(", ")] for row in SPELLINGS]
    for one, other in itertools.permutations(rows, 2):
        agree = [pair for pair in itertools.product(one, other) if pair[0].same(pair[1])]
        assert not agree


def test_all_named_units_are_known_to_pint_and_differ() -> None:
    names = sorted({*measures._names()[0].values()} & measures._names()[2])
    sizes = {
        name: (f"{size:.9e}", basic) for name in names for size, basic in [measures._meaning(((name, 1),))]
    }
    twins = {pair for pair in itertools.combinations(names, 2) if sizes[pair[0]] == sizes[pair[1]]}
    assert len(names) > 50 and twins == {("J", "N*m"), ("Mg", "t")}
    registry = measures._registry()
    meant = {"h": "hour", "t": "metric_ton", "min": "minute", "B": "byte", "gal": "gallon", "in": "inch"}
    assert {name: str(registry.parse_units(name)) for name in meant} == meant


@pytest.mark.parametrize("text", PLAIN_UNITS.split(", "))
def test_units_in_plain_maths(text: str) -> None:
    assert unit(text, upright=False).same(unit(text))


@pytest.mark.parametrize("text", NO_UNITS.split(", "))
def test_numbers_variables_and_operations_are_no_units(text: str) -> None:
    assert read_unit(text, upright=False) is None


def test_short_runs_of_letters_are_variables() -> None:
    runs = ["".join(each) for n in (1, 2) for each in itertools.product(string.ascii_letters, repeat=n)]
    assert {run for run in runs if read_unit(run, upright=False)} == measures._PLAIN
    upright = {run for run in runs if len(run) == 1 and read_unit(run, upright=True)}
    assert upright == set("msghLlNJWVAKCFTHtB"), "what SI calls so"


@pytest.mark.parametrize(
    "text", "a c d j k n v x ab AB sin max log and or cos pi mod ten two lim e i".split()
)
def test_words_of_maths_are_no_units_when_upright(text: str) -> None:
    assert read_unit(text, upright=True) is None


def test_its_name_for_people() -> None:
    texts = "square centimeters, m*s^{-2}, dollars, red balls, J/(kg*K), miles per hour, ℃, 平方厘米, KWH"
    names = "cm^2, m/s^2, dollar, red balls, J/(kg*K), mi/h, °C, cm^2, kWh"
    assert [str(unit(text)) for text in texts.split(", ")] == names.split(", ")


@given(
    st.text(max_size=80) | st.text(alphabet="kmsqCG°/*^-{}() 2.千米个每 of per square", max_size=61),
    st.booleans(),
)
def test_any_text_is_read(text: str, upright: bool) -> None:
    found = read_unit(text, upright=upright)
    assert found is None or (found.same(found) and not found.same(unit("blue horses")))


def test_pint_is_loaded_only_to_compare_different_names() -> None:
    code = (
        "import sys\nfrom rlcs.grading.measures import read_unit as read\n"
        "one, other, third = (read(text, upright=True) for text in ('cm^2', '平方厘米', 'apples'))\n"
        "assert one.same(other) and not one.same(third) and 'pint' not in sys.modules\n"
        "assert not one.same(read('m^2', upright=True)) and 'pint' not in sys.modules\n"
        "assert not one.same(read('hectare', upright=True)) and 'pint' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
