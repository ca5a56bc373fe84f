"""Groups rows that cannot be used by their reasons, and shows the kinds of gold answers, in short lines."""

import re
from collections.abc import Mapping, Sequence

from rlcs.data.row_notes import counted
from rlcs.data.rows import BadRow
from rlcs.data.tally import Kind

_PLACES = 3
"""Rows of each fault that are named."""
_MAX_KINDS = 20
"""Kinds of faults that are shown."""
_MAX_LINE = 300
"""Characters of a line, so that no message shows the content of a file."""
_MAX_PLACE = 80
_PLACE = re.compile(r"(.*?)(?:([:#])(\d+))?", re.DOTALL)
"""A file, and the line or row in it."""
_MIN_SHOWN = 12
"""Characters of an example that are shown, however narrow the terminal is."""
_VARYING = re.compile(
    r"(?<!\w)'(?:[^'\\]|\\.)*(?:'|$)|\"(?:[^\"\\]|\\.)*(?:\"|$)|\S*[/\\]\S*|\S*\d\S*|\S+\.[A-Za-z]{2,5}(?=[\s:,;]|$)"
)
"""What differs between two rows with the same fault: quoted texts, paths, words with digits, file names."""


def kind_lines(kinds: Mapping[str, Kind], *, columns: int = 80) -> list[str]:
    """A table of the kinds of gold answers: number of rows, and one example of each, cut to `columns`."""
    if not kinds:
        return []
    width = max(len("gold answers"), *map(len, kinds))
    lines = [f"{'gold answers':<{width}} {'rows':>8}  example"]
    for name, kind in kinds.items():
        start, end = f"{name:<{width}} {kind.rows:>8,}  ", f"  (id {_one_line(kind.id)})"
        example = _one_line(kind.answer, max(_MIN_SHOWN, columns - len(start) - len(end)))
        lines.append(start + example + end)
    return lines


def _one_line(text: str, most: int = 40) -> str:
    """One line of a text, its first characters if it is too long."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most and len(text) <= 4 * most else f"{line[: most - 3]}..."


def grouped(bad: Sequence[BadRow]) -> list[str]:
    """A line for each kind of fault, the most frequent first: how many rows have it, the first of them, why.

    Reasons that differ only in names, paths and numbers are one kind. The number and length of the lines are
    bounded, however many rows there are and whatever stands in them.
    """
    groups: dict[str, list[BadRow]] = {}
    for row in bad:
        groups.setdefault(_kind_of(row), []).append(row)
    kinds = sorted(groups.values(), key=len, reverse=True)
    lines = [_kind_line(rows) for rows in kinds[:_MAX_KINDS]]
    if rest := kinds[_MAX_KINDS:]:
        lines.append(f"{counted(sum(map(len, rest)))} with {len(rest):,} further kinds of faults")
    return lines


def _kind_of(row: BadRow) -> str:
    reason = row.reason.replace(row.subject, "", 1) if row.subject else row.reason
    return _VARYING.sub("", reason[: 2 * _MAX_LINE])


def _kind_line(rows: Sequence[BadRow]) -> str:
    first = rows[0]
    if len(rows) == 1:
        return _one_line(str(first), _MAX_LINE)
    same = all(row.reason == first.reason for row in rows)
    head = f"{len(rows):,} rows (first: {', '.join(places(rows))}): {'' if same else 'for example '}"
    return head + _one_line(first.reason, max(_MIN_SHOWN, _MAX_LINE - len(head)))


def places(rows: Sequence[BadRow]) -> list[str]:
    """Where the first rows are: `rows.jsonl:3`, then `:9` for another row of the same file; or their ids."""
    shown, before = [], ""
    for row in rows[:_PLACES]:
        file, mark, number = _PLACE.fullmatch(row.where).groups("")  # type: ignore[union-attr]
        own = f"{mark}{number}" if mark else f" id {_one_line(row.id)}" if row.id else ""
        where = (own.strip() or file) if file == before else f"{file}{own}"
        shown.append(where if len(where) <= _MAX_PLACE else f"...{where[-_MAX_PLACE:]}")
        before = file
    return shown
