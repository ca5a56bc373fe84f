"""Computes the disk space of a run from the shapes of its model, and compares it with what is free."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlcs.errors import RunFolderError
from rlcs.model.vlm import Vlm
from rlcs.recipe.handover import MOST_CANDIDATES, Handover
from rlcs.recipe.stages import Grpo, Stage
from rlcs.train.collapse import MOST
from rlcs.train.handover import COLUMNS

GB = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpace:
    """Bytes that one training stage writes: a checkpoint, the most of them at once, the final model."""

    checkpoint: int
    checkpoints: int
    final: int

    @property
    def total(self) -> int:
        """The most bytes that are on the disk at once."""
        return self.checkpoint * self.checkpoints + self.final


def stage_space(vlm: Vlm, settings: Stage, *, steps: int) -> StageSpace:
    """The space of a stage that trains this model, which may be a structure without weights.

    A checkpoint holds the weights (with adapters these alone) and AdamW's two averages of what trains. A new
    one is complete before the oldest is removed. RL also keeps those before a collapse (`train.collapse`).
    """
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in vlm.model.parameters()]
    whole, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    explaining = MOST if isinstance(settings, Grpo) else 0
    newest = min(settings.keep_checkpoints + 1 + explaining, -(-steps // settings.save_every))
    for_good = len(settings.keep_steps) + {"last": 0, "probe": len(COLUMNS)}.get(settings.rule, 1)
    return StageSpace(
        checkpoint=(trained if vlm.adapter is not None else whole) + 2 * trained,
        checkpoints=newest + for_good,
        final=whole,
    )


def trials_space(arm: StageSpace, settings: Stage, handover: Handover) -> StageSpace:
    """The space of the trials of RL that lose, of which `arm` is what the winner becomes.

    Each holds its checkpoints in the first round, and the model of SFT that it began with.
    """
    losers = MOST_CANDIDATES - 1
    each = min(settings.keep_checkpoints + 1, -(-handover.round_steps // settings.save_every))
    return StageSpace(checkpoint=arm.checkpoint, checkpoints=losers * each, final=losers * arm.final)


def require_space(folder: Path, stages: Mapping[str, StageSpace], *, weights: Path | None) -> str:
    """Compare the free space with what the stages write, an export, and weights for vLLM in `weights`.

    Stages are named by their folders, or by a pattern of these; what lies there already needs no more space.
    Returns a summary; raises RunFolderError.
    """
    needed = {folder: 0}
    for name, space in stages.items():
        files = folder.glob(f"{name}/**/*.safetensors")
        needed[folder] += max(0, space.total - sum(path.stat().st_size for path in files))
    largest = max((space.final for space in stages.values()), default=0)
    needed[folder] += largest  # an export beside it
    if weights is not None:
        place = folder if _disk(weights) == _disk(folder) else weights
        needed[place] = needed.get(place, 0) + 2 * largest
    notes = []
    for place, size in needed.items():
        free = shutil.disk_usage(existing(place)).free
        notes.append(f"{_gb(size)} needed at most, {_gb(free)} free")
        if size > free:
            raise RunFolderError(
                f"the run writes up to {_gb(size)}, and {_gb(free)} are free",
                where=str(place),
                fix=" ".join(["free some, write elsewhere (--out), or", *_cheaper(stages)]),
            )
    return "; ".join(notes)


def _cheaper(stages: Mapping[str, StageSpace]) -> Iterator[str]:
    """The keys that make a run smaller, with what they hold now."""
    for name, space in stages.items():
        key = "sft" if name == "sft" else "grpo"
        count = f"{space.checkpoints} x {_gb(space.checkpoint)} on the disk at once"
        yield f"lower {key}.keep_checkpoints ({name}: {count});"
    yield "with lora.rank checkpoints hold the adapters alone"


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def _disk(path: Path) -> int:
    return existing(path).stat().st_dev


def _gb(size: int) -> str:
    return f"{size / GB:,.1f} GB" if size >= GB // 10 else f"{size / 10**6:,.1f} MB"
