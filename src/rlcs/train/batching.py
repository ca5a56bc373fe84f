"""Which rank does what: shares of about the same number of tokens, and packs that keep ranks in step.

A sharded model computes on all ranks at once. So every rank passes as many packs through it as any
other, and a pack goes through the vision tower on all ranks or on none: where a rank has fewer packs,
or no image, a padding tree (a prompt without answers) fills the place. It has no target, so its
gradient is zero.
"""

import io
from collections.abc import Callable, Sequence
from typing import TypeVar

from PIL import Image

from rlcs.data.images import image_from_bytes
from rlcs.distributed import World
from rlcs.model.chat import Chat
from rlcs.model.packing import Pack, balanced, pack, within_budget
from rlcs.records import ImageRef, Problem, Tree

T = TypeVar("T")
R = TypeVar("R")

BYTES_A_TOKEN = 4
"""Of text, roughly; a guess serves to balance what has not been tokenised yet."""
PIXELS_A_TOKEN = 28 * 28
PADDING_SIDE = 56
"""Pixels along the side of a padding tree's image."""


def own_share(sizes: Sequence[int], world: World) -> list[int]:
    """The indices of this rank's share of things of `sizes`, in order."""
    return balanced(sizes, world.size)[world.rank]


def shared(
    work: Callable[[list[T]], Sequence[R]], items: Sequence[T], size: Callable[[T], int], world: World
) -> list[R]:
    """Results of `work` for all items, in their order; each rank works on its share alone.

    `size` weighs an item, so that shares are balanced. All ranks give the same items.
    """
    own = own_share([size(item) for item in items], world)
    results = zip(own, work([items[i] for i in own]), strict=True)
    of_all = {i: result for part in world.gather(list(results)) for i, result in part}
    return [of_all[i] for i in range(len(items))]


def guessed_tokens(problem: Problem, response: str = "") -> int:
    """About how many tokens a problem with a response has, without opening its images."""
    pixels = sum(image.width * image.height for image in problem.images)
    return (
        pixels // PIXELS_A_TOKEN + len((problem.question_with_choices + response).encode()) // BYTES_A_TOKEN
    )


def own_packs(trees: Sequence[Tree], chat: Chat, *, budget: int, world: World) -> list[Pack]:
    """This rank's share of the trees that all ranks have, in packs (see `packs_in_step`)."""
    own = own_share([tree.num_tokens for tree in trees], world)
    return packs_in_step([trees[i] for i in own], chat, budget=budget, world=world)


def packs_in_step(trees: Sequence[Tree], chat: Chat, *, budget: int, world: World) -> list[Pack]:
    """This rank's trees in packs of at most `budget` tokens: on every rank as many, with images alike."""
    members = within_budget([tree.num_tokens for tree in trees], budget)
    groups = sorted(([trees[i] for i in some] for some in members), key=lambda some: not _has_images(some))
    flags_of_ranks = world.gather([_has_images(group) for group in groups])
    for place in range(max(map(len, flags_of_ranks))):
        if place == len(groups):
            groups.append([])
        images = any(flags[place] for flags in flags_of_ranks if place < len(flags))
        if not groups[place] or (images and not _has_images(groups[place])):
            groups[place].append(padding_tree(chat, image=images))
    return [pack(group, chat.patches) for group in groups]


def _has_images(trees: Sequence[Tree]) -> bool:
    return any(tree.prompt.images for tree in trees)


def padding_tree(chat: Chat, *, image: bool) -> Tree:
    """A prompt without answers: it goes through the model and changes nothing."""
    images: tuple[ImageRef, ...] = ()
    if image:
        buffer = io.BytesIO()
        Image.new("RGB", (PADDING_SIDE, PADDING_SIDE)).save(buffer, "PNG")
        images = (image_from_bytes(buffer.getvalue(), limit=PADDING_SIDE**2, where="padding"),)
    problem = Problem(id="padding", source="padding", question=".", answer=".", images=images)
    return Tree(prompt=chat.prompt(problem), branches=())
