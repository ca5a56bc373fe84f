"""The folder of a run: its recipe, the log of each start, and the versions and command behind its numbers."""

import hashlib
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from operator import attrgetter
from pathlib import Path

from rlcs.errors import RunFolderError
from rlcs.grading.own import check_function
from rlcs.recipe.arms import ARMS
from rlcs.recipe.judge import KEY
from rlcs.recipe.keys import recipe_keys
from rlcs.recipe.loading import differences, dump, load_recipe
from rlcs.recipe.sampling import Server
from rlcs.recipe.schema import Recipe
from rlcs.redaction import RedactingFormatter
from rlcs.storage import atomic_write
from rlcs.storage.locks import LOCK

_WORK = ("done.json", "manifest.json", "step-*.jsonl", "samples.jsonl", "predictions.jsonl")
"""Files of a run that hold results of long work."""

_BEFORE_A_RUN = ("cold_start", "images", LOCK)
"""What a folder may hold before its run: the cold start of `rlcs distill`, images that ranks stored."""

_JUDGE_LIMITS = (
    *(name for name in Server.model_fields if name != "request"),
    *("base_url", "max_wait_s", "max_requests"),
    *("request.max_tokens", "request.headers", "request.quirks"),
)
_KEPT = ("save_every", "keep_checkpoints", "keep_steps")
OPERATIONAL = frozenset(
    {
        *("study.preflight", "grpo.reward.deadline_s", "grpo.reward.workers"),
        *(f"{KEY}.{name}" for name in _JUDGE_LIMITS),
        *(f"{stage}.{name}" for stage in ("sft", "grpo") for name in _KEPT),
        *(
            "teacher.token_budget",
            "teacher.cost_budget",
            "images.workers",
            "images.cache_gb",
            "images.features_gb",
        ),
    }
)
"""Keys that do not change what is learnt (limits of graders, kept checkpoints, the trial before): a run may
go on with others."""

MEMORY = frozenset(
    {
        *("sft.pack_tokens", "grpo.pack_tokens", "grpo.max_rows", "eval.max_rows", "rollout.memory_share"),
        *("model.gradient_checkpointing", "model.fused_loss"),
        *("parallel.reshard_after_forward", "parallel.cpu_offload", "parallel.processes"),
    }
)
"""Keys that say how much memory is used, and change results by rounding alone: a run whose memory ran out may
go on with others."""

log = logging.getLogger("rlcs")


def may_change(recipe: Recipe) -> frozenset[str]:
    """The keys with whose other values a run may go on."""
    # There the mean is of each pack.
    fixed = {"grpo.pack_tokens"} if recipe.grpo.loss_average == "micro_batch" else set[str]()
    return OPERATIONAL | (MEMORY - fixed)


def recipe_hash(recipe: Recipe) -> str:
    """Hash of the keys that a checkpoint depends on.

    The arms are left out: some may be added to a run later, which changes nothing for the others.
    """
    free = may_change(recipe)
    keys = [key for key in recipe_keys() if key not in free and not key.startswith("study.")]
    facts = [(key, attrgetter(key)(recipe)) for key in keys]
    return hashlib.sha256(repr(facts).encode("utf-8", "backslashreplace")).hexdigest()


def claim(folder: Path, recipe: Recipe, *, dry: bool = False) -> Recipe:
    """Write the resolved recipe into a new run folder, or check that an old one has the same.

    The arms of the folder are those of every command so far, `rlcs sft` and then `rlcs run`, say. Keys of
    `may_change` may, and a start without results (say, of a mistyped model) may be corrected. Returns the
    recipe of the folder; a `dry` claim writes nothing. Raises RecipeError, and RunFolderError for a folder
    of another recipe or with other files.
    """
    for function in recipe.grpo.reward.functions:
        check_function(function)
    recipe.grpo.reward.judge.template_text()
    path = folder / "recipe.yaml"
    if not path.exists():
        _require_free(folder)
        if not dry:
            _create(folder)
            atomic_write(path, dump(recipe))
        return recipe
    before = load_recipe(str(path)).recipe
    fixed = set(recipe_keys()) - may_change(recipe) - {"study.arms"}
    changed = [each for each in differences(before, recipe) if each[0] in fixed]
    keys = [key for key, _, _ in changed]
    if keys:
        if holds_results(folder, keys):
            listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in changed[:5])
            raise RunFolderError(
                f"the folder holds a run of another recipe: {listed}",
                where=str(folder),
                fix="choose another --out, or remove the folder, or run with its own recipe.yaml",
            )
        if not dry:
            (folder / "eval" / "problems.jsonl").unlink(missing_ok=True)  # of the earlier data
    else:
        arms = tuple(arm for arm in ARMS if arm in {*before.study.arms, *recipe.study.arms})
        recipe = recipe.model_copy(update={"study": recipe.study.model_copy(update={"arms": arms})})
    if recipe != before and not dry:
        atomic_write(path, dump(recipe))
    return recipe


def _require_free(folder: Path) -> None:
    """Require that nothing is in the folder but a cold start, images, the lock, and what a kill left."""
    found = folder.iterdir() if folder.exists() else ()
    if any(path.name not in _BEFORE_A_RUN and not path.name.startswith(".tmp-") for path in found):
        raise RunFolderError(
            "the folder is not empty and holds no run", where=str(folder), fix="choose another --out"
        )


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot create it: {error.strerror}", where=str(folder)) from error


def holds_results(folder: Path, changed: Iterable[str]) -> bool:
    """Whether the folder holds a finished stage, a checkpoint or answers that depend on the changed keys.

    A cold start depends on its data and its teacher alone.
    """
    reusable = not any(key.split(".")[0] in ("data", "images", "seed", "teacher") for key in changed)
    return any(
        path.stat().st_size and not (reusable and "cold_start" in path.relative_to(folder).parts)
        for pattern in _WORK
        for path in folder.rglob(pattern)
    )


class _AttemptLog(logging.FileHandler):
    """A log file that a full disk neither stops nor fills the screen for; the file may lack lines then."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: what else is written to the disk says it."""

    def close(self) -> None:
        """Close the file, whose last lines may not fit on the disk."""
        with suppress(OSError):
            super().close()


@contextmanager
def attempt_log(folder: Path) -> Iterator[None]:
    """Log to a new file `attempt-N.log`, one for each start of a run, with the error that ended it."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + len(list(folder.glob("attempt-*.log")))
    handler = _AttemptLog(folder / f"attempt-{number}.log", encoding="utf-8")
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
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
