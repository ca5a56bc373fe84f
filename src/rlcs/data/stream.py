"""An endless stream of shuffled items, which can resume exactly where it was stopped."""

import hashlib
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from rlcs.errors import CheckpointError, DataError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The answers to one problem in a step: how many were scored and right, and do their rewards differ."""

    problem_id: str
    answers: int
    right: int
    signal: bool


def _shuffled(count: int, seed: int, epoch: int) -> "array[int]":
    """Shuffle the indices of one epoch by sorting their hashes: alike on every machine and Python version."""
    order = sorted(range(count), key=lambda i: hashlib.sha256(f"{seed}|{epoch}|{i}".encode()).digest())
    return array("Q", order)


class Resumable(Protocol):
    """A source of data whose position is part of a checkpoint."""

    def state(self) -> dict[str, Any]:
        """The position, for `restore`; can be written as JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises CheckpointError if it belongs to other data or another seed."""
        ...


class Together:
    """Two sources with one position; without the `second` the position is that of the first."""

    def __init__(self, first: Resumable, second: Resumable | None) -> None:
        """Their positions stay their own."""
        self._first, self._second = first, second

    def state(self) -> dict[str, Any]:
        """See `Resumable`."""
        return self._first.state() | ({} if self._second is None else {"second": self._second.state()})

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Resumable`."""
        if self._second is not None:
            self._second.restore(state.get("second", {}))
            state = {name: value for name, value in state.items() if name != "second"}
        self._first.restore(state)


class ProblemStream(Generic[T]):
    """Items (problems or demonstrations) in a new order every epoch, without end.

    The order depends only on seed, epoch and number of items, so `state` is four numbers. A `take` that
    crosses the end of an epoch continues with the next one, and may then return an item twice.
    """

    def __init__(self, problems: Sequence[T], *, seed: int) -> None:
        """Start before the first item of epoch 0. Raises DataError if there are no items."""
        if not problems:
            raise DataError("there are no items to draw", fix="check the data source")
        self._items = problems
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = _shuffled(len(self._items), seed, 0)

    def __len__(self) -> int:
        """Items in one epoch."""
        return len(self._items)

    @property
    def epochs(self) -> float:
        """Passes over the items so far, as a fraction."""
        return self._epoch + self._position / len(self._items)

    def take(self, n: int) -> list[T]:
        """Return the next `n` items."""
        return [self._items[self._next()] for _ in range(n)]

    def _next(self) -> int:
        """The index of the next item in the shuffled order."""
        if self._position == len(self._items):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = _shuffled(len(self._items), self._seed, self._epoch)
        self._position += 1
        return self._order[self._position - 1]

    def peek(self, n: int) -> list[T]:
        """The next `n` items, which `take` will return."""
        state = self.state()
        taken = self.take(n)
        self.restore(state)
        return taken

    def set_aside(self, problem_ids: Collection[str]) -> None:
        """Take note of problems that cannot become prompts; each epoch shows them once all the same."""
        del problem_ids

    def observe(self, outcomes: Iterable[Outcome]) -> dict[str, float]:
        """Take note of a step's answers, on which the shuffled order does not depend; metrics about them."""
        del outcomes
        return {}

    def state(self) -> dict[str, Any]:
        """The position of the stream, for `restore`; can be written as JSON."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "count": len(self._items),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises CheckpointError if it belongs to other data or another seed."""
        current = ProblemStream.state(self)
        if set(state) != set(current) or not all(type(value) is int for value in state.values()):
            raise CheckpointError(f"the data cursor {dict(state)} cannot be read")
        for key, what in (("count", "number of rows"), ("seed", "seed")):
            if state[key] != current[key]:
                raise CheckpointError(
                    f"the {what} was {state[key]} when the run was stopped and is {current[key]} now",
                    where="data cursor",
                    fix="use the same data and seed, or start a new run",
                )
        if state["epoch"] < 0 or not 0 <= state["position"] <= len(self._items):
            raise CheckpointError(f"the data cursor {dict(state)} is out of range")
        if state["epoch"] != self._epoch:  # it takes two seconds for a million rows
            self._order = _shuffled(len(self._items), self._seed, state["epoch"])
        self._epoch, self._position = state["epoch"], state["position"]
