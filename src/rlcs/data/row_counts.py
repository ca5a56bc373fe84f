"""Counts what a user should know of rows that could be read."""

from collections import Counter

from rlcs.data.row_notes import counted
from rlcs.data.rows import Row

_SHOWN_ENDING = 60


class RowCounts:
    """Counts what a user should know of rows that could be read: their gold answers and system prompts."""

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self._marks: Counter[str] = Counter()
        self._example = ""
        self._own_systems = 0
        self._system_used = False

    def add(self, row: Row) -> None:
        """Count the next row."""
        if row.mark:
            self._example = self._example or _unwrapped_example(row)
            self._marks[row.mark] += 1
        if row.own_system:
            self._own_systems += 1
            self._system_used |= any(turn.role == "system" for turn in row.problem.history)

    def merge(self, later: "RowCounts") -> None:
        """Add what was counted of the rows that follow."""
        self._marks.update(later._marks)
        self._example = self._example or later._example
        self._own_systems += later._own_systems
        self._system_used |= later._system_used

    @property
    def lines(self) -> tuple[str, ...]:
        """How many gold answers were unwrapped, from what, and how many rows have a system prompt."""
        lines = []
        if self._marks:
            marks = ", ".join(f"{mark}: {n:,}" for mark, n in self._marks.most_common())
            total = self._marks.total()
            lines.append(f"{total:,} gold answers were unwrapped ({marks}), e.g. {self._example}")
        if self._own_systems:
            how = "used instead of prompt.system" if self._system_used else "left out (data.system=recipe)"
            lines.append(f"{counted(self._own_systems)} with a system prompt in the data, {how}")
        return tuple(lines)


def _unwrapped_example(row: Row) -> str:
    given = row.given if len(row.given) <= _SHOWN_ENDING else f"...{row.given[-_SHOWN_ENDING:]}"
    return f"row {row.problem.id}: {given!r} is {row.problem.answer[:_SHOWN_ENDING]!r}"
