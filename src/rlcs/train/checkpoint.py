"""Checkpoints: the state of training on disk, from which a stopped run continues bit for bit.

A checkpoint is a folder `step-000080/` of `model.safetensors`, `optimizer.safetensors`,
`state.json` and a manifest with checksums; nothing in it is ever unpickled. Of a model with adapters
it holds only the adapters, which alone train; of a sharded model every rank writes its rows
(rank 1 into `model-1.safetensors`), and any number of ranks can read them. It is written as
`step-000080.tmp-PID`, synced to disk, and renamed in one step: a folder without a suffix is complete.
Suffixes: `.tmp-PID` an unfinished save or removal, `.old` the checkpoint that a second save of the
same step replaces, `.bad` one that failed its checks. One run at a time writes to a folder.

Each rank writes in a thread, from copies in main memory, and takes the checksums meanwhile; nothing is read
again. All ranks agree between two steps that they are done, and rank 0 renames.
"""

import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlcs import storage
from rlcs.distributed import ALONE, World
from rlcs.errors import CheckpointError, RlcsError
from rlcs.model.checkpoints import (
    FORMAT,
    MODEL,
    OPTIMIZER,
    STATE,
    Stored,
    complete,
    folder_of,
    of_rank,
    rank_of,
    read_facts,
    unreadable,
)
from rlcs.model.tensor_file import write_tensors
from rlcs.storage import FileSum
from rlcs.train.host_copies import Files, HostCopies
from rlcs.train.state import OptimizerState, TrainState

T = TypeVar("T")

_FACTS = ("rng", "schedule", "cursor", "extra", "recipe_hash")
"""Fields of a state that are JSON-able."""
_BAD = re.compile(r"step-(\d{6,})\.bad.*")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unfinished:
    """A save whose files are being written: this rank's files, and the folders of all."""

    target: Path
    aside: Path
    files: Future[dict[str, FileSum]]
    keep: int
    always: Collection[int]

    def outcome(self) -> dict[str, FileSum] | RlcsError:
        """Wait for the checksums of this rank's files, or why they could not be written."""
        try:
            return self.files.result()
        except RlcsError as error:
            return error


