"""Confidence intervals of measured shares and of their differences: pure functions."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of the share `correct / n` (Wilson 1927); z = 1.96 is 95%.

    Unlike the plain normal interval it stays inside [0, 1] and is accurate near both ends.
    Without a measurement (n = 0) it is (0, 1). Raises ValueError unless 0 <= correct <= n.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n}")
    if n == 0:
        return 0.0, 1.0
    share = correct / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def newcombe(first: tuple[float, int], second: tuple[float, int]) -> tuple[float, float]:
    """95% interval of second - first, independent shares as `(share, n)` (Newcombe 1998, method 10)."""
    (a, _), (b, _) = first, second
    (a_low, a_high), (b_low, b_high) = (wilson(round(share * n), n) for share, n in (first, second))
    return b - a - math.hypot(b - b_low, a_high - a), b - a + math.hypot(b_high - b, a - a_low)


def paired_interval(gained: int, lost: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Interval (z = 1.96: 95%) of (gained - lost) / n, each cell raised by one half (Agresti & Min 2005)."""
    more, less, total = gained + 0.5, lost + 0.5, n + 2
    middle = (more - less) / total
    half = z * math.sqrt(more + less - (more - less) ** 2 / total) / total
    return middle - half, middle + half


def interval_of_mean(moves: Sequence[float], z: float = 1.96) -> tuple[float, float]:
    """Interval (z = 1.96: 95%) of the mean of paired differences, one for each problem, between -1 and 1.

    Of whole ones (one answer each) as `paired_interval`; else the normal one, widened by two problems that
    move by half a point of the scale to either side, so that it has a width where no problem moves.
    """
    gained, lost = sum(move > 0 for move in moves), sum(move < 0 for move in moves)
    if all(move in (-1, 0, 1) for move in moves):
        return paired_interval(gained, lost, len(moves), z)
    widened = [*moves, 0.5, -0.5]
    middle, half = fmean(widened), z * stdev(widened) / math.sqrt(len(widened))
    return middle - half, middle + half


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value of `gained` against `lost` problems under equal chances (McNemar 1947)."""
    n, least = gained + lost, min(gained, lost)
    return min(1.0, sum(math.comb(n, i) for i in range(least + 1)) / (1 << n) * 2)
