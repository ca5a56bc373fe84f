"""Answers that are dates, times of day or ranges and not sums: `2024-05-01`, `12:30 PM`, `5-10`."""

import datetime
import functools
import re
from dataclasses import dataclass

from rlcs.grading.measures import Unit, read_unit

_MONTHS = "January February March April May June July August September October November December".split()
_MONTH = r"(?P<month>" + "|".join(f"{name}|{name[:3]}\\.?" for name in _MONTHS) + r"|Sept\.?)"
_FIGURE = r"(?P<day>0?[1-9]|[12]\d|3[01])"
_YEAR, _DAY = r"(?P<year>[1-9]\d{3})", _FIGURE + r"(?:st|nd|rd|th)?"
_WEEKDAY = r"(?:(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day,? )?(?:the )?"
_DATES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_WEEKDAY}{_MONTH} {_DAY}(?:,? ?{_YEAR})?",
        rf"{_WEEKDAY}{_DAY} (?:of )?{_MONTH}(?:,? ?{_YEAR})?",
        rf"{_MONTH},? {_YEAR}",
        rf"{_YEAR}(?P<mark>[-/.])(?P<number>\d{{1,2}})(?P=mark){_FIGURE}",
        rf"(?P<number>\d{{1,2}})(?P<mark>[-/.]){_FIGURE}(?P=mark){_YEAR}",
        rf"(?:{_YEAR} ?年 ?)?(?P<number>\d{{1,2}}) ?月 ?{_FIGURE} ?[日号]",
        rf"{_YEAR} ?年 ?(?P<number>\d{{1,2}}) ?月",
    )
]
_TIME = re.compile(r"(\d{1,2})(?::(\d\d))?(?::(\d\d))? ?(?:([ap])\.? ?m\.?|o'? ?clock)", re.IGNORECASE)
_RANGE = re.compile(r"(\d{1,12}) ?-{1,3} ?(\d{1,12})(?: ?([^\W\d].+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Date:
    """A date, a time of day or a range of whole numbers; `str()` says it in words."""

    kind: str
    """`date`, `time` or `range`."""
    readings: tuple[tuple[int, ...], ...]
    """Each way to read it: year, month, day (0: left out); hour, minute, second; or first and last number."""
    unit: Unit | None = None
    """The unit of a range: `10-15 years`."""

    def same(self, other: "Date") -> bool:
        """Whether both say the same: May 1, 2024 and 2024-05-01; not 10:30 a.m. and 10:30 p.m.

        A date in figures that can begin with the month or with the day (1/2/2024) agrees with both dates in
        words, but not with the other order of figures (2/1/2024). Units may be left off.
        """
        if self.kind != other.kind or (self.unit and other.unit and not self.unit.same(other.unit)):
            return False
        if len(self.readings) == len(other.readings):
            return self.readings == other.readings
        return bool(set(self.readings) & set(other.readings))

    def __str__(self) -> str:
        text = " or ".join(_shown(self.kind, reading) for reading in self.readings)
        return f"{text} {self.unit}" if self.unit else text


@functools.lru_cache(4096)
def read_date(text: str) -> Date | None:
    """The date, time or range that a whole answer is, or None: 1/2 is a quotient, 9:05 may be a ratio."""
    text = " ".join(text.split()).rstrip(".。")
    if len(text) > 60 or not any(char.isdigit() for char in text) or not text.isprintable():
        return None
    if match := _RANGE.fullmatch(text):
        return _range(match)
    if match := _TIME.fullmatch(text):
        return _time(match)
    found = next((match for pattern in _DATES if (match := pattern.fullmatch(text))), None)
    if not found:
        return None
    parts = found.groupdict()
    year, day = int(parts.get("year") or 0), int(parts.get("day") or 0)
    month = int(parts.get("number") or 0)
    if not month and parts.get("month"):
        month = 1 + [name[:3] for name in _MONTHS].index(parts["month"][:3].title())
    both = parts.get("mark") and not text[:4].isdigit() and month != day
    orders = [(year, month, day), (year, day, month)] if both else [(year, month, day)]
    readings = tuple(order for order in orders if _exists(*order))
    return Date(kind="date", readings=readings) if readings else None


def _exists(year: int, month: int, day: int) -> bool:
    """Whether the calendar has a date; 0 stands for a year or a day that was left out."""
    try:
        return bool(datetime.date(year or 2000, month, day or 1))
    except ValueError:
        return False


def _time(match: re.Match[str]) -> Date | None:
    """A time of day; an hour "o'clock" is before or after noon."""
    hour, minute, second = (int(part or 0) for part in match.groups()[:3])
    half = (match[4] or "").lower()
    if hour > 23 or minute > 59 or second > 59 or (half and hour == 0) or (half == "a" and hour > 12):
        return None
    hours = [hour] if hour > 12 else [hour % 12, hour % 12 + 12]
    if half and hour <= 12:
        hours = [hours["ap".index(half)]]
    return Date(kind="time", readings=tuple((each, minute, second) for each in hours))


def _range(match: re.Match[str]) -> Date | None:
    """A range of whole numbers, maybe with a unit; in `1998-99` the last year is shortened."""
    first, last = int(match[1]), int(match[2])
    unit = read_unit(match[3], upright=False) if match[3] else None
    if match[3] and not unit:
        return None
    if len(match[1]) == 4 and len(match[2]) == 2:
        last += first // 100 * 100 + (100 if last < first % 100 else 0)
    return Date(kind="range", readings=((first, last),), unit=unit)


def _shown(kind: str, reading: tuple[int, ...]) -> str:
    """One reading in words."""
    if kind == "range":
        return f"{reading[0]} to {reading[1]}"
    if kind == "time":
        seconds = f":{reading[2]:02}" if reading[2] else ""
        return f"{(reading[0] - 1) % 12 + 1}:{reading[1]:02}{seconds} {'AP'[reading[0] > 11]}M"
    year, month, day = reading
    return " ".join([str(day)] * bool(day) + [_MONTHS[month - 1]] + [str(year)] * bool(year))
