"""Publishes weights for vLLM in its dtype: one folder a version, which appears only when it is complete.

A version is a model, or adapters on top of a model that was published once: 100 MB a step instead of 15 GB.
"""

import re
import secrets
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import ref

from rlcs.errors import RunFolderError
from rlcs.model.loading import save_adapters
from rlcs.model.serving_weights import serving_dtype, write_serving
from rlcs.model.vlm import Vlm

if TYPE_CHECKING:
    from peft import PeftModel

MEMORY = Path("/dev/shm")  # noqa: S108 - the folder has a random name
"""Linux's folder in main memory."""
_COPIES = 2.2
"""Versions that lie in the folder while one takes the place of another, with some space left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A folder in Hugging Face format and the version in it, a name that is unique over all runs.

    With a `base` the folder holds adapters in peft's format, which add to that model. Weights that were
    `sent` to the servers lie in no folder: theirs is that of the weights with which servers start.
    """

    version: str
    folder: Path
    base: "Weights | None" = None
    sent: bool = False

    @property
    def model(self) -> "Weights":
        """The whole model: these weights, or those that the adapters add to."""
        return self.base or self


def model_of(version: str) -> str:
    """The version of the whole model, of a version of a model or of adapters."""
    return version.partition("+")[0]


class WeightsFolder:
    """The newest weights of one run and the model that they add to; older versions are removed.

    A version is written under another name and then renamed, so a folder with a version's name is complete.
    """

    def __init__(
        self,
        path: Path,
        *,
        as_adapters: bool = False,
        compute_dtype: str = "same",
        memory: Path | None = None,
    ) -> None:
        """The first version removes what an earlier attempt of the same run left.

        `as_adapters`: of a model with adapters the model is written once, then the adapters alone.
        `compute_dtype` is that of a sharded model. `memory` is a folder that is used instead of `path` if two
        versions fit; what is written there goes when this process ends, however it ends.
        """
        self._path, self._as_adapters = path, as_adapters
        self._compute, self._memory = compute_dtype, memory
        self._guard: subprocess.Popen[bytes] | None = None
        self._run = secrets.token_hex(4)
        self._count = 0
        # The adapted model whose base is published; weak, so that it is freed before the next one is loaded.
        self._adapted: ref[PeftModel] | None = None
        self._has_written = False
        self.newest: Weights | None = None

    def publish(self, vlm: Vlm) -> Weights:
        """Write the model as the next version; of a sharded one all ranks must. Raises RunFolderError."""
        if vlm.adapter is None or not self._as_adapters:
            self._adapted, self.newest = None, self._write(vlm, self._whole)
            return self.newest
        if self.newest is None or self._adapted is None or self._adapted() is not vlm.adapter:
            self.newest = self._write(replace(vlm, reference_mode=True), self._whole)
            self._adapted = ref(vlm.adapter)
        self.newest = self._write(vlm, save_adapters, base=self.newest.model)
        return self.newest

    def announce(self, vlm: Vlm) -> Weights:
        """Name the next version of a model that is not written; one was. All ranks must call it."""
        assert self.newest is not None, "servers have started with weights"
        self._count += 1
        sent = replace(self.newest, version=f"{self._run}-{self._count}", sent=True)
        self.newest = vlm.world.first(lambda: sent)
        return self.newest

    def remove(self) -> None:
        """Remove all versions, when vLLM has ended."""
        if self._has_written:
            shutil.rmtree(self._path, ignore_errors=True)
        if self._guard is not None:
            self._guard.communicate()
            self._guard = None

    def _whole(self, vlm: Vlm, folder: Path) -> None:
        """Write the whole model.

        On a CPU vLLM 0.32 packs the head's weights into a copy, which reloading does not replace while they
        are tied: its answers would come from the old head. So they are written apart there.
        """
        dtype = serving_dtype(vlm, self._compute)
        write_serving(vlm, folder, dtype, untied=vlm.device.type == "cpu")

    def _choose(self, vlm: Vlm) -> None:
        """Take the folder in main memory, once, if it has space; else the other."""
        memory, self._memory = self._memory, None
        if memory is None or not memory.is_dir():
            return
        needed = sum(p.numel() for p in vlm.model.parameters()) * serving_dtype(vlm, self._compute).itemsize
        if shutil.disk_usage(memory).free < _COPIES * needed:
            return
        self._path = memory / f"rlcs-weights-{self._run}"
        # It ends when the other end of its input closes, as that of a killed process does.
        command = ["sh", "-c", 'cat > /dev/null; rm -rf -- "$0"', str(self._path)]
        self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def _write(self, vlm: Vlm, write: Callable[[Vlm, Path], None], base: Weights | None = None) -> Weights:
        self._count += 1
        version = f"{self._run}-{self._count}" if base is None else f"{base.version}+{self._count}"
        if vlm.world.rank == 0:
            self._choose(vlm)
        unfinished = self._path / f"{version}.part"
        try:
            self._has_written = vlm.world.rank == 0
            if self._has_written:
                self._path.mkdir(parents=True, exist_ok=True)
            write(vlm, unfinished)
            return vlm.world.first(partial(self._put_in_place, unfinished, version, base))
        except OSError as error:
            raise RunFolderError(
                f"cannot write weights for the rollout engine: {error.strerror}", where=str(self._path)
            ) from error

    def _put_in_place(self, unfinished: Path, version: str, base: Weights | None) -> Weights:
        folder = self._path / version
        unfinished.rename(folder)
        for old in self._path.iterdir():
            if old.name not in (version, model_of(version)) and _is_version(old):
                shutil.rmtree(old)
        return Weights(version=version, folder=folder.absolute(), base=base)


class Unchanged(WeightsFolder):
    """A model that does not train: vLLM is started with it, so nothing is written."""

    def __init__(self, name: str) -> None:
        """`name` is a folder or hub id. vLLM calls the weights that it was started with `default`."""
        self._weights = self.newest = Weights(version="default", folder=Path(name))

    def remove(self) -> None:
        """Do nothing: the folder belongs to the user."""

    def publish(self, vlm: Vlm) -> Weights:
        """Return the weights that vLLM was started with."""
        return self._weights


def _is_version(path: Path) -> bool:
    """Whether `publish` made this folder, in this or an earlier attempt; other folders are not touched."""
    return path.is_dir() and re.fullmatch(r"\w{8}-\d+(\+\d+)?(\.part)?", path.name) is not None
