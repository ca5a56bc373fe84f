"""The folder of a run: its recipe, the log of each start, and the versions and command behind its numbers."""

import fcntl
import hashlib
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
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

_WORK = ("done.json", "manifest.json", "step-*.jsonl", "samples.jsonl", "predictions.jsonl")
"""Files of a run that hold results of long work."""

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
        *("parallel.reshard_after_forward", "parallel.cpu_offload"),
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
        if _holds_results(folder, keys):
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
    """Require that nothing is in the folder but the cold start of an earlier `rlcs distill`, and images."""
    if folder.exists() and any(path.name not in ("cold_start", "images") for path in folder.iterdir()):
        raise RunFolderError(
            "the folder is not empty and holds no run", where=str(folder), fix="choose another --out"
        )


def _create(folder: Path) -> None:
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


def hold(folder: Path, until: ExitStack) -> None:
    """Hold a run folder until the stack ends (or the process, however it ends).

    Raises RunFolderError while another process holds it: two would write into the same files.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    file = until.enter_context((folder / "logs" / "lock").open("a"))
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        fix = f"wait for it or stop it, or choose another --out; `rlcs report {folder} --live` follows it"
        raise RunFolderError("another process is running in it now", where=str(folder), fix=fix) from error
    except OSError as error:
        log.info("%s: the file system has no locks (%s)", folder, error.strerror)


@contextmanager
def attempt_log(folder: Path) -> Iterator[None]:
    """Log to a new file `attempt-N.log`, one for each start of a run, with the error that ended it."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + len(list(folder.glob("attempt-*.log")))
    handler = logging.FileHandler(folder / f"attempt-{number}.log", encoding="utf-8")
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
