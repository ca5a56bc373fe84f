"""Publishes weights for vLLM: one folder a version, which appears only when it is complete.

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
    """A folder in Hugging Face format and the version in it, a name that is unique over all runs.

    With a `base` the folder holds adapters in peft's format, which add to that model.
    """

    version: str
    folder: Path
    base: "Weights | None" = None

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

    def __init__(self, path: Path, *, as_adapters: bool = False) -> None:
        """The first version removes what an earlier attempt of the same run left.

        `as_adapters`: of a model with adapters the model is written once, then the adapters alone.
        """
        self._path, self._as_adapters = path, as_adapters
        self._run = secrets.token_hex(4)
        self._count = 0
        # The adapted model whose base is published; weak, so that it is freed before the next one is loaded.
        self._adapted: ref[PeftModel] | None = None
        self._has_written = False
        self.newest: Weights | None = None

    def publish(self, vlm: Vlm) -> Weights:
        """Write the model as the next version; of a sharded one all ranks must. Raises RunFolderError."""
        if vlm.adapter is None or not self._as_adapters:
            self._adapted, self.newest = None, self._write(vlm, save)
            return self.newest
        if self.newest is None or self._adapted is None or self._adapted() is not vlm.adapter:
            self.newest = self._write(replace(vlm, reference_mode=True), save)
            self._adapted = ref(vlm.adapter)
        self.newest = self._write(vlm, save_adapters, base=self.newest.model)
        return self.newest

    def remove(self) -> None:
        """Remove all versions, when vLLM has ended."""
        if self._has_written:
            shutil.rmtree(self._path, ignore_errors=True)

    def _write(self, vlm: Vlm, write: Callable[[Vlm, Path], None], base: Weights | None = None) -> Weights:
        self._count += 1
        version = f"{self._run}-{self._count}" if base is None else f"{base.version}+{self._count}"
        unfinished = self._path / f"{version}.part"
        try:
            self._has_written = vlm.world.rank == 0
            if self._has_written:
                self._path.mkdir(parents=True, exist_ok=True)
            write(vlm, unfinished)
            return vlm.world.first(lambda: self._put_in_place(vlm, unfinished, version, base))
        except OSError as error:
            raise RunFolderError(
                f"cannot write weights for the rollout engine: {error.strerror}", where=str(self._path)
            ) from error

    def _put_in_place(self, vlm: Vlm, unfinished: Path, version: str, base: Weights | None) -> Weights:
        folder = self._path / version
        if vlm.device.type == "cpu" and base is None:
            _untie(vlm, unfinished)
            open_to_readers(unfinished)
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


def _untie(vlm: Vlm, folder: Path) -> None:
    """Store the head's weights separately in the folder, if they are tied to those of the input embedding.

    On a CPU vLLM 0.32 packs the head's weights into a copy, which reloading does not replace while they are
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
        files: dict[str, str] = content["weight_map"]
        name = next(name for name in files if name.endswith(_EMBEDDING))
        weight = load_file(folder / files[name])[name].clone()
        files["lm_head.weight"] = _HEAD
        write_json(index, content)
        save_file({"lm_head.weight": weight}, folder / _HEAD)
    else:
        tensors = load_file(single)
        weight = next(tensor for name, tensor in tensors.items() if name.endswith(_EMBEDDING)).clone()
        tensors["lm_head.weight"] = weight
        save_file(tensors, single, metadata={"format": "pt"})


def _is_version(path: Path) -> bool:
    """Whether `publish` made this folder, in this or an earlier attempt; other folders are not touched."""
    return path.is_dir() and re.fullmatch(r"\w{8}-\d+(\+\d+)?(\.part)?", path.name) is not None
