"""Shares the work of a step over ranks: about equal numbers of tokens, and packs that keep ranks in step.

A sharded model computes on all ranks at once. So every rank passes as many packs through it as any
other, and a pack goes through the vision tower on all ranks or on none: where a rank has fewer packs,
or no image, a padding tree (a prompt without answers) fills the place. It has no target, so its
gradient is zero.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

from PIL import Image

from rlcs.data.images import encode, image_from_bytes
from rlcs.distributed import World
from rlcs.model.bins import balanced, within_budget
from rlcs.model.chat import Chat
from rlcs.model.packing import Pack, pack
from rlcs.records import ImageRef, Problem
from rlcs.records.trees import Tree

T = TypeVar("T")
R = TypeVar("R")

BYTES_A_TOKEN = 4
"""Bytes of text in a token, roughly: enough to balance problems that are not tokenised yet."""
PIXELS_A_TOKEN = 28 * 28
"""Pixels of an image in a token, roughly."""
PADDING_SIDE = 56
"""Pixels along the side of a padding tree's image."""


def own_share(sizes: Sequence[int], world: World) -> list[int]:
    """Indices of the items that this rank works on, in order; `sizes` are those of all items."""
    return balanced(sizes, world.size)[world.rank]


def shared(
    work: Callable[[list[T]], Sequence[R]], items: Sequence[T], size: Callable[[T], int], world: World
) -> list[R]:
    """Results of `work` for all items, in their order; each rank computes its share of them.

    `size` is an item's cost, by which shares are balanced. All ranks pass the same items.
    """
    own = own_share([size(item) for item in items], world)
    results = zip(own, work([items[i] for i in own]), strict=True)
    result_of = {i: result for part in world.gather(list(results)) for i, result in part}
    return [result_of[i] for i in range(len(items))]


def guessed_tokens(problem: Problem, response: str = "") -> int:
    """About how many tokens a problem with a response has, without opening its images."""
    pixels = sum(image.width * image.height for image in problem.images)
    return pixels // PIXELS_A_TOKEN + len((problem.transcript + response).encode()) // BYTES_A_TOKEN


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """For how many `patches` a rank keeps what a frozen tower makes of them; packs of before use `used`."""

    patches: int
    used: int = 0


NONE = Keep(patches=0)


def packs_in_step(
    trees: Sequence[Tree],
    chat: Chat,
    *,
    budget: int,
    world: World,
    keep: Keep = NONE,
    shares_head: bool = False,
) -> list[Pack]:
    """Packs of this rank's trees, each of at most `budget` tokens; their images are decoded in the meantime.

    Every rank gets the same number of packs, and packs of one index have images on all ranks or on none. The
    first packs, as many as `keep` allows on every rank, keep what a frozen vision tower returns. For
    `shares_head` see `pack`.
    """
    members = within_budget([tree.num_tokens for tree in trees], budget)
    groups = [[trees[i] for i in indices] for indices in members]
    return _in_step(groups, chat, world, keep, shares_head=shares_head)


def full_packs_in_step(
    trees: Sequence[Tree], chat: Chat, *, budget: int, world: World, keep: Keep = NONE
) -> tuple[list[Pack], list[Tree]]:
    """Packs for this rank of as many of all trees as fill packs on every rank, and the trees that are left.

    All ranks pass the same trees. The emptiest pack is left in any case: more trees may fill it.
    """
    sizes = [tree.num_tokens for tree in trees]
    packs = within_budget(sizes, budget)
    packs.sort(key=lambda members: -sum(sizes[i] for i in members))
    packs = packs[: max(0, len(packs) - 1) // world.size * world.size]
    taken = {i for members in packs for i in members}
    own = [[trees[i] for i in members] for members in packs[world.rank :: world.size]]
    left = [tree for i, tree in enumerate(trees) if i not in taken]
    return _in_step(own, chat, world, keep) if packs else [], left


def _in_step(
    groups: list[list[Tree]], chat: Chat, world: World, keep: Keep, *, shares_head: bool = False
) -> list[Pack]:
    """A pack of each group, with padding trees where other ranks have more groups, or images."""
    groups.sort(key=lambda group: _patches(group) > 0, reverse=True)
    of_ranks = world.gather((keep.used, [_patches(group) for group in groups]))
    packs: list[Pack] = []
    totals = [used for used, _ in of_ranks]
    for index, patches in enumerate(zip_longest(*(each for _, each in of_ranks), fillvalue=0)):
        if index == len(groups):
            groups.append([])
        images = any(patches)
        if not groups[index] or (images and not _patches(groups[index])):
            groups[index].append(padding_tree(chat, image=images))
        totals = [total + more for total, more in zip(totals, patches, strict=True)]
        keeps = images and max(totals) <= keep.patches
        packs.append(pack(groups[index], chat.patches, keeps_features=keeps, shares_head=shares_head))
    chat.prepare(image for each in packs for image in each.images)
    return packs


def _patches(trees: Sequence[Tree]) -> int:
    return sum(math.prod(grid) for tree in trees for grid in tree.prompt.grids)


def padding_tree(chat: Chat, *, image: bool) -> Tree:
    """A prompt without answers, which keeps ranks in step: it has no target, so no gradient."""
    images: tuple[ImageRef, ...] = ()
    if image:
        data = encode(Image.new("RGB", (PADDING_SIDE, PADDING_SIDE)))
        images = (image_from_bytes(data, limit=PADDING_SIDE**2, where="padding"),)
    problem = Problem(id="padding", source="padding", question=".", answer=".", images=images)
    return Tree(prompt=chat.prompt(problem), branches=())
