r"""Converts inequalities in one variable to intervals: `1 < x \le 2` is `(1,2]`."""

import re

_RELATION = re.compile(r"(<|>|\\[lg]e(?![A-Za-z]))")
_VARIABLE = re.compile(r"[A-Za-z]|\\(?:alpha|beta|theta|lambda|mu|omega|phi) ?")
_MAX_LENGTH = 200


def is_inequality(text: str) -> bool:
    """Whether a normalised answer has an order relation."""
    return bool(_RELATION.search(text))


def as_interval(text: str) -> str:
    """Convert a normalised inequality to an interval; return any other text unchanged."""
    if len(text) > _MAX_LENGTH:
        return text
    parts = [part.strip() for part in _RELATION.split(text)]
    if len(parts) == 3:  # x < 2 is -\infty < x < 2, and 2 > x as well
        if not _VARIABLE.fullmatch(parts[0]):
            parts = [parts[2], _turned(parts[1]), parts[0]]
        upper = parts[1] in ("<", "\\le")
        parts = ["-\\infty", "<", *parts] if upper else ["\\infty", ">", *parts]
    if len(parts) != 5 or not _VARIABLE.fullmatch(parts[2]):
        return text
    low, first, _, second, high = parts
    if {first, second} <= {">", "\\ge"}:
        low, first, second, high = high, _turned(second), _turned(first), low
    if not {first, second} <= {"<", "\\le"}:
        return text
    return f"{'(' if first == '<' else '['}{low},{high}{')' if second == '<' else ']'}"


def _turned(relation: str) -> str:
    return {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}[relation]
