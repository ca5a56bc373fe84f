"""Rows and problems that lie on disk, as sequences; and what is asked of rows wherever they are.

The functions here take either kind of sequence. What they ask of all rows comes from the columns of an index
where there is one: to read a million rows takes seconds.
"""

import hashlib
import heapq
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

from rlcs.data.row_index import Column, RowIndex, id_hash, pass_rate_of, pixels_of, row_digest
from rlcs.data.rows import Row
from rlcs.records import Problem

T = TypeVar("T", Row, Problem)


class Stored(Sequence[T], Generic[T]):
    """Some rows of an index in their order, each read when it is asked for: as rows, or as problems."""

    def __init__(self, index: RowIndex, kind: type[T], places: "range | array[int] | None" = None) -> None:
        """Take the rows at `places` of the index; None: all."""
        self._index = index
        self._kind: type[T] = kind
        self.places: range | array[int] = range(index.head.rows) if places is None else places

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.places)

    @overload
    def __getitem__(self, at: int) -> T: ...

    @overload
    def __getitem__(self, at: slice) -> "Stored[T]": ...

    def __getitem__(self, at: int | slice) -> "T | Stored[T]":
        """Read a row, or take a part of the rows, which reads none."""
        if isinstance(at, slice):
            return self.part(self.places[at])
        return self._read(self.places[at])

    def __iter__(self) -> Iterator[T]:
        """Read one row after the other."""
        return map(self._read, self.places)

    def _read(self, place: int) -> T:
        row = self._index.row(place)
        return row if self._kind is Row else row.problem  # type: ignore[return-value]

    def part(self, places: "range | array[int]") -> "Stored[T]":
        """The rows at these places of the index."""
        return Stored(self._index, self._kind, places)

    def at(self, positions: Iterable[int]) -> "Stored[T]":
        """The rows at these positions of this sequence."""
        return self.part(array("Q", [self.places[position] for position in positions]))

    @property
    def rows(self) -> "Stored[Row]":
        """The same rows, as rows."""
        return Stored(self._index, Row, self.places)

    @property
    def problems(self) -> "Stored[Problem]":
        """The same rows, as problems."""
        return Stored(self._index, Problem, self.places)

    def column(self, name: Column) -> Iterator[Any]:
        """A number for each row."""
        return map(self._index.column(name).__getitem__, self.places)

    def without(self, ids: Collection[str]) -> "Stored[T]":
        """The rows but those of these ids."""
        hashes = set(map(id_hash, ids))
        kept = array("Q")
        for place, each in zip(self.places, self.column("id"), strict=True):
            if each not in hashes or self._index.row(place).problem.id not in ids:
                kept.append(place)
        return self.part(kept)

    @property
    def identity(self) -> str:
        """The same identity is the same rows in the same order."""
        chosen = repr(self.places).encode() if isinstance(self.places, range) else self.places.tobytes()
        return f"{self._index.key}-{hashlib.sha256(chosen).hexdigest()[:16]}"

    def remember(self, name: str, about: object, find_out: Callable[[], Any]) -> Any:
        """A fact about these rows, as JSON; see `RowIndex.remember`."""
        return self._index.remember(name, [self.identity, about], find_out)


def problems_of(rows: Sequence[Row]) -> Sequence[Problem]:
    """The problems of rows."""
    return rows.problems if isinstance(rows, Stored) else tuple(row.problem for row in rows)


def rows_of(problems: Sequence[Problem]) -> Sequence[Row]:
    """The rows of problems; those that no file has are made."""
    if isinstance(problems, Stored):
        return problems.rows
    return tuple(Row(problem=problem, response=None) for problem in problems)


def without(items: Sequence[T], ids: Collection[str]) -> Sequence[T]:
    """The rows or problems but those of these ids."""
    if not ids:
        return items
    return items.without(ids) if isinstance(items, Stored) else tuple(x for x in items if id_of(x) not in ids)


def digests_of(items: Sequence[T]) -> str:
    """The digests of rows (with their responses) or problems (without), one after the other."""
    if isinstance(items, Stored):
        return "".join(f"{digest:08x}" for digest in items.column("digest"))
    return "".join(row_digest(x.problem, x.response) if isinstance(x, Row) else row_digest(x) for x in items)


def all_answered(rows: Sequence[Row]) -> bool:
    """Whether each row has a response."""
    if isinstance(rows, Stored):
        return all(rows.column("answered"))
    return all(row.response is not None for row in rows)


def number_blind(problems: Sequence[Problem]) -> int:
    """How many problems have no image."""
    return sum(pixels == 0 for pixels in _pixels(problems))


def with_images_among(problems: Sequence[Problem]) -> Sequence[Problem]:
    """The problems that have images."""
    return chosen(problems, [position for position, pixels in enumerate(_pixels(problems)) if pixels])


def with_most_pixels(problems: Sequence[Problem], most: int) -> list[Problem]:
    """So many problems with the largest images, the largest first."""
    largest = heapq.nlargest(most, enumerate(_pixels(problems)), key=lambda each: each[1])
    return [problems[position] for position, _ in largest]


def _pixels(problems: Sequence[Problem]) -> Iterator[int]:
    return problems.column("pixels") if isinstance(problems, Stored) else map(pixels_of, problems)


def pass_rates(problems: Sequence[Problem]) -> Iterator[float]:
    """The `pass_rate` of each problem; NaN without one."""
    return problems.column("pass_rate") if isinstance(problems, Stored) else map(pass_rate_of, problems)


def chosen(items: Sequence[T], positions: Iterable[int]) -> Sequence[T]:
    """The rows or problems at these positions."""
    return items.at(positions) if isinstance(items, Stored) else tuple(items[at] for at in positions)


def remembered(items: Sequence[Any], name: str, about: object, find_out: Callable[[], Any]) -> Any:
    """A fact about rows as JSON, which is found out once for those that lie on disk.

    `about` is all else that the fact depends on.
    """
    return items.remember(name, about, find_out) if isinstance(items, Stored) else find_out()


def id_of(item: Row | Problem) -> str:
    """The id of a row or problem."""
    return item.problem.id if isinstance(item, Row) else item.id
