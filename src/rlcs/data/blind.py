"""Blind twins of problems: the same question with another problem's images, or with none.

A model that answers a twin right did not need the image. `other` is the default control: the prompt keeps its
form and its length, so that a wrong answer is not the effect of a text that the model never saw in training;
`removed` takes the images and their places out of the prompt.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from rlcs.errors import DataError
from rlcs.records import IMAGE_SLOT, ImageRef, Problem

Blinding = Literal["other", "removed"]
CONTROLS: tuple[Literal["none"] | Blinding, ...] = ("none", "other", "removed")
"""The choices of `eval.blind`."""


def blind_twins(problems: Sequence[Problem], how: Blinding) -> tuple[Problem, ...]:
    """The twins of all problems with images, in their order; a problem without any is blind as it is.

    With `other` each problem gets the images of one of the same source with as many images, none of which is
    its own: the next one in an order by a hash of the ids. Where there is none, it gets images of any
    problems. The choice depends on the problems alone. `metadata["images_of"]` names the other problem.

    Raises DataError where there is no other image.
    """
    pictured = [problem for problem in problems if problem.images]
    if how == "removed":
        return tuple(map(_without_images, pictured))
    order = sorted(pictured, key=lambda problem: hashlib.sha256(problem.id.encode()).digest())
    rings: dict[tuple[str, int], list[Problem]] = defaultdict(list)
    for problem in order:
        rings[problem.source, len(problem.images)].append(problem)
    twins: dict[str, Problem] = {}
    for ring in rings.values():
        for place, problem in enumerate(ring):
            other = next((each for each in _after(ring, place) if not _share_an_image(each, problem)), None)
            images = _any_images(problem, order) if other is None else other.images
            origin = {"images_of": "" if other is None else other.id}
            twins[problem.id] = replace(problem, images=images, metadata={**problem.metadata, **origin})
    return tuple(twins[problem.id] for problem in pictured)


def _after(ring: Sequence[Problem], place: int) -> Iterator[Problem]:
    """The other problems of a ring, from the next one on."""
    yield from ring[place + 1 :]
    yield from ring[:place]


def _share_an_image(a: Problem, b: Problem) -> bool:
    return not {ref.sha256 for ref in a.images}.isdisjoint(ref.sha256 for ref in b.images)


def _any_images(problem: Problem, problems: Sequence[Problem]) -> tuple[ImageRef, ...]:
    """As many images as the problem has, of any others, each once as long as there are enough."""
    own = {ref.sha256 for ref in problem.images}
    others = {ref.sha256: ref for each in problems for ref in each.images if ref.sha256 not in own}
    if not others:
        raise DataError(
            "no other problem has an image to show instead of its own",
            where=problem.id,
            fix="measure more problems, or leave the image out: blind=removed",
        )
    found = tuple(others.values())
    return tuple(found[place % len(found)] for place in range(len(problem.images)))


def _without_images(problem: Problem) -> Problem:
    # A question that is nothing but its image still needs some text.
    question = problem.question.replace(IMAGE_SLOT, "").strip() or "(no image)"
    history = tuple(replace(turn, text=turn.text.replace(IMAGE_SLOT, "")) for turn in problem.history)
    return replace(problem, question=question, history=history, images=())
