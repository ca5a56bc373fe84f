"""Options of a source: which part of it is meant, and which column holds the responses.

`FILE?part=train` and `FILE?part=test` share no image and no question.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlcs.data.rows import Row
from rlcs.data.sources import DATASET_OPTIONS, is_builtin, split_query
from rlcs.data.stored import remembered
from rlcs.errors import DataError
from rlcs.records import Problem
from rlcs.storage import at_home

SHARE = 0.1
"""Share of the rows that are held out, unless the source says another (`?part=test&share=0.2`)."""
_PARTS = ("train", "test")
_OURS = ("part", "share", "response")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The part of a source that is meant: what is held out for the test, or the rest."""

    name: Literal["train", "test"]
    share: float = SHARE

    def positions(self, rows: Sequence[Row]) -> Sequence[int]:
        """The positions of the rows of this part, in their order.

        Rows with the same images, or without images the same question, are in the same part: those whose
        hashes come first are the test, so that neither the order of the rows nor a seed matters.
        """

        def find() -> list[int]:
            keys = [_key(row.problem) for row in rows]
            groups = sorted(set(keys))
            held_out = set(groups[: max(1, round(self.share * len(groups)))])
            return [at for at, key in enumerate(keys) if (key in held_out) == (self.name == "test")]

        positions: list[int] = remembered(rows, "part", [self.name, self.share], find)
        return positions


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """What a source says of its rows: the part that is meant, and the column that holds responses."""

    part: Part | None = None
    response: str | None = None


def read_options(source: str) -> tuple[str, SourceOptions]:
    """A source without its options `part`, `share` and `response`, and what they say. Raises DataError.

    Built-in tasks have options of their own, and a file may have a question mark in its name.
    """
    if is_builtin(source) or at_home(source).exists():
        return source, SourceOptions()
    name, options = split_query(source, (*_OURS, *DATASET_OPTIONS))
    left = "&".join(f"{key}={options[key]}" for key in DATASET_OPTIONS if key in options)
    chosen = {key: options[key] for key in _OURS if key in options}
    part = None
    if "part" in chosen or "share" in chosen:
        part = _part(source, chosen.get("part", ""), chosen.get("share"))
    return f"{name}?{left}" if left else name, SourceOptions(part=part, response=chosen.get("response"))


def _part(source: str, part: str, share: str | None) -> Part:
    if part not in _PARTS:
        raise DataError(f"no part {part!r}", where=source, fix="write ?part=train or ?part=test")
    if share is not None and (not re.fullmatch(r"0?\.\d{1,6}", share) or float(share) == 0):
        raise DataError(f"share={share} is not between 0 and 1", where=source, fix="write share=0.1, say")
    return Part(name="test" if part == "test" else "train", share=SHARE if share is None else float(share))


def both_parts(source: str) -> dict[str, str]:
    """The data keys of a recipe with one source for everything, of which a part is held out."""
    mark = "&" if "?" in source else "?"
    train, test = (f"{source}{mark}part={part}" for part in _PARTS)
    return {"data.cold_start": train, "data.rl": train, "data.test": test}


def _key(problem: Problem) -> bytes:
    seen = [image.sha256 for image in problem.images] or [" ".join(problem.transcript.lower().split())]
    return hashlib.sha256("\n".join(seen).encode()).digest()
