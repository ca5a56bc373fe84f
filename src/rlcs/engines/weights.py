"""New weights on their way to an engine: one folder a version, which appears whole or not at all."""

import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from rlcs.errors import RunFolderError
from rlcs.models import Vlm, save


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A folder in Hugging Face format and the name of what is in it, unlike any other run's."""

    version: str
    folder: Path


class WeightsFolder:
    """Versions of one run, the newest alone kept.

    A version is written aside and renamed, so a folder with a version's name is complete. Only then is it
    named to an engine.
    """

    def __init__(self, path: Path) -> None:
        """Clear what an earlier attempt of the same run left."""
        self._path = path
        self._run = secrets.token_hex(4)
        self._count = 0
        self.newest: Weights | None = None

    def publish(self, vlm: Vlm) -> Weights:
        """Write the model as the next version; of a sharded one all ranks must. Raises RunFolderError."""
        self._count += 1
        version = f"{self._run}-{self._count}"
        aside = self._path / f"{version}.part"
        try:
            if vlm.mesh.rank == 0:
                self._path.mkdir(parents=True, exist_ok=True)
            save(vlm, aside)
            self.newest = vlm.mesh.first(lambda: self._put_in_place(aside, version))
        except OSError as error:
            raise RunFolderError(
                f"cannot write weights for the rollout engine: {error.strerror}", where=str(self._path)
            ) from error
        return self.newest

    def _put_in_place(self, aside: Path, version: str) -> Weights:
        folder = self._path / version
        aside.rename(folder)
        for old in self._path.iterdir():
            if old != folder and _is_version(old):
                shutil.rmtree(old)
        return Weights(version=version, folder=folder.absolute())


def _is_version(path: Path) -> bool:
    """Whether this is a folder that `publish` made, of this or an earlier attempt; others are left alone."""
    name, _, number = path.name.removesuffix(".part").partition("-")
    return path.is_dir() and len(name) == 8 and number.isdigit()
