"""What a model answers right without seeing the image, and what its gains rest on: pure functions.

The problems of a set are split in two: those that some measured model answered right blind, which do not need
the image, and all others. Every model decides, not the first alone: a split by one model's luck would favour
that model in one part and the others in the other.

In multiple choice a blind answer is right by chance, too: compare with the chance level.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rlcs.evals.intervals import interval_of_mean
from rlcs.evals.scores import with_interval

Shares = Mapping[str, float]
"""The share of right answers to each problem, by id; with one answer 0 or 1."""
GUESSED = 0.5
"""A problem whose blind answers are right in at least this share does not need the image."""


def split_gains(
    seeing: Mapping[str, Shares],
    blind: Mapping[str, Shares],
    *,
    pairs: Sequence[tuple[str, str]],
    chance: float,
) -> dict[str, Any]:
    """Accuracy of each model (or arm) with and without the image, and in both parts of the problems.

    Counted are the problems that every model in `blind` answered with the image and without. Each pair
    (model, another) gets its gain over the other: overall, on problems that need the image, on those that do
    not, and blind. Accuracies have Wilson intervals, differences are paired (Agresti & Min 2005). `chance` is
    the expected accuracy of guessing among choices.
    """
    models = [name for name in seeing if name in blind]
    ids = [key for key in seeing[models[0]] if all(key in seeing[m] and key in blind[m] for m in models)]
    guessed = [key for key in ids if any(blind[model][key] >= GUESSED for model in models)]
    left = set(guessed)
    needs = [key for key in ids if key not in left]
    return {
        "n": len(ids),
        "chance": chance,
        "without_need": len(guessed),
        "arms": {
            model: {
                "seeing": _accuracy(seeing[model], ids),
                "blind": _accuracy(blind[model], ids),
                "seeing_minus_blind": _difference(blind[model], seeing[model], ids),
                "needs_image": _accuracy(seeing[model], needs),
                "without_need": _accuracy(seeing[model], guessed),
            }
            for model in models
        },
        "gains": [
            {
                "arm": arm,
                "against": other,
                "all": _difference(seeing[other], seeing[arm], ids),
                "needs_image": _difference(seeing[other], seeing[arm], needs),
                "without_need": _difference(seeing[other], seeing[arm], guessed),
                "blind": _difference(blind[other], blind[arm], ids),
            }
            for arm, other in pairs
            if arm in models and other in models
        ],
    }


def _accuracy(shares: Shares, ids: Sequence[str]) -> dict[str, float]:
    values = [shares[key] for key in ids]
    return {**with_interval(fmean(values) if values else 0.0, len(values)), "n": len(values)}


def _difference(first: Shares, second: Shares, ids: Sequence[str]) -> dict[str, float]:
    """Mean of second - first over the problems, with its 95% interval."""
    moves = [second[key] - first[key] for key in ids]
    if not moves:
        return {"points": 0.0, "low": -1.0, "high": 1.0, "n": 0}
    low, high = interval_of_mean(moves)
    return {"points": fmean(moves), "low": max(-1.0, low), "high": min(1.0, high), "n": len(moves)}
