"""The time of decoding, step by step of the engine: rows that end leave, and the longest answer ends it."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Seconds of one decoding step.

    It reads the weights, and of the experts those that any row is sent to (a row to the share `chosen`), or
    computes with them for every row, if that takes longer; then reads the cache: of every token, of those in
    the last `window`, and the state of each row. No step is shorter than `least`, in which the host prepares
    it.
    """

    weights: float
    row: float
    cached_token: float
    least: float
    experts: float = 0.0
    chosen: float = 0.0
    windowed_token: float = 0.0
    window: int = 0
    state: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """Seconds until the last answer of one engine, and those in which its GPU works.

    `tail` are the seconds with less than a tenth of the rows; `ends` is when each answer ends, in order.
    """

    seconds: float
    busy: float
    tail: float
    ends: tuple[float, ...]


def decode(lengths: Sequence[int], cost: StepCost, *, trunk: float, slots: int) -> Decoded:
    """Decode answers of these lengths on prompts of `trunk` tokens, `slots` at once: one ends, one begins."""
    if not lengths:
        return Decoded(seconds=0.0, busy=0.0, tail=0.0, ends=())
    starts = _starts(lengths, slots)
    stops = starts + np.array(lengths)
    rows, context = np.zeros(stops.max() + 1), np.zeros(stops.max() + 1)
    for at, sign in ((starts, 1.0), (stops, -1.0)):
        np.add.at(rows, at, sign)
        np.add.at(context, at, sign * (trunk - starts))
    alive = np.cumsum(rows)[:-1]
    cached = np.cumsum(context)[:-1] + alive * np.arange(len(alive))
    read = cost.weights + cost.experts * (1 - (1 - cost.chosen) ** alive)
    near = np.minimum(cached, alive * cost.window)  # as if all rows were as long as their mean
    caches = cached * cost.cached_token + near * cost.windowed_token + alive * cost.state
    work = np.maximum(read, alive * cost.row) + caches
    seconds = np.maximum(work, cost.least)
    passed = np.concatenate([[0.0], np.cumsum(seconds)])
    few = alive < 0.1 * min(slots, len(lengths))
    return Decoded(
        seconds=float(passed[-1]),
        busy=float(work.sum()),
        tail=float(seconds[few].sum()),
        ends=tuple(passed[stops].tolist()),
    )


def _starts(lengths: Sequence[int], slots: int) -> NDArray[np.int64]:
    """The step in which each answer begins."""
    free = [0] * min(slots, len(lengths))
    starts = []
    for length in lengths:
        begins = heapq.heappop(free)
        starts.append(begins)
        heapq.heappush(free, begins + length)
    return np.array(starts)
