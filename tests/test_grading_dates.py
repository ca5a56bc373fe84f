"""Dates, times of day and ranges: which texts are one, and which of them are the same."""

import datetime
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlcs.grading.dates import Date, read_date

SAME = [
    "2024-05-01; 2024/5/1; 2024.05.01; May 1, 2024; May 1st, 2024; 1 May 2024; 1st of May 2024; 2024年5月1日",
    "2024-05-08; Wednesday, May 8, 2024",
    "12/25/2020; 25/12/2020; 2020-12-25; Dec. 25, 2020; December 25 2020",
    "May 5; May 5th; 5 May; the 5th of May; 5月5日; 5 月 5 号",
    "Feb 29; February 29",
    "Sept. 2024; September 2024; Sep 2024; 2024年9月",
    "12:30 PM; 12:30 pm; 12:30 p.m.; 12:30pm; 12:30:00 PM",
    "10:30 a.m.; 10:30 AM",
    "3 PM; 3:00 pm; 15:00 PM",
    "12 a.m.; 12:00 AM",
    "2007-2008; 2007--2008; 2007 - 2008; 2007-08",
    "1999-2000; 1999-00",
    "5-10; 5--10; 5---10",
    "10-15 years; 10-15; 10 - 15 years",
]
DIFFERENT = (
    "May 5|May 6; May 5|May 5, 2024; May 2024|May 1, 2024; 10:30 a.m.|10:30 p.m.; 1/2/2024|2/1/2024; "
    "12:30 PM|12:30 AM; 2024-05-01|2024-01-05; 5-10|10-5; 10-15 years|10-15 months; 5-10|May 10; "
    "3 PM|3:01 PM; 2007-2008|2007-2009"
)
NOTHING = (
    "|Monday|May|9:05|9:05:30|14:30|1/2|2024|5|2024-13-45|2023-02-29|13/13/2024|2024-5/1|Feb 30|May 0|"
    "June 31|May 5th 24|0:30 AM|13 a.m.|25:00 PM|3:60 PM|-5-10|5-10-15|5-10 x|10-4n|10-4 n|10-4m|"
    "10-4 m|5-3a|x-2|1.5-2.5|1.2.3|5 apples|1/2/24|0000-01-01|2024年13月1日|²-3"
)


def date(text: str) -> Date:
    found = read_date(text)
    assert found, f"{text!r} is no date"
    return found


@pytest.mark.parametrize("row", SAME, ids=lambda row: row.split(";")[0])
def test_the_same_in_every_spelling(row: str) -> None:
    for one, other in itertools.product(map(date, row.split("; ")), repeat=2):
        assert one.same(other), (one, other)


@pytest.mark.parametrize("row", DIFFERENT.split("; "))
def test_different_ones_never_agree(row: str) -> None:
    one, other = map(date, row.split("|"))
    assert not one.same(other) and not other.same(one)


def test_rows_differ() -> None:
    rows = [[date(text) for text in row.split("; ")] for row in SAME]
    for one, other in itertools.permutations(rows, 2):
        assert not [pair for pair in itertools.product(one, other) if pair[0].same(pair[1])]


def test_what_can_be_read_in_two_ways_agrees_with_both() -> None:
    figures = date("1/2/2024")
    assert str(figures) == "2 January 2024 or 1 February 2024" and figures.same(date("1-2-2024"))
    assert figures.same(date("January 2, 2024")) and date("2024-02-01").same(figures)
    assert date("3 o'clock").same(date("3 PM")) and date("3 AM").same(date("3 o'clock"))
    assert not date("3 o'clock").same(date("4 PM"))


@pytest.mark.parametrize("text", NOTHING.split("|"))
def test_what_is_no_date(text: str) -> None:
    assert read_date(text) is None


def test_its_words_for_people() -> None:
    texts = "2024-05-01; 5/5/2024; 5月1日; Sept 2024; 12:30 pm; 12:05:09 am; 1998-99; 10-15 cm"
    words = "1 May 2024; 5 May 2024; 1 May; September 2024; 12:30 PM; 12:05:09 AM; 1998 to 1999; 10 to 15 cm"
    assert [str(date(text)) for text in texts.split("; ")] == words.split("; ")


@given(st.dates(min_value=datetime.date(1000, 1, 2)))
def test_every_day_is_read(day: datetime.date) -> None:
    one, other = date(day.isoformat()), date(f"{day:%B} {day.day}, {day.year}")
    assert one.same(other) and one.readings == ((day.year, day.month, day.day),)
    assert not one.same(date((day - datetime.timedelta(days=1)).isoformat()))


@given(st.text(max_size=80) | st.text(alphabet="0123456789-/.: apmMay年月日,", max_size=61))
def test_any_text_is_read(text: str) -> None:
    found = read_date(text)
    assert found is None or found.same(found)
