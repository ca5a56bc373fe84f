"""The problems behind a stage's rollouts, so that every rollout can be read with its image and gold answer.

`rollouts/problems.jsonl` has each problem once, when it is first asked; `rollouts/images/` small copies.
"""

import io
from collections.abc import Iterable
from pathlib import Path

from rlcs.errors import DataError
from rlcs.records import ImageRef, Problem
from rlcs.storage import append_jsonl, encoded_image, image_kind, open_image, read_jsonl

_SIDE = 512  # pixels of the longer side
_SMALL = 32_000  # bytes: a file no larger is copied as it is
_MOST_IMAGES = 20_000
"""About half a gigabyte of photographs; later problems are kept without theirs."""


class ProblemStore:
    """The problems that one stage has asked so far."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the stage's rollouts folder; it is read with the first problem."""
        self._folder = folder
        self._known: set[str] | None = None

    def add(self, problems: Iterable[Problem]) -> None:
        """Write down the problems that are new. Raises RunFolderError when the disk is full."""
        path = self._folder / "problems.jsonl"
        if self._known is None:
            self._known = {row["id"] for row in read_jsonl(path)} if path.exists() else set()
        new = {problem.id: problem for problem in problems if problem.id not in self._known}
        rows = [
            {
                "id": problem.id,
                "question": problem.question,
                "answer": problem.answer,
                "choices": list(problem.choices),
                "images": [name for name in map(self._copy, problem.images) if name],
            }
            for problem in new.values()
        ]
        if rows:
            append_jsonl(path, rows)
            self._known |= new.keys()

    def _copy(self, ref: ImageRef) -> str:
        """Write one image small and return its path from the folder; empty where there is none.

        Not synced to disk one by one: a copy that a power cut tears is only a picture less.
        """
        if len(self._known or ()) > _MOST_IMAGES:
            return ""
        try:
            data = encoded_image(ref, limit=ref.width * ref.height)
            if len(data) > _SMALL:
                image = open_image(ref, limit=ref.width * ref.height)
                image.thumbnail((_SIDE, _SIDE))
                buffer = io.BytesIO()
                image.save(buffer, "WEBP", quality=80)
                data = buffer.getvalue()
        except DataError:
            return ""
        name = f"images/{ref.sha256[:16]}.{image_kind(data)}"
        (self._folder / "images").mkdir(parents=True, exist_ok=True)
        (self._folder / name).write_bytes(data)
        return name
