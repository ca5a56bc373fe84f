"""New weights for vLLM: one folder a version, which appears whole or not at all.

A version is a model, or adapters on top of a model that was published once: 100 MB a step instead of 15 GB.
"""

import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import ref

from safetensors.torch import load_file, save_file

from rlcs.errors import RunFolderError
from rlcs.model.loading import save, save_adapters
from rlcs.model.vlm import Vlm
from rlcs.storage import open_to_readers, read_json, write_json

if TYPE_CHECKING:
    from peft import PeftModel

_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A folder in Hugging Face format and the name of what is in it, unlike any other run's.

    With a `base` the folder holds adapters in peft's format, which add to that model.
    """

    version: str
    folder: Path
    base: "Weights | None" = None

    @property
    def model(self) -> "Weights":
        """The whole model among them: these, or what they add to."""
        return self.base or self


def model_of(version: str) -> str:
    """The version of the model that a version is, or adds to."""
    return version.partition("+")[0]


class WeightsFolder:
    """Versions of one run, the newest alone kept, and the model that it adds to.

    A version is written aside and renamed, so a folder with a version's name is complete. Only then is it
    named to an engine.
    """

    def __init__(self, path: Path, *, as_adapters: bool = False) -> None:
        """What an earlier attempt of the same run left goes with the first version.

        `as_adapters`: of a model with adapters they alone are written, after the model below them, once.
        """
        self._path, self._as_adapters = path, as_adapters
        self._run = secrets.token_hex(4)
        self._count = 0
        # Whose model is the newest version's base; a run's next model is loaded when this one has gone.
        self._below: ref[PeftModel] | None = None
        self._writes = False
        self.newest: Weights | None = None

    def publish(self, vlm: Vlm) -> Weights:
        """Write the model as the next version; of a sharded one all ranks must. Raises RunFolderError."""
        if vlm.adapter is None or not self._as_adapters:
            self._below, self.newest = None, self._write(vlm, save)
            return self.newest
        if self.newest is None or self._below is None or self._below() is not vlm.adapter:
            self.newest, self._below = self._write(replace(vlm, reference_mode=True), save), ref(vlm.adapter)
        self.newest = self._write(vlm, save_adapters, base=self.newest.model)
        return self.newest

    def remove(self) -> None:
        """Remove all versions, when vLLM has ended."""
        if self._writes:
            shutil.rmtree(self._path, ignore_errors=True)

    def _write(self, vlm: Vlm, how: Callable[[Vlm, Path], None], base: Weights | None = None) -> Weights:
        self._count += 1
        version = f"{self._run}-{self._count}" if base is None else f"{base.version}+{self._count}"
        aside = self._path / f"{version}.part"
        try:
            self._writes = vlm.world.rank == 0
            if self._writes:
                self._path.mkdir(parents=True, exist_ok=True)
            how(vlm, aside)
            return vlm.world.first(lambda: self._put_in_place(vlm, aside, version, base))
        except OSError as error:
            raise RunFolderError(
                f"cannot write weights for the rollout engine: {error.strerror}", where=str(self._path)
            ) from error

    def _put_in_place(self, vlm: Vlm, aside: Path, version: str, base: Weights | None) -> Weights:
        folder = self._path / version
        if vlm.device.type == "cpu" and base is None:
            _untie(vlm, aside)
            open_to_readers(aside)
        aside.rename(folder)
        for old in self._path.iterdir():
            if old.name not in (version, model_of(version)) and _is_version(old):
                shutil.rmtree(old)
        return Weights(version=version, folder=folder.absolute(), base=base)


class Unchanged(WeightsFolder):
    """A model that does not train: vLLM is started with it and keeps it, so nothing is written."""

    def __init__(self, name: str) -> None:
        """A folder or hub id. vLLM calls the weights that it was started with `default`."""
        self._weights = self.newest = Weights(version="default", folder=Path(name))

    def remove(self) -> None:
        """Keep it: the folder belongs to the user."""

    def publish(self, vlm: Vlm) -> Weights:
        """Return what vLLM was started with."""
        return self._weights


def _untie(vlm: Vlm, folder: Path) -> None:
    """Give the head weights of its own in the folder, where it shares those of the input embedding.

    On a CPU vLLM 0.32 packs the head's weights into a copy, which reloading does not renew while they are
    tied: its answers would come from the old head.
    """
    head, embedding = vlm.model.get_output_embeddings(), vlm.model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return
    config = read_json(folder / "config.json")
    for part in (config, config.get("text_config", {})):
        part["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        content = read_json(index)
        places: dict[str, str] = content["weight_map"]
        name = next(name for name in places if name.endswith(_EMBEDDING))
        own = {"lm_head.weight": load_file(folder / places[name])[name].clone()}
        places["lm_head.weight"] = _HEAD
        write_json(index, content)
        save_file(own, folder / _HEAD)
    else:
        tensors = load_file(single)
        tensors["lm_head.weight"] = next(
            t for name, t in tensors.items() if name.endswith(_EMBEDDING)
        ).clone()
        save_file(tensors, single, metadata={"format": "pt"})


def _is_version(path: Path) -> bool:
    """Whether this is a folder that `publish` made, of this or an earlier attempt; others are left alone."""
    return path.is_dir() and re.fullmatch(r"\w{8}-\d+(\+\d+)?(\.part)?", path.name) is not None
