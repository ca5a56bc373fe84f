"""What went wrong in an answer to a built-in puzzle: the reading of the image, or what followed from it.

An answer states what it reads in the image (its caption). The solution of the puzzle for that reading is what
perception alone leads to: if it is not the gold answer, perception failed; if the response ends in something
else than that solution, reasoning failed.
"""

from collections.abc import Sequence
from typing import Literal

from rlcs.data.puzzles.family import Family
from rlcs.grading.extraction import extract

Fault = Literal["none", "perception", "reasoning", "both", "unreadable"]
FAULTS: tuple[Fault, ...] = ("none", "perception", "reasoning", "both", "unreadable")


def fault_in(family: Family, plan: str, gold: str, response: str) -> Fault:
    """Which part failed. `unreadable`: no reading or no final number can be found in the response.

    Misread things that the question does not need are no fault; where two faults cancel each other, the
    answer is right and the fault `both`. In a chain of several attempts the last reading counts.
    """
    scene, answer = last_reading(family, response.splitlines()), extract(response).text
    if scene is None or answer is None or not answer.strip().lstrip("-").isdecimal():
        return "unreadable"
    followed = solve_or_none(family, scene, plan)
    if followed is None:  # it does not mention what is asked for, so that nothing follows from it
        return "perception"
    misread, misled = followed != int(gold), followed != int(answer)
    if misread:
        return "both" if misled else "perception"
    return "reasoning" if misled else "none"


def last_reading(family: Family, lines: Sequence[str]) -> str | None:
    """The scene that the last caption among some lines describes, on any paper; None if there is none.

    Of captions in direct succession it is the first: a note of some bars reads like a chart of them.
    """
    size = family.caption_lines
    scenes = [family.read("\n".join(lines[i : i + size])) for i in range(len(lines) - size + 1)]
    found = None
    for before, scene in zip([None, *scenes], scenes, strict=False):
        found = scene if scene is not None and before is None else found
    return found


def solve_or_none(family: Family, scene: str, plan: str) -> int | None:
    """The answer to a question about any scene of the family; None where it lacks what is asked for."""
    try:
        return family.solve(scene, plan).answer
    except KeyError:
        return None
