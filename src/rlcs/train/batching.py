"""Which rank does what: shares of about the same number of tokens, and packs that keep ranks in step.

A sharded model computes on all ranks at once. So every rank passes as many packs through it as any
other, and a pack goes through the vision tower on all ranks or on none: where a rank has fewer packs,
or no image, an idle prompt without answers fills the place. It has no target, so its gradient is zero.
"""

import io
from collections.abc import Sequence
from typing import TypeVar

from PIL import Image

from rlcs.data.images import image_from_bytes
from rlcs.distributed import World
from rlcs.model.chat import Chat
from rlcs.model.packing import Pack, balanced, pack, within_budget
from rlcs.records import ImageRef, Problem, Tree

T = TypeVar("T")

BYTES_A_TOKEN = 4
"""Of text, roughly; a guess serves to balance what has not been tokenised yet."""
PIXELS_A_TOKEN = 28 * 28
PADDING_SIDE = 56
"""Pixels along the side of the idle prompt's image."""


def own_share(sizes: Sequence[int], world: World) -> list[int]:
    """The indices of this rank's share of things of `sizes`, in order."""
    return balanced(sizes, world.size)[world.rank]


def guessed_tokens(problem: Problem, response: str = "") -> int:
    """About how many tokens a problem with a response has, without opening its images."""
    pixels = sum(image.width * image.height for image in problem.images)
    return pixels // PIXELS_A_TOKEN + len((problem.asked + response).encode()) // BYTES_A_TOKEN


def packs_in_step(trees: Sequence[Tree], chat: Chat, *, budget: int, world: World) -> list[Pack]:
    """This rank's trees as packs of at most `budget` tokens: on every rank as many, with images alike."""
    members = within_budget([tree.num_tokens for tree in trees], budget)
    shelves = [[trees[i] for i in some] for some in members]
    shelves.sort(key=lambda shelf: not _has_images(shelf))
    seen = world.gather([_has_images(shelf) for shelf in shelves])
    for place in range(max(len(flags) for flags in seen)):
        if place == len(shelves):
            shelves.append([])
        images = any(flags[place] for flags in seen if place < len(flags))
        if not shelves[place] or (images and not _has_images(shelves[place])):
            shelves[place].append(padding_tree(chat, image=images))
    return [pack(shelf, chat.patches) for shelf in shelves]


def _has_images(trees: Sequence[Tree]) -> bool:
    return any(tree.prompt.images for tree in trees)


def padding_tree(chat: Chat, *, image: bool) -> Tree:
    """A prompt without answers: it goes through the model and changes nothing."""
    images: tuple[ImageRef, ...] = ()
    if image:
        buffer = io.BytesIO()
        Image.new("RGB", (PADDING_SIDE, PADDING_SIDE)).save(buffer, "PNG")
        images = (image_from_bytes(buffer.getvalue(), limit=PADDING_SIDE**2, where="idle"),)
    problem = Problem(id="idle", source="idle", question=".", answer=".", images=images)
    return Tree(prompt=chat.prompt(problem), branches=())
