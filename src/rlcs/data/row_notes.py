"""Counts what a user should know about the rows of a source that can be used."""

from collections import Counter


class RowNotes:
    """Notes about rows, each kind once, with a count and the first row."""

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self._layouts: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def layout(self, name: str) -> None:
        """Count a row of a layout of another tool."""
        self._layouts[name] += 1

    def differing(self, kept: str, other: str, where: str) -> None:
        """Count a row in which two columns for the same thing have different values."""
        self._add(f"columns {_named(kept)} and {_named(other)} differ, and {_named(kept)} counts", where)

    def unread_image(self, column: str, where: str) -> None:
        """Count a row without images, in which a column that is not read holds one."""
        fix = f"set data.columns.images=[{_named(column)}] if it is one of the question"
        self._add(f"column {_named(column)} holds an image and is not read: {fix}", where)

    def repeated_id(self, where: str) -> None:
        """Count a row whose id another row has."""
        self._add("the id of another row comes again, and has the row number added", where)

    def _add(self, note: str, where: str) -> None:
        self._counts[note] += 1
        self._first.setdefault(note, where)

    def merge(self, later: "RowNotes") -> None:
        """Add what was counted of the rows that follow."""
        self._layouts.update(later._layouts)
        self._counts.update(later._counts)
        self._first = later._first | self._first

    @property
    def lines(self) -> tuple[str, ...]:
        """One line for each kind of note."""
        layouts = [f"{counted(n)} read as {name}" for name, n in self._layouts.most_common()]
        others = [
            f"{note} ({counted(n)}, first {self._first[note]})" for note, n in self._counts.most_common()
        ]
        return (*layouts, *others)


def counted(rows: int) -> str:
    """A number of rows: `1 row`, `2,000 rows`."""
    return f"{rows:,} row{'s' if rows != 1 else ''}"


def _named(column: str) -> str:
    """A column's name for messages."""
    return column if len(column) <= 60 else f"{column[:60]}..."
