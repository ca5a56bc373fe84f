"""The built-in teacher in four kinds of chain of thought, written from the scene by a program.

Nothing is pretended: a description is what the program drew, a wrong attempt comes from a scene misread,
a criticism names the lines in which draft and scene differ. A teacher who errs (`wrong_share`) ends on a
misreading in every kind, and the same share of problems is wrong in all.
"""

import random
from collections.abc import Callable, Mapping
from itertools import zip_longest

from rlcs.data import puzzles
from rlcs.data.puzzles.family import Family, Solution, boxed
from rlcs.records import Problem


def teach(problem: Problem, *, chain: str, seed: int, wrong_share: float) -> str:
    """The built-in teacher's response in one kind of chain of thought.

    `distilled` is `tasks.teach` itself. Raises `DataError` for a problem that is not built in.
    """
    if chain == "distilled":
        return puzzles.teach(problem, seed=seed, wrong_share=wrong_share)
    truth = puzzles.solution(problem)
    name, scene, plan = (str(problem.metadata[key]) for key in ("family", "scene", "plan"))
    family = next(each for each in puzzles.families() if each.name == name)
    rng = random.Random(f"teach|{seed}|{problem.id}")
    errs = rng.random() < wrong_share
    final = _misread(family, rng, scene, plan, truth) if errs else truth
    draft = _misread(family, rng, scene, plan, final)
    if chain == "self_critic" and rng.random() < 0.5:
        draft = final  # not every draft deserves criticism
    return _WRITERS[chain](draft, final)


def _misread(family: Family, rng: random.Random, scene: str, plan: str, other: Solution) -> Solution:
    """The solution of someone who sees the scene wrongly, with an answer unlike the other's."""
    seen, solution = scene, other
    while solution.answer == other.answer or solution.answer == family.solve(scene, plan).answer:
        seen = family.misread(rng, seen)
        solution = family.solve(seen, plan)
    return solution


def _lines(solution: Solution) -> list[str]:
    return [*solution.reading.split("\n"), *solution.steps]


def _caption(draft: Solution, final: Solution) -> str:
    return "\n".join(("The image shows:", final.reading, "So:", *final.steps, boxed(final.answer)))


def _reflection(draft: Solution, final: Solution) -> str:
    wrong = "\n".join((*_lines(draft), str(draft.answer)))
    return f"{wrong}\nWait, let me look again.\n{_faults(draft, final)}\n{final.text()}"


def _self_critic(draft: Solution, final: Solution) -> str:
    said = "\n".join((*_lines(draft), str(draft.answer)))
    return f"{said}\nCriticism: {_faults(draft, final)}\nImproved answer:\n{final.text()}"


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
