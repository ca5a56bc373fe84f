"""Reads checkpoints of training from disk: which a folder has, and the tensors in one.

`train.checkpoint` writes them. Each rank's rows of a sharded tensor are in a file of its own; they are put
together when a tensor is read, so that no reader holds more than it asks for. Imports no torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlcs import storage
from rlcs.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""Incremented when `state.json` changes its meaning."""
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
"""The files of rank 0; see `of_rank`."""
ADAPTER = ".lora_"
"""Part of the names of adapter weights, and of no other name."""
_COMPLETE = re.compile(r"step-(\d{6,})(\.old)?")


def of_rank(name: str, rank: int) -> str:
    """The name of one rank's file: rank 0's is `name` itself."""
    return name if rank == 0 else name.replace(".", f"-{rank}.")


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
    storage.verify_manifest(path, leave_out=OPTIMIZER.partition(".")[0])
    facts = read_facts(path, step)
    return Stored([path / of_rank(MODEL, rank) for rank in range(facts["ranks"])], facts["tied"])


class Stored(Mapping[str, "Tensor"]):
    """Whole tensors in the files of all ranks, each read on access."""

    def __init__(self, paths: Sequence[Path], tied: Mapping[str, str]) -> None:
        """Open the files; `tied` are further names of tensors. Raises SafetensorError, FileNotFoundError."""
        import safetensors

        self._files: list[Any] = [safetensors.safe_open(path, framework="pt") for path in paths]
        self._tied = tied
        self._names = [set(file.keys()) for file in self._files]

    def __getitem__(self, name: str) -> "Tensor":
        import torch

        stored = self._tied.get(name, name)
        parts = [
            file.get_tensor(stored)
            for file, names in zip(self._files, self._names, strict=True)
            if stored in names
        ]
        if not parts:
            raise KeyError(name)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter([*sorted(self._names[0]), *self._tied])

    def __len__(self) -> int:
        return len(self._names[0]) + len(self._tied)