class Checkpoints:
    """The checkpoints of one stage in a folder that all ranks see; all ranks call every method together.

    Whenever the process is killed, `load_latest` finds the last state that was finished.
    """

    def __init__(self, folder: Path, world: World = ALONE) -> None:
        """Touches no file yet."""
        self.folder = folder
        self._world = world
        self._copies = HostCopies(ranks=world.local_size)
        self._unfinished: _Unfinished | None = None
        self._pruning: Future[None] = _now(lambda: None)
        self._trusted: dict[Path, object] = {}

    # --- state to disk

    def save(self, state: TrainState, *, keep: int, always: Collection[int] = ()) -> Path:
        """Write `step-NNNNNN` and return its path; then prune to the `keep` newest.

        Those of the steps `always` are kept besides. Leftovers of earlier saves are removed. Raises
        RunFolderError, leaving no files, if the disk is full.
        """
        self._start(state, keep, always, in_background=False)
        self.wait()
        return self.folder / folder_of(state.step)

    def start(self, state: TrainState, *, keep: int, always: Collection[int] = ()) -> None:
        """Begin to save as `save` does, from a copy; `poll` or `wait` finishes it and raises its errors.

        Waits for the save before. Where the copy does not fit into main memory, the files are written here.
        """
        self._start(state, keep, always, in_background=True)

    def poll(self) -> None:
        """Finish a save that all ranks have written. Raises RunFolderError as `save` does."""
        self._finish(wait=False)

    def wait(self) -> None:
        """Finish a save and the removal of what it replaces, however long it takes. Raises as `poll` does."""
        self._finish(wait=True)
        self._pruning.result()

    def _start(self, state: TrainState, keep: int, always: Collection[int], *, in_background: bool) -> None:
        self.wait()
        target = self.folder / folder_of(state.step)
        aside = self._world.first(partial(_prepare, target))
        files, facts = _own_files(state, self._world)
        copies = self._copies.of(files) if in_background else None
        write = partial(_write, aside, files if copies is None else copies, facts)
        written = _now(write) if copies is None else _in_thread(write)
        self._unfinished = _Unfinished(
            target=target, aside=aside, files=written, keep=keep, always=frozenset(always)
        )

    def _finish(self, *, wait: bool) -> None:
        """Rename a save that all ranks have written; without `wait` return if one has not."""
        save = self._unfinished
        if save is None:
            return
        outcomes = self._world.gather(save.outcome() if wait or save.files.done() else None)
        if any(outcome is None for outcome in outcomes):
            return
        self._unfinished = None
        try:
            sums: dict[str, FileSum] = {}
            for outcome in outcomes:
                if isinstance(outcome, RlcsError):
                    raise outcome
                sums |= outcome or {}
            self._world.first(partial(_put_in_place, save.aside, save.target, sums))
        except BaseException:
            if self._world.rank == 0:
                shutil.rmtree(save.aside, ignore_errors=True)
            raise
        if self._world.rank == 0:
            self._trust(save.target)
            self._pruning = _in_thread(partial(self._prune, save))

    def _prune(self, save: _Unfinished) -> None:
        """Keep the newest `keep` valid ones up to the step of a save, with that itself.

        Later steps and those of `always` are not touched. A folder is renamed before it is removed, so that a
        partly removed one is never taken for a checkpoint.
        """
        found = complete(self.folder)
        [step] = (number for number, path in found.items() if path == save.target)
        older = sorted((n for n in found if n < step and n not in save.always), reverse=True)
        kept = 1
        oldest = step
        for number in older:
            if kept >= save.keep:
                _remove(found[number])
            elif self._is_valid(found[number]):
                kept, oldest = kept + 1, number
        for path in self.folder.iterdir():
            match = _BAD.fullmatch(path.name)
            if match and kept >= save.keep and int(match[1]) < oldest:
                _remove(path)

    def _is_valid(self, path: Path) -> bool:
        """Whether a checkpoint passes its checks; it is read only if it was not seen to, or has changed."""
        if self._trusted.get(path) == _fingerprint(path):
            return True
        try:
            storage.verify_manifest(path)
        except CheckpointError:
            return False
        self._trust(path)
        return True

    def _trust(self, path: Path) -> None:
        """Remember that a checkpoint was written or verified by this process."""
        self._trusted[path] = _fingerprint(path)

    # --- disk to state

    def load_latest(self) -> TrainState | None:
        """The newest checkpoint that passes its checks, or None if there is none.

        Leftovers of a killed save are removed, which may be large and are never read. A damaged
        checkpoint is renamed to `.bad` with a RuntimeWarning, and the next older one is tried.
        """
        world = self._world
        world.first(lambda: _tidy(self.folder))
        while newest := world.first(lambda: max(complete(self.folder).items(), default=None)):
            step, path = newest
            try:
                return self._read(path, step)
            except CheckpointError as error:
                world.first(partial(_set_aside, path, step, error))
        return None

    def load(self, step: int) -> TrainState:
        """The checkpoint of a step. Raises CheckpointError if it is missing or damaged."""
        path = self._world.first(lambda: complete(self.folder).get(step))
        if path is None:
            raise CheckpointError(f"there is no checkpoint of step {step}", where=str(self.folder))
        return self._read(path, step)

    def _read(self, path: Path, step: int) -> TrainState:
        """Verify a checkpoint, each rank its share of the files, and open it."""
        world = self._world
        outcome: TrainState | CheckpointError
        try:
            listed = storage.verify_manifest(path, only=lambda n: rank_of(n) % world.size == world.rank)
            outcome = _open(path, step, listed)
        except CheckpointError as error:
            outcome = error
        failures = world.gather(outcome if isinstance(outcome, CheckpointError) else None)
        for failure in filter(None, failures):
            raise failure
        assert isinstance(outcome, TrainState), "else it is among the failures"
        if world.rank == 0:
            self._trust(path)
        return outcome


# --- state to disk ------------------------------------------------------------------------------


def _now(work: Callable[[], T]) -> Future[T]:
    """The outcome of work."""
    future: Future[T] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """The outcome of work that is done meanwhile, and given up when the process ends."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="rlcs-checkpoint", daemon=True).start()
    return future


def _prepare(target: Path) -> Path:
    """Remove leftovers of killed saves; the temporary folder in which to write `target`."""
    _tidy(target.parent)
    return target.with_name(f"{target.name}.tmp-{os.getpid()}")


def _own_files(state: TrainState, world: World) -> tuple[Files, str]:
    """The tensors of the files that this rank writes, and on rank 0 the content of `state.json`.

    A file holds this rank's rows of sharded tensors; rank 0's also has the tensors that are not sharded.
    Where ranks hold copies of each other's rows, the first with them writes.
    """
    if world.rank >= world.writers:
        return {}, ""
    model, tied = _untied(_own(state.model, world))
    optimizer = _own(state.optimizer.tensors, world)
    files = {of_rank(MODEL, world.rank): model, of_rank(OPTIMIZER, world.rank): optimizer}
    if world.rank > 0:
        return files, ""
    tensors = (*state.model.items(), *state.optimizer.tensors.items())
    unsharded = [name for name, tensor in tensors if not isinstance(tensor, DTensor)]
    facts = {"format": FORMAT, "tied": tied, "ranks": world.writers, "unsharded": unsharded}
    facts |= {name: getattr(state, name) for name in ("step", *_FACTS)}
    return files, storage.to_json(facts | {"optimizer": state.optimizer.settings})


def _own(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The tensors, or rows of tensors, that this rank writes."""
    return {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
        if world.rank == 0 or isinstance(tensor, DTensor)
    }


