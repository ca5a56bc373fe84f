"""The folder of a run: its recipe, the log of each start, and the versions and command behind its numbers."""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from rlcs.errors import RunFolderError
from rlcs.grading.own import check_function
from rlcs.recipe.loading import differences, dump, load_recipe
from rlcs.recipe.schema import Recipe
from rlcs.storage import atomic_write

_WORK = ("done.json", "manifest.json", "step-*.jsonl", "samples.jsonl", "predictions.jsonl")
"""Files of a run that hold results of long work."""

log = logging.getLogger("rlcs")


def claim(folder: Path, recipe: Recipe) -> None:
    """Write the resolved recipe into a new run folder, or check that an old one has the same.

    Arms may be added to it, and a start without results (say, of a mistyped model) may be corrected. Raises
    RunFolderError for a folder of another recipe or with other files, RecipeError.
    """
    for function in recipe.grpo.reward.functions:
        check_function(function)
    recipe.grpo.reward.judge.template_text()
    path = folder / "recipe.yaml"
    if not path.exists():
        _create(folder)
        atomic_write(path, dump(recipe))
        return
    before = load_recipe(str(path)).recipe
    changed = differences(before, recipe)
    keys = [key for key, _, _ in changed]
    if not keys:
        return
    arms_join = keys == ["study.arms"] and set(before.study.arms) < set(recipe.study.arms)
    if not arms_join:
        if _holds_results(folder, keys):
            listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in changed[:5])
            raise RunFolderError(
                f"the folder holds a run of another recipe: {listed}",
                where=str(folder),
                fix="choose another --out, or remove the folder, or run with its own recipe.yaml",
            )
        (folder / "eval" / "problems.jsonl").unlink(missing_ok=True)  # of the earlier data
    atomic_write(path, dump(recipe))


def _create(folder: Path) -> None:
    """Make the folder; the cold start of an earlier `rlcs distill` may be in it."""
    if folder.exists() and any(path.name != "cold_start" for path in folder.iterdir()):
        raise RunFolderError(
            "the folder is not empty and holds no run", where=str(folder), fix="choose another --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot create it: {error.strerror}", where=str(folder)) from error


def _holds_results(folder: Path, changed: Iterable[str]) -> bool:
    """Whether the folder holds a finished stage, a checkpoint or answers that depend on the changed keys.

    A cold start depends on its data and its teacher alone.
    """
    reusable = not any(key.split(".")[0] in ("data", "images", "seed", "teacher") for key in changed)
    return any(
        path.stat().st_size and not (reusable and "cold_start" in path.relative_to(folder).parts)
        for pattern in _WORK
        for path in folder.rglob(pattern)
    )


@contextmanager
def attempt_log(folder: Path) -> Iterator[None]:
    """Log to a new file `attempt-N.log`, one for each start of a run, with the error that ended it."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + len(list(folder.glob("attempt-*.log")))
    handler = logging.FileHandler(folder / f"attempt-{number}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, level = logging.getLogger(), log.level
    root.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        log.error("ended by %s: %s", type(error).__name__, error)
        raise
    finally:
        log.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    return {name: metadata.version(name) for name in ("rlcs", "torch", "transformers")}


def command() -> list[str]:
    """The command line of this process."""
    return ["rlcs", *sys.argv[1:]]
