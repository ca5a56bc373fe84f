"""The built-in teacher's longer chains of thought, written by a program from what was drawn.

A description is what was drawn, a wrong attempt comes from a scene misread, a criticism names the lines in
which draft and scene differ.
"""

from collections.abc import Callable, Mapping
from itertools import zip_longest

from rlcs.data.puzzles.family import Solution, boxed


def write(chain: str, draft: Solution, final: Solution) -> str:
    """The response in one kind of chain of thought: it ends in `final`, and may begin with `draft`."""
    return _WRITERS[chain](draft, final)


def _caption(draft: Solution, final: Solution) -> str:
    return "\n".join(("The image shows:", final.reading, "So:", *final.steps, boxed(final.answer)))


def _reflection(draft: Solution, final: Solution) -> str:
    return f"{_attempt(draft)}\nWait, let me look again.\n{_faults(draft, final)}\n{final.text()}"


def _self_critic(draft: Solution, final: Solution) -> str:
    return f"{_attempt(draft)}\nCriticism: {_faults(draft, final)}\nImproved answer:\n{final.text()}"


def _attempt(draft: Solution) -> str:
    """A solution whose answer is not final: not in a box."""
    return "\n".join((draft.reading, *draft.steps, str(draft.answer)))


def _faults(draft: Solution, final: Solution) -> str:
    """The first line of what was read in which two solutions differ."""
    pairs = zip_longest(draft.reading.split("\n"), final.reading.split("\n"), fillvalue="")
    wrong = next(((a, b) for a, b in pairs if a != b), None)
    return "no fault." if wrong is None else f"I read {wrong[0]}, but it is {wrong[1]}."


_WRITERS: Mapping[str, Callable[[Solution, Solution], str]] = {
    "caption": _caption,
    "reflection": _reflection,
    "self_critic": _self_critic,
}
