"""The built-in teacher's longer chains of thought, written by a program from the scene of the image.

A description lists the scene, a wrong attempt solves a misread scene, and a criticism names the first line in
which draft and scene differ.
"""

from collections.abc import Callable, Mapping
from itertools import zip_longest

from rlcs.data.puzzles.family import Solution, boxed


def write(chain: str, draft: Solution, final: Solution) -> str:
    """Write a response in one kind of chain of thought: it may begin with `draft` and ends in `final`."""
    return _WRITERS[chain](draft, final)


def _caption(draft: Solution, final: Solution) -> str:
    return "\n".join(("The image shows:", final.reading, "So:", *final.steps, boxed(final.answer)))


def _reflection(draft: Solution, final: Solution) -> str:
    return f"{_attempt(draft)}\nWait, let me look again.\n{_faults(draft, final)}\n{final.text()}"


def _self_critic(draft: Solution, final: Solution) -> str:
    return f"{_attempt(draft)}\nCriticism: {_faults(draft, final)}\nImproved answer:\n{final.text()}"


def _attempt(draft: Solution) -> str:
    """Write a solution without a box around its answer, which is not final."""
    return "\n".join((draft.reading, *draft.steps, str(draft.answer)))


def _faults(draft: Solution, final: Solution) -> str:
    """Name the first line of the readings in which two solutions differ."""
    pairs = zip_longest(draft.reading.split("\n"), final.reading.split("\n"), fillvalue="")
    return next((f"I read {a}, but it is {b}." for a, b in pairs if a != b), "no fault.")


_WRITERS: Mapping[str, Callable[[Solution, Solution], str]] = {
    "caption": _caption,
    "reflection": _reflection,
    "self_critic": _self_critic,
}
