"""Stores the problems of a run in a folder, with copies of their images, for the report.

`problems.jsonl` has a row for each problem, `images/` the copies that its `images` refer to.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rlcs.data.images import encode, image_from_bytes, image_kind, open_image, portable_image
from rlcs.errors import DataError
from rlcs.records import ImageRef, Problem, to_row
from rlcs.storage import append_jsonl, atomic_write, read_jsonl

PROBLEMS = "problems.jsonl"
ROLLOUTS = "rollouts"
"""The folder of a stage with its rollouts and their problems."""
SMALL_SIDE = 512
"""Pixels of the longer side of a small copy."""
_SMALL_BYTES = 32_000
"""A file of at most so many bytes is copied unchanged."""


def copy_image(ref: ImageRef, folder: Path, *, side: int | None = None) -> ImageRef:
    """Copy an image to `folder`/images, once; return a reference with the copy's path relative to `folder`.

    With `side` a large file is shrunk to so many pixels on its longer side. Raises ImageError when the image
    cannot be read, RunFolderError when the disk is full.
    """
    data = portable_image(ref)
    small = side is None or len(data) <= _SMALL_BYTES
    name = f"images/{ref.sha256[:24]}.{image_kind(data) if small else 'webp'}"
    path = folder / name
    if not small:
        data = path.read_bytes() if path.exists() else _smaller(ref, side or 0)
    if not path.exists():
        atomic_write(path, data, sync=False)  # syncing each of many images is slow
    copy = image_from_bytes(data, limit=ref.width * ref.height, where=name)
    return replace(copy, path=name, data=None)


def _smaller(ref: ImageRef, side: int) -> bytes:
    image = open_image(ref)
    image.thumbnail((side, side))
    return encode(image, "WEBP", quality=80)


def with_copies(problem: Problem, folder: Path, *, side: int | None = None) -> Problem:
    """Copy the images of a problem; a reference to one that cannot be read keeps only checksum and size."""
    images = []
    for ref in problem.images:
        try:
            images.append(copy_image(ref, folder, side=side))
        except DataError:
            images.append(replace(ref, path=None, data=None))
    return replace(problem, images=tuple(images))


class ProblemStore:
    """The problems of a folder, each stored once, the first ones with small copies of their images."""

    def __init__(self, folder: Path, *, max_pictured: int = 20_000) -> None:
        """Take the folder, which is neither read nor written before the first problem.

        The first `max_pictured` problems have images: 20,000 photographs are about half a gigabyte.
        """
        self._folder = folder
        self._max_pictured = max_pictured
        self._known: set[str] | None = None

    def add(self, problems: Iterable[Problem]) -> None:
        """Append the problems that are new. Raises RunFolderError when the disk is full."""
        path = self._folder / PROBLEMS
        if self._known is None:
            self._known = {row["id"] for row in read_jsonl(path)} if path.exists() else set()
        new = {problem.id: problem for problem in problems if problem.id not in self._known}
        if new:
            append_jsonl(path, [to_row(self._stored(each, n)) for n, each in enumerate(new.values())])
            self._known |= new.keys()

    def _stored(self, problem: Problem, number: int) -> Problem:
        if len(self._known or ()) + number < self._max_pictured:
            return with_copies(problem, self._folder, side=SMALL_SIDE)
        return replace(problem, images=tuple(replace(ref, path=None, data=None) for ref in problem.images))
