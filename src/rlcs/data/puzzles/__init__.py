r"""Built-in visual puzzles, drawn by programs: images, questions, answers, and a teacher.

`load` makes problems; `teach` answers one with a reasoning text. Train and test cannot share an
image: the split is a function of the content of the image (`family.split_of`).
"""

import hashlib
import random
from collections.abc import Sequence
from itertools import cycle

from rlcs.data.images import encode
from rlcs.data.puzzles import chains
from rlcs.data.puzzles.bars import Bars
from rlcs.data.puzzles.family import Family, Solution, Split, draw_scene
from rlcs.data.puzzles.faults import Fault, fault_in, solve_or_none
from rlcs.data.puzzles.figures import Figures
from rlcs.data.puzzles.shapes import Shapes
from rlcs.errors import DataError
from rlcs.records import ImageRef, Problem

LEVELS = (1, 2, 3)
"""Levels of difficulty: more steps, larger numbers."""

_MIXTURE = "puzzles"
_MAX_REPEATS = 2000


def families() -> tuple[Family, ...]:
    """All families of puzzles; a new one must be listed here."""
    return (Shapes(), Bars(), Figures())


def _family(name: str) -> Family:
    for family in families():
        if family.name == name:
            return family
    known = ", ".join(family.name for family in families())
    raise DataError(f"no built-in task {name!r}", fix=f"use {_MIXTURE} (all), or one of {known}")


def load(
    name: str,
    *,
    split: Split,
    count: int,
    seed: int,
    levels: Sequence[int] = LEVELS,
    families: Sequence[str] | None = None,
) -> tuple[Problem, ...]:
    """Draw `count` problems, no two with the same image and question.

    `name` is `puzzles` (every family in turn, or those in `families`) or one family. The same
    arguments always give the same problems. Raises `DataError` for an unknown name, split or
    level, or when the family has no `count` different problems.
    """
    if split not in ("train", "test"):
        raise DataError(f"no split {split!r}", where=f"builtin:{name}", fix="use train or test")
    if not levels or not set(levels) <= set(LEVELS):
        raise DataError(f"levels {list(levels)}", where=f"builtin:{name}", fix="use levels from 1 to 3")
    chosen = _choose(name, families)
    source = f"builtin:{name}"
    rng = random.Random(f"{split}|{seed}|{'|'.join(family.name for family in chosen)}")
    turns = cycle([(family, level) for level in levels for family in chosen])
    seen: set[tuple[str, str]] = set()
    problems: list[Problem] = []
    repeats = 0
    while len(problems) < count:
        family, level = next(turns)
        scene, plan = _draw(family, rng, level, split)
        while (scene, plan) in seen:
            repeats += 1
            if repeats > _MAX_REPEATS:
                raise DataError(f"no {count} different problems", where=source, fix="ask for fewer")
            scene, plan = _draw(family, rng, level, split)
        seen.add((scene, plan))
        problems.append(_problem(family, scene, plan, level=level, split=split, index=len(problems)))
    return tuple(problems)


def teach(problem: Problem, *, seed: int, wrong_share: float, chain: str = "distilled") -> str:
    """Write the built-in teacher's response: reasoning in one kind of chain of thought, and a boxed answer.

    With probability `wrong_share` the teacher misreads the image in a way that changes the
    answer, and reasons consistently from the misreading; the same problems are wrong in every
    kind of chain. Raises `DataError` for a problem that is not built in.
    """
    family, scene, plan = _origin(problem)
    truth = family.solve(scene, plan)
    rng = random.Random(f"teach|{seed}|{problem.id}")
    errs = rng.random() < wrong_share
    final = _misread(family, rng, scene, plan, truth) if errs else truth
    if chain == "distilled":
        return final.text()
    draft = _misread(family, rng, scene, plan, final)
    if chain == "self_critic" and rng.random() < 0.5:
        draft = final  # half of the drafts have no fault
    return chains.write(chain, draft, final)


def fault(problem: Problem, response: str) -> Fault:
    """Which part of a response to a built-in problem failed: the reading of the image, reasoning, or both."""
    family, _, plan = _origin(problem)
    return fault_in(family, plan, problem.answer, response)


def answer_on(problem: Problem, other: Problem) -> int | None:
    """The answer to one built-in problem's question about another one's image; None where it has none.

    It is what a model gives that reads the other image without fault: by it the blind control is known.
    """
    family, _, plan = _origin(problem)
    named, scene, _ = _origin(other)
    return solve_or_none(family, scene, plan) if named.name == family.name else None


def is_builtin(problem: Problem) -> bool:
    """Whether the built-in teacher can answer a problem."""
    return all(key in problem.metadata for key in ("family", "scene", "plan"))


def _misread(family: Family, rng: random.Random, scene: str, plan: str, other: Solution) -> Solution:
    """Solve a misread scene, with an answer that is neither the right one nor that of `other`."""
    excluded = {other.answer, family.solve(scene, plan).answer}
    misread, solution = scene, other
    while solution.answer in excluded:
        misread = family.misread(rng, misread)
        solution = family.solve(misread, plan)
    return solution


def _choose(name: str, only: Sequence[str] | None) -> tuple[Family, ...]:
    if name != _MIXTURE:
        return (_family(name),)
    return tuple(map(_family, only)) if only else families()


def _draw(family: Family, rng: random.Random, level: int, split: Split) -> tuple[str, str]:
    while True:
        scene = draw_scene(family, rng, level, split)
        plan = family.plan(rng, scene, level)
        if plan is not None:
            return scene, plan


def _problem(family: Family, scene: str, plan: str, *, level: int, split: Split, index: int) -> Problem:
    image = family.paint(scene)
    data = encode(image)
    mark = hashlib.sha256(f"{scene}|{plan}".encode()).hexdigest()[:6]
    reference = ImageRef(
        sha256=hashlib.sha256(data).hexdigest(), width=image.width, height=image.height, data=data
    )
    return Problem(
        id=f"{family.name}-{split}-{index:06d}-{mark}",
        source=f"builtin:{family.name}",
        question=family.question(plan),
        answer=str(family.solve(scene, plan).answer),
        images=(reference,),
        metadata={"family": family.name, "level": level, "split": split, "scene": scene, "plan": plan},
    )


def _origin(problem: Problem) -> tuple[Family, str, str]:
    """The family, scene and plan of a built-in problem. Raises DataError for any other."""
    try:
        name, scene, plan = (str(problem.metadata[key]) for key in ("family", "scene", "plan"))
    except KeyError:
        raise DataError(
            "the built-in teacher only knows built-in problems",
            where=problem.id,
            fix="give demonstrations (rows with a `response`), or use builtin: problems",
        ) from None
    return _family(name), scene, plan
