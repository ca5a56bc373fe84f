"""Finds problems of one data set that are also in another, such as training problems in test data.

Questions are compared after normalising, images by their bytes and by a perceptual hash, which a new
size, format or compression hardly changes.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlcs.data.images import open_image
from rlcs.errors import DataError
from rlcs.records import IMAGE_SLOT, ImageRef, Problem

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_SIDE = 16
"""A hash has 16 x 16 bits: with fewer, half of all diagrams have the same hash."""
NEAR_BITS = 10
"""Images whose hashes differ in at most so many of 256 bits count as near-duplicates."""
_WORD = re.compile(r"\w+")

Kind = Literal["same problem", "same question", "same image", "near image"]
KINDS: tuple[Kind, ...] = ("same problem", "same question", "same image", "near image")
"""From worst to mildest: question and images; question without images; image alone; similar image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """Problem `a` of the first set overlaps problem `b` of the second; `bits` is the images' distance."""

    kind: Kind
    a: str
    b: str
    bits: int = 0


def find_overlaps(first: Sequence[Problem], second: Sequence[Problem]) -> list[Overlap]:
    """Find all pairs that overlap, each under the worst kind that applies, ordered by kind and ids.

    An image that cannot be read is compared by its bytes alone.
    """
    overlaps: dict[tuple[str, str], Overlap] = {}
    by_text, by_image = _index(second)
    for a in first:
        for b in by_text.get(_words(a), ()):
            if {ref.sha256 for ref in a.images} == {ref.sha256 for ref in b.images}:
                kind: Kind = "same problem" if a.images else "same question"
                overlaps[a.id, b.id] = Overlap(kind=kind, a=a.id, b=b.id)
        for b in (b for ref in a.images for b in by_image.get(ref.sha256, ())):
            overlaps.setdefault((a.id, b.id), Overlap(kind="same image", a=a.id, b=b.id))
    for near in _near(first, second):
        overlaps.setdefault((near.a, near.b), near)
    return sorted(overlaps.values(), key=lambda each: (KINDS.index(each.kind), each.bits, each.a, each.b))


def _index(problems: Sequence[Problem]) -> tuple[dict[str, list[Problem]], dict[str, list[Problem]]]:
    by_text: dict[str, list[Problem]] = {}
    by_image: dict[str, list[Problem]] = {}
    for problem in problems:
        by_text.setdefault(_words(problem), []).append(problem)
        for digest in dict.fromkeys(ref.sha256 for ref in problem.images):
            by_image.setdefault(digest, []).append(problem)
    return by_text, by_image


def _words(problem: Problem) -> str:
    """The words of the conversation, without case, punctuation, character width and image slots."""
    texts = [turn.text for turn in problem.history if turn.role != "system"]
    whole = "\n".join([*texts, problem.question_with_choices])
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", whole.replace(IMAGE_SLOT, " ")).casefold()))


def _near(first: Sequence[Problem], second: Sequence[Problem]) -> list[Overlap]:
    import numpy as np

    owners_a, hashes_a = _hashes(first)
    owners_b, hashes_b = _hashes(second)
    pairs = []
    for name, image_hash in zip(owners_b, hashes_b, strict=True):
        bits = np.bitwise_count(hashes_a ^ image_hash).sum(axis=1)
        for index in np.flatnonzero(bits <= NEAR_BITS):
            pairs.append(Overlap(kind="near image", a=owners_a[index], b=name, bits=int(bits[index])))
    return sorted(pairs, key=lambda each: each.bits)


def _hashes(problems: Sequence[Problem]) -> "tuple[list[str], np.ndarray[Any, np.dtype[np.uint64]]]":
    """Problem ids and hashes (images, 4) of all images that can be read."""
    import numpy as np

    owners, hashes, known = [], [], dict[str, Any]()
    for problem in problems:
        for ref in problem.images:
            if ref.sha256 not in known:
                known[ref.sha256] = _hash_of(ref)
            if known[ref.sha256] is not None:
                owners.append(problem.id)
                hashes.append(known[ref.sha256])
    return owners, np.array(hashes, dtype=np.uint64).reshape(-1, _SIDE * _SIDE // 64)


def _hash_of(ref: ImageRef) -> "np.ndarray[Any, np.dtype[np.uint64]] | None":
    try:
        return difference_hash(open_image(ref))
    except DataError:
        return None


def difference_hash(image: "Image") -> "np.ndarray[Any, np.dtype[np.uint64]]":
    """Compute the 256 bits of a dHash, as 4 numbers: whether each cell is brighter than its right neighbour.

    Krawetz, "Kind of like that" (2013).
    """
    import numpy as np
    from PIL.Image import Resampling

    small = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Resampling.BOX), dtype=np.int16)
    # A difference of two grey levels is ignored, so that noise in flat areas sets no bits.
    bits = small[:, :-1] > small[:, 1:] + 2
    packed: np.ndarray[Any, np.dtype[np.uint64]] = np.packbits(bits).view(np.uint64)
    return packed
