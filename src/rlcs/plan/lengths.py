"""The lengths of answers in a step: a log-normal distribution of a given mean, cut at the limit.

Fixed quantiles stand for random draws, so that a plan does not change from one call to the next, and the
longest of many answers is as long as it would be on average.
"""

import math
import random
from functools import lru_cache
from statistics import NormalDist

import numpy as np


@lru_cache(maxsize=64)
def group_lengths(
    groups: int, size: int, *, mean: int, limit: int, spread: float
) -> tuple[tuple[int, ...], ...]:
    """The lengths of `size` answers of each group, between 1 and `limit` tokens.

    `spread` is the standard deviation of the uncut distribution as a share of its mean; the mean of the cut
    one is `mean`.
    """
    count = groups * size
    mean = min(mean, limit)
    sigma = math.sqrt(math.log(1 + spread**2))
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])

    def cut(middle: float) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        return np.clip(np.exp(middle + sigma * quantiles), 1, limit)

    low, high = 0.0, math.log(limit) + 4 * sigma
    for _ in range(50):  # the median of the uncut distribution whose cut one has the mean
        middle = (low + high) / 2
        low, high = (middle, high) if cut(middle).mean() < mean else (low, middle)
    lengths = [round(length) for length in cut(high).tolist()]
    random.Random(0).shuffle(lengths)
    return tuple(tuple(lengths[i : i + size]) for i in range(0, count, size))
