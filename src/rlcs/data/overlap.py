"""Finds problems of one data set that are also in another, such as training problems in test data.

Questions are compared after normalising, images by their pixels, so that a copy in another format is found.
Look-alikes are found by a perceptual hash, which a new size or compression hardly changes.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from rlcs.cores import usable_cores
from rlcs.data.images import open_image
from rlcs.data.sources import is_builtin
from rlcs.errors import DataError
from rlcs.records import IMAGE_SLOT, ImageRef, Problem

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_SIDE = 16
"""A hash has 16 x 16 bits: with fewer, half of all diagrams have the same hash."""
NEAR_BITS = 10
"""Images whose hashes differ in at most so many of 256 bits count as near-duplicates."""
_TOKEN = re.compile(r"\w+(?:[.,]\w+)*|[^\w\s.,;:!?'\"$\\\u2018\u2019\u201c\u201d\u3001\u3002]")
"""Words, numbers and the signs of formulas: `3 - 5` is not `3 + 5`, and `3.5` not `35`."""
_DELIMITER = re.compile(r"\\[()\[\]]")

Kind = Literal["same problem", "same question", "same image", "near image"]
KINDS: tuple[Kind, ...] = ("same problem", "same question", "same image", "near image")
"""From worst to mildest: question and images; question without images; image alone; similar image."""
SHARED: tuple[Kind, ...] = KINDS[:2]
"""The kinds in which a test problem itself is in the other set."""
Key = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """Problem `a` of the first set overlaps `b` of the second, and `more` others there in the same way.

    `bits` is the distance between the hashes of near images.
    """

    kind: Kind
    a: str
    b: str
    bits: int = 0
    more: int = 0


class OverlapFinder:
    """Finds what is also in one set of problems, the second.

    Memory is a few hundred bytes a problem; images are decoded one at a time on each core.
    """

    def __init__(
        self,
        second: Sequence[Problem],
        *,
        look_alikes: bool = False,
        all_problems: bool = True,
        max_pixels: int | None = None,
    ) -> None:
        """Index the problems. With `look_alikes` every image is decoded, and near images are found.

        Without, an image is decoded only where another one has its size: first those with the same question,
        then those with others. `max_pixels` are decoded by one `find`, except with `all_problems` those of
        the same question, of which then none is missed.
        """
        self._second, self._look_alikes = second, look_alikes
        self._all_problems, self._max_pixels = all_problems, max_pixels
        self._left: int | None = None
        self._pixels: dict[str, str] = {}
        self._hashes: dict[str, Any] = {}
        self._all_builtin = all(is_builtin(problem.source) for problem in second)
        self._by_bytes = _index((_problem_key(p, _bytes_of(p)), p.id) for p in second)
        self._by_size = _index((_problem_key(p, _sizes_of(p)), i) for i, p in enumerate(second) if p.images)
        self._images = _index((ref.sha256, p.id) for p in second for ref in p.images)
        self._sizes = {_size(ref): () for p in second for ref in p.images}
        self._skipped: set[str] = set()

    @property
    def uncompared(self) -> int:
        """Images that were not compared by pixels, for `max_pixels`."""
        return len(self._skipped - self._pixels.keys())

    def find(self, first: Sequence[Problem]) -> list[Overlap]:
        """The problems of `first` that overlap, each once with its worst kind, ordered by kind and id.

        An image that cannot be read is compared by its bytes alone.
        """
        found: dict[str, Overlap] = {}
        self._left = self._max_pixels
        same_size: list[Problem] = []
        drawn = self._all_builtin and all(is_builtin(problem.source) for problem in first)
        for a in first:
            if ids := self._by_bytes.get(_problem_key(a, _bytes_of(a))):
                kind: Kind = "same problem" if a.images else "same question"
                found[a.id] = _overlap(kind, a, ids)
            # Our own drawings of one scene have the same bytes.
            elif a.images and not drawn and _problem_key(a, _sizes_of(a)) in self._by_size:
                same_size.append(a)
        self._find_same_pixels(same_size, found)
        if self._images:
            self._find_images(first, found, by_bytes=drawn)
        if self._look_alikes:
            self._find_near([a for a in first if a.id not in found], found)
        return sorted(found.values(), key=lambda each: (KINDS.index(each.kind), each.bits, each.a, each.b))

    def _find_same_pixels(self, candidates: Sequence[Problem], found: dict[str, Overlap]) -> None:
        """Add the candidates whose pixels are those of a problem with the same question and sizes."""
        keys = {_problem_key(a, _sizes_of(a)) for a in candidates}
        others = [self._second[i] for key in keys for i in self._by_size[key]]
        others = sorted(others, key=lambda problem: problem.id)
        refs = (ref for p in [*others, *candidates] for ref in p.images)
        self._decode(refs, every=self._all_problems)
        by_pixels = _index((_problem_key(p, self._pixels_of(p)), p.id) for p in others)
        for a in candidates:
            if ids := by_pixels.get(_problem_key(a, self._pixels_of(a))):
                found[a.id] = _overlap("same problem", a, ids)

    def _find_images(self, first: Sequence[Problem], found: dict[str, Overlap], *, by_bytes: bool) -> None:
        """Add the problems with an image that belongs to another question of the second set.

        `first` may be too large to be held, and is read several times.
        """
        ours: set[str] = set()
        for a in first:
            if a.id in found:
                continue
            ids = next((self._images[r.sha256] for r in a.images if r.sha256 in self._images), None)
            if ids:
                found[a.id] = _overlap("same image", a, ids)
            else:
                ours |= {size for ref in a.images if (size := _size(ref)) in self._sizes}
        if by_bytes or not ours:
            return
        seconds = (ref for p in self._second for ref in p.images if _size(ref) in ours)
        firsts = (ref for a in first if a.id not in found for ref in a.images if _size(ref) in ours)
        self._decode(chain(seconds, firsts))
        by_pixels = _index(
            (self._pixels[ref.sha256], p.id)
            for p in self._second for ref in p.images if ref.sha256 in self._pixels
        )  # fmt: skip
        if not by_pixels:
            return
        for a in first:
            known = (self._pixels.get(ref.sha256, "") for ref in a.images)
            ids = next((by_pixels[pixels] for pixels in known if pixels in by_pixels), None)
            if ids and a.id not in found:
                found[a.id] = _overlap("same image", a, ids)

    def _decode(self, refs: Iterable[ImageRef], *, every: bool = False) -> None:
        """Compute the checksums of the pixels of images, and with `look_alikes` their hashes."""
        chosen: dict[str, ImageRef] = {}
        full = False
        for ref in refs:
            if ref.sha256 in self._pixels or ref.sha256 in chosen:
                continue
            self._skipped.add(ref.sha256)
            if self._left is not None and not every and not full:
                self._left -= ref.width * ref.height
                full = self._left < 0
            if not full:
                chosen[ref.sha256] = ref
        work = partial(_decoded, look_alikes=self._look_alikes)
        with ThreadPoolExecutor(usable_cores()) as threads:  # decoders let other threads run
            for ref, (pixels, image_hash) in zip(
                chosen.values(), threads.map(work, chosen.values()), strict=True
            ):
                self._pixels[ref.sha256] = pixels
                if image_hash is not None:
                    self._hashes[ref.sha256] = image_hash

    def _pixels_of(self, problem: Problem) -> Key:
        return tuple(sorted(self._pixels.get(ref.sha256, ref.sha256) for ref in problem.images))

    def _find_near(self, first: Sequence[Problem], found: dict[str, Overlap]) -> None:
        import numpy as np

        self._decode(ref for p in [*self._second, *first] for ref in p.images)
        images = [(p.id, self._hashes[ref.sha256]) for p in self._second for ref in p.images
                  if ref.sha256 in self._hashes]  # fmt: skip
        table = np.array([each for _, each in images], dtype=np.uint64).reshape(-1, _SIDE * _SIDE // 64)
        for a in first if images else ():
            for image_hash in (self._hashes[r.sha256] for r in a.images if r.sha256 in self._hashes):
                bits = np.bitwise_count(table ^ image_hash).sum(axis=1)
                nearest, number = int(bits.argmin()), int((bits <= NEAR_BITS).sum())
                if number and (a.id not in found or bits[nearest] < found[a.id].bits):
                    found[a.id] = Overlap(
                        kind="near image", a=a.id, b=images[nearest][0],
                        bits=int(bits[nearest]), more=number - 1,
                    )  # fmt: skip


def find_overlaps(first: Sequence[Problem], second: Sequence[Problem]) -> list[Overlap]:
    """Find the problems of `first` that are also in `second`, and images that look alike."""
    return OverlapFinder(second, look_alikes=True).find(first)


def _index(pairs: "Iterable[tuple[Any, Any]]") -> dict[Any, list[Any]]:
    """The values of each key, each once, in order."""
    index: dict[Any, dict[Any, None]] = {}
    for key, value in pairs:
        index.setdefault(key, {})[value] = None
    return {key: list(values) for key, values in index.items()}


def _overlap(kind: Kind, a: Problem, ids: Sequence[str]) -> Overlap:
    return Overlap(kind=kind, a=a.id, b=ids[0], more=len(ids) - 1)


def _problem_key(problem: Problem, images: Key) -> tuple[bytes, Key]:
    """Checksum of the question's words and signs, with choices and earlier turns; beside its images.

    Case, character width, spaces, punctuation and image slots do not count.
    """
    earlier = "\n".join(turn.text for turn in problem.history if turn.role != "system")
    text = f"{earlier}\n{problem.question_with_choices}".replace(IMAGE_SLOT, " ")
    text = _DELIMITER.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    return hashlib.blake2b(" ".join(_TOKEN.findall(text)).encode(), digest_size=16).digest(), images


def _bytes_of(problem: Problem) -> Key:
    return tuple(sorted(ref.sha256 for ref in problem.images))


def _size(ref: ImageRef) -> str:
    return f"{ref.width}x{ref.height}"


def _sizes_of(problem: Problem) -> Key:
    return tuple(sorted(map(_size, problem.images)))


def _decoded(
    ref: ImageRef, *, look_alikes: bool
) -> "tuple[str, np.ndarray[Any, np.dtype[np.uint64]] | None]":
    """The checksum of an image's pixels, or of its bytes if it cannot be read; and its hash if wanted."""
    try:
        image = open_image(ref)
    except DataError:
        return ref.sha256, None
    pixels = f"{image.size}{hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()}"
    return pixels, difference_hash(image) if look_alikes else None


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