def _untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, each shared one under its first name only, and that name for each of its other names."""
    unique: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key in first and tensor.numel():
            tied[name] = first[key]
        else:
            first[key] = name
            unique[name] = tensor
    return unique, tied


def _write(aside: Path, files: Files, facts: str) -> dict[str, FileSum]:
    """Write this rank's files; their checksums. Not atomic, which the folder's rename is."""
    sums: dict[str, FileSum] = {}
    for name, tensors in files.items():
        path = aside / name
        try:
            sums[name] = write_tensors(path, tensors)
        except OSError as error:
            raise storage.cannot_write(path, sum(t.nbytes for t in tensors.values()), error) from error
    if facts:
        path, content = aside / STATE, facts.encode()
        try:
            with storage.HashingWriter(path) as file:
                file.write(content)
                sums[STATE] = file.sum
        except OSError as error:
            raise storage.cannot_write(path, len(content), error) from error
    return sums


def _put_in_place(aside: Path, target: Path, sums: Mapping[str, FileSum]) -> None:
    """Write the manifest, last, and give the folder its name."""
    storage.write_manifest(aside, sums)
    replaced = target.with_name(f"{target.name}.old")
    if target.exists():
        target.replace(replaced)  # a rename cannot replace a folder that has files
    aside.replace(target)
    storage.fsync(target.parent)
    if replaced.exists():
        _remove(replaced)


def _tidy(folder: Path) -> None:
    """Remove leftovers of a killed save or removal, and restore a checkpoint that was being replaced."""
    for path in sorted(folder.glob("step-*.tmp-*")):
        shutil.rmtree(path)
    for path in sorted(folder.glob("step-*.old")):
        target = path.with_suffix("")
        if target.exists():
            _remove(path)
        else:
            path.replace(target)


def _remove(path: Path) -> None:
    removed = path.with_name(f"{path.name.partition('.')[0]}.tmp-{os.getpid()}")
    path.replace(removed)
    shutil.rmtree(removed)


def _fingerprint(path: Path) -> object:
    """What changes when a file of a folder is written again: sizes, times and numbers of its files."""
    facts = ((file.name, file.stat()) for file in sorted(path.iterdir()))
    return [(name, fact.st_size, fact.st_mtime_ns, fact.st_ino) for name, fact in facts]


# --- disk to state ------------------------------------------------------------------------------


def _set_aside(path: Path, step: int, error: CheckpointError) -> None:
    bad = _free_name(path.with_name(f"{folder_of(step)}.bad"))
    path.replace(bad)
    warnings.warn(f"{error}\nset aside as {bad.name}; trying an older one", RuntimeWarning, 2)


def _free_name(path: Path) -> Path:
    names = (path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000)))
    return next(name for name in names if not name.exists())


def _open(path: Path, step: int, listed: Collection[str]) -> TrainState:
    """Open a checkpoint with the `listed` files.

    Raises CheckpointError for anything that `Checkpoints` did not write.
    """
    try:
        facts = read_facts(path, step)
        ranks, unsharded = range(facts["ranks"]), facts["unsharded"]
        needed = {STATE, *(of_rank(name, rank) for name in (MODEL, OPTIMIZER) for rank in ranks)}
        if missing := needed - {*listed}:
            raise ValueError(f"its manifest lists no {min(missing)}")
        return TrainState(
            step=step,
            model=Stored([path / of_rank(MODEL, rank) for rank in ranks], facts["tied"], unsharded),
            optimizer=OptimizerState(
                tensors=Stored([path / of_rank(OPTIMIZER, rank) for rank in ranks], {}, unsharded),
                settings=facts["optimizer"],
            ),
            **{name: facts[name] for name in _FACTS},
        )
    except (FileNotFoundError, KeyError, TypeError, ValueError, IndexError, SafetensorError) as error:
        raise unreadable(path, step, error) from error
