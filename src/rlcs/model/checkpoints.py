"""Reads checkpoints of training from disk: which a folder has, and the tensors in one.

`train.checkpoint` writes them. Each rank's rows of a sharded tensor are in a file of its own. A reader gets
whole tensors or the rows that it asks for, and holds no more. Imports no torch.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlcs import storage
from rlcs.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
"""Incremented when `state.json` changes its meaning."""
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
"""The files of rank 0; see `of_rank`."""
ADAPTER = ".lora_"
"""Part of the names of adapter weights, and of no other name."""
_OF_RANK = re.compile(r"(?:model|optimizer)-(\d+)\.safetensors")
_COMPLETE = re.compile(r"step-(\d{6,})(\.old)?")


def of_rank(name: str, rank: int) -> str:
    """The name of one rank's file: rank 0's is `name` itself."""
    return name if rank == 0 else name.replace(".", f"-{rank}.")


def rank_of(name: str) -> int:
    """The rank whose file this is; rank 0 also has those of the whole checkpoint."""
    match = _OF_RANK.fullmatch(name)
    return int(match[1]) if match else 0


def folder_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder; None for any other name."""
    match = _COMPLETE.fullmatch(name)
    return int(match[1]) if match else None


def complete(folder: Path) -> dict[int, Path]:
    """The folder of each complete checkpoint, by step; not yet verified.

    A `.old` one counts only where a save was killed between its two renames.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        step = step_of(path.name)
        if step is not None and path.is_dir():
            found.setdefault(step, path)  # sorted: the plain name comes before `.old`
    return found


def read_facts(path: Path, step: int) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`. Raises CheckpointError for another format or step."""
    try:
        facts: dict[str, Any] = storage.read_json(path / STATE)
        if (facts["format"], facts["step"]) != (FORMAT, step):
            raise ValueError(f"it has format {facts['format']}, step {facts['step']}")
    except (DataError, FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise unreadable(path, step, error) from error
    return facts


def unreadable(path: Path, step: int, error: Exception) -> CheckpointError:
    """The error for a folder that is no checkpoint, or one of another version."""
    return CheckpointError(
        f"this is no checkpoint of step {step} that this version can read: {error}",
        where=str(path),
        fix="go on from another checkpoint",
    )


def read_weights(path: Path, step: int) -> "Stored":
    """The weights of a checkpoint, each read on access; what belongs to the optimiser is not read.

    Raises CheckpointError if it is damaged.
    """
    storage.verify_manifest(path, only=lambda name: not name.startswith(OPTIMIZER.partition(".")[0]))
    facts = read_facts(path, step)
    paths = [path / of_rank(MODEL, rank) for rank in range(facts["ranks"])]
    return Stored(paths, facts["tied"], facts["unsharded"])


class Stored(Mapping[str, "Tensor"]):
    """Tensors in the files of several ranks, whole or some rows, each read on access."""

    def __init__(self, paths: Sequence[Path], tied: Mapping[str, str], unsharded: Collection[str]) -> None:
        """Open the first file, which names all tensors; `tied` are further names of tensors.

        Those that are `unsharded` lie in the first file alone, all others in every file.
        Raises SafetensorError or FileNotFoundError, as does opening the other files when they are needed.
        """
        self._paths = paths
        self._tied = tied
        self._unsharded = set(unsharded)
        self._opened: dict[int, Any] = {}
        self._names = set(self._open(0).keys())

    def _open(self, number: int) -> Any:
        import safetensors

        if number not in self._opened:
            self._opened[number] = safetensors.safe_open(self._paths[number], framework="pt")
        return self._opened[number]

    def _files_of(self, stored: str) -> list[Any]:
        """The files with rows of a tensor, in their order."""
        return [self._open(n) for n in range(1 if stored in self._unsharded else len(self._paths))]

    def __getitem__(self, name: str) -> "Tensor":
        """The whole tensor."""
        import torch

        parts = [file.get_tensor(self._stored(name)) for file in self._files_of(self._stored(name))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _stored(self, name: str) -> str:
        stored = self._tied.get(name, name)
        if stored not in self._names:
            raise KeyError(name)
        return stored

    def rows(self, name: str, start: int, stop: int, *, part: int, parts: int) -> "Tensor":
        """The rows from `start` to `stop` of a tensor: this is part number `part` of `parts`.

        Where as many ranks wrote, they are a file's own, and no other file is opened.
        """
        import torch

        stored = self._stored(name)
        if parts == len(self._paths) and stored not in self._unsharded:
            own: Tensor = self._open(part).get_tensor(stored)
            return own
        found, first = [], 0
        for file in self._files_of(stored):
            rows = file.get_slice(stored)
            last = first + rows.get_shape()[0]
            if start < last and first < stop:
                found.append(rows[max(0, start - first) : min(stop, last) - first])
            first = last
        return torch.cat(found or [rows[0:0]])

    def __iter__(self) -> Iterator[str]:
        return iter([*sorted(self._names), *self._tied])

    def __len__(self) -> int:
        return len(self._names) + len(self._tied)
