"""Looks at rows one after the other and counts what is found, so that none of them has to be held.

What was found in later rows can be added (`merge`), so that other processes may look at them.
"""

from array import array
from dataclasses import dataclass

from rlcs.data.rows import BadRow, Row, RowReader
from rlcs.data.scanner import ScanTask
from rlcs.grading import GradePool
from rlcs.grading.inspection import Doubt, equal_options, inspect_gold
from rlcs.grading.reading import read
from rlcs.records import Problem

_PIXELS_A_TOKEN = 28 * 28
_BYTES_A_TOKEN = 4


@dataclass(kw_only=True, slots=True)
class Kind:
    """How many gold answers are read as one kind, and the first of them: its place, row id and text."""

    rows: int
    place: int
    id: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLimit:
    """The most tokens of a prompt, and the most pixels of an image, to which larger ones are shrunk."""

    tokens: int
    pixels: int

    def estimate(self, problem: Problem) -> int:
        """About how many tokens the prompt of a problem has."""
        pixels = sum([min(ref.width * ref.height, self.pixels) for ref in problem.images])
        text = "".join((*problem.texts, *problem.choices))
        size = len(text) if text.isascii() else len(text.encode())
        return pixels // _PIXELS_A_TOKEN + size // _BYTES_A_TOKEN


class Tally:
    """Counts the rows that can be used, the kinds of their gold answers, and what is odd in them.

    A `place` is a number that grows from row to row: `places` are those of the counted rows. `longest` is the
    longest prompt: tokens and row id.
    """

    def __init__(self, limit: PromptLimit) -> None:
        """Nothing is counted yet."""
        self.places = array("Q")
        self.num_too_long = 0
        self.longest = (0, "")
        self._limit = limit
        self._kinds: dict[str, Kind] = {}
        self._num_alike = 0
        self._first_alike: tuple[int, str] | None = None

    def add(self, place: int, row: Row) -> None:
        """Count a row."""
        problem = row.problem
        self.places.append(place)
        if problem.answer.strip():
            kind = read(problem.answer).kind + (" (with choices)" if problem.choices else "")
            known = self._kinds.get(kind)
            if known is None or place < known.place:
                self._add_kind(kind, Kind(rows=1, place=place, id=problem.id, answer=problem.answer))
            else:
                known.rows += 1
        if problem.choices and (letters := equal_options(problem.choices)):
            self._add_alike(1, (place, f"{letters} of row {problem.id}"))
        tokens = self._limit.estimate(problem)
        self.num_too_long += tokens > self._limit.tokens
        if tokens >= self.longest[0]:
            self.longest = max(self.longest, (tokens, problem.id))

    def merge(self, other: "Tally") -> None:
        """Add what was counted of other rows."""
        self.places.extend(other.places)
        self.num_too_long += other.num_too_long
        self.longest = max(self.longest, other.longest)
        for name, kind in other._kinds.items():
            self._add_kind(name, kind)
        if other._first_alike is not None:
            self._add_alike(other._num_alike, other._first_alike)

    def _add_kind(self, name: str, kind: Kind) -> None:
        known = self._kinds.get(name)
        if known is None:
            self._kinds[name] = kind
            return
        known.rows += kind.rows
        if kind.place < known.place:
            known.place, known.id, known.answer = kind.place, kind.id, kind.answer

    def _add_alike(self, count: int, first: tuple[int, str]) -> None:
        self._num_alike += count
        self._first_alike = min(self._first_alike or first, first)

    @property
    def rows(self) -> int:
        """The number of rows that can be used."""
        return len(self.places)

    @property
    def kinds(self) -> dict[str, Kind]:
        """The kinds of gold answers, the most frequent first."""
        return dict(sorted(self._kinds.items(), key=lambda each: (-each[1].rows, each[1].place)))

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd in choices and yet can be graded: two options that are written alike."""
        if self._first_alike is None:
            return ()
        return (f"rows with two equal options: {self._num_alike:,}, e.g. {self._first_alike[1]}",)


class RowCheck:
    """Tries the gold answers of rows, and counts the rows that can be used.

    A gold answer is one that can be matched if it is right as an answer to itself, by all of our rule.
    """

    def __init__(self, limit: PromptLimit, *, golds: bool) -> None:
        """Nothing is found yet; without `golds` the gold answers are not tried."""
        self.tally = Tally(limit)
        self._golds = golds
        self._refused: list[tuple[int, BadRow]] = []
        self._doubtful: list[tuple[int, Row, bool, Doubt]] = []

    def add(self, place: int, row: Row, *, usable: bool = True) -> None:
        """Try the gold answer of a row to be answered; a row that is not `usable` anyway is not counted."""
        problem = row.problem
        tried = self._golds and row.response is None
        found = inspect_gold(problem.answer, problem.choices) if tried else None
        if isinstance(found, Doubt):
            self._doubtful.append((place, row, usable, found))
        elif found:
            self._refused.append((place, row.refused(found)))
        elif usable:
            self.tally.add(place, row)

    def merge(self, other: "RowCheck") -> None:
        """Add what was found in other rows."""
        self.tally.merge(other.tally)
        self._refused += other._refused
        self._doubtful += other._doubtful

    def settle(self) -> list[BadRow]:
        """The rows whose gold answers nothing can match; math-verify decides about those in doubt."""
        if self._doubtful:
            golds = {(row.problem.answer, row.problem.choices): found for _, row, _, found in self._doubtful}
            with GradePool(workers=0) as pool:
                faults = pool.settle_golds(golds)
            for place, row, usable, _ in self._doubtful:
                if fault := faults.get((row.problem.answer, row.problem.choices)):
                    self._refused.append((place, row.refused(fault)))
                elif usable:
                    self.tally.add(place, row)
            self._doubtful = []
        return [bad for _, bad in sorted(self._refused, key=lambda each: each[0])]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckTask(ScanTask[RowCheck]):
    """To check all rows; every image is decoded."""

    prompt_limit: PromptLimit

    def reader(self) -> RowReader:
        """See `ScanTask`."""
        reader = RowReader(self.table, self.settings, role=self.role, limit=self.decode_limit, decode=True)
        reader.images.hold_no_bytes()
        return reader

    def sink(self) -> RowCheck:
        """See `ScanTask`."""
        return RowCheck(self.prompt_limit, golds=self.settings.answers == "unwrapped")
