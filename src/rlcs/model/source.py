"""Finds the model behind a name, wherever a model is named: on the command line, in a recipe, in Python.

A name is a folder in Hugging Face format, a hub id, a model that ships with rlcs, or a run: its folder (its
main model), one stage of it (`runs/mine/sft`), a stage's `final`, a checkpoint's folder, or a step
(`runs/mine@80`).
Imports no torch: a mistyped name is refused before anything is loaded.
"""

import difflib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rlcs.data.sources import suggest
from rlcs.errors import ModelError, RunFolderError, UserError
from rlcs.model.checkpoints import complete, folder_of, step_of
from rlcs.recipe.arms import ARMS, TRAINING_ORDER, ArmName
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.schema import Recipe
from rlcs.storage import DONE, at_home, is_done, read_json

BUILTIN = {"builtin": "builtin_model", "builtin-hybrid": "builtin_hybrid_model"}
"""The models that ship with rlcs, and their folders in the package."""
RECIPE = "recipe.yaml"
"""The file that makes a folder a run."""
CHECKPOINTS, MODELS, FINAL = "checkpoints", "models", "final"
"""Folders of a stage: states of training, models made of them, and the model that it ended with."""
_SHOWN = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model: `weights` is a folder or hub id; run, recipe, arm and step of training where they are known.

    Of a `checkpoint` the weights are written when they are needed (`loading.weights_of`).
    """

    weights: str
    revision: str | None = None
    run: Path | None = None
    recipe: Recipe | None = None
    arm: ArmName | None = None
    step: int | None = None
    checkpoint: Path | None = None

    @property
    def files(self) -> Path:
        """The folder whose files change where the weights do."""
        return self.checkpoint or Path(self.weights)


def find_source(name: str, arm: str | None = None, step: int | None = None) -> Source:
    """Find the model `name`; of a run the one of `arm` (its main one) after `step` (its finished one).

    Raises UserError, RunFolderError or ModelError where there is none.
    """
    if arm is not None and arm not in ARMS:
        raise UserError(f"no arm is called {arm!r}", where="--arm", fix=suggest(arm, ARMS))
    place, at, digits = name.rpartition("@")
    if at and digits.isdecimal() and not at_home(name).exists():
        if step is not None:
            raise UserError("the step is given twice", where=name, fix="leave --step out")
        name, step = place, int(digits)
    if name in BUILTIN and arm is None and step is None:
        return Source(weights=str(resources.files("rlcs") / BUILTIN[name]))
    path = at_home(name)
    if (part := part_of_run(path)) is not None:
        return _of_run(part[0], arm or part[1], part[2] if step is None else step)
    if (run := _run_around(path)) is not None and not (path / "config.json").is_file():
        raise ModelError("the run has no such model", where=name, fix=_what_run_has(run))
    if arm is not None or step is not None:
        fix = "name a run folder, or leave the arm and the step out"
        raise UserError("only a run has arms and steps, and this is no run", where=name, fix=fix)
    if not path.is_dir():
        _refuse_mistyped(name, path)
        return Source(weights=name)
    if not (path / "config.json").is_file():
        raise ModelError("neither a run nor a model is here", where=name, fix=_what_is_near(path))
    return Source(weights=str(path))


def origin_of(name: str) -> str:
    """The model that a name goes back to, through the runs that trained it: the first that no run made.

    Raises ModelError for runs that name each other.
    """
    seen = {name}
    while (recipe := find_source(name).recipe) is not None:
        name = recipe.model.name
        if name in seen:
            raise ModelError("the runs name each other in model.name", where=name, fix="export one of them")
        seen.add(name)
    return name


def is_run(path: Path) -> bool:
    """Whether a folder is a run."""
    return (path / RECIPE).is_file()


def part_of_run(path: Path) -> tuple[Path, str | None, int | None] | None:
    """The run, arm and step of a path in a run, or of a link to one; None outside of one."""
    if is_run(path):
        return path, None, None
    part = _part_by_name(path.absolute()) or (_part_by_name(path.resolve()) if path.exists() else None)
    if part is None:
        return None
    run, arm, step = part
    if not path.is_absolute() and run.is_relative_to(Path.cwd()):
        run = run.relative_to(Path.cwd())  # as it was typed
    return run, arm, step


def _part_by_name(stage: Path) -> tuple[Path, str, int | None] | None:
    step = None
    if stage.name == FINAL:
        stage = stage.parent
    elif stage.parent.name in (CHECKPOINTS, MODELS) and (step := step_of(stage.name)) is not None:
        stage = stage.parents[1]
    run = stage.parent
    return (run, stage.name, step) if stage.name in TRAINING_ORDER and is_run(run) else None


def _run_around(path: Path) -> Path | None:
    """The run in which a path lies, or would lie; the current folder does not count, as ids have none."""
    return next((folder for folder in path.parents if folder != Path() and is_run(folder)), None)


def _of_run(run: Path, wanted: str | None, step: int | None) -> Source:
    recipe = load_recipe(str(run / RECIPE)).recipe
    arm = ARMS[wanted or recipe.study.main].name
    if seeds := _seeds(run):
        what = f"the run has a model for each of {len(seeds)} seeds"
        raise RunFolderError(what, where=str(run), fix=_what_run_has(run))
    if ARMS[arm].parent is None:
        if step is not None:
            fix = "leave the step out, or name an arm that is trained"
            raise UserError(f"the arm {arm} is not trained and has no steps", where=str(run), fix=fix)
        base = find_source(recipe.model.name)
        weights, revision = base.weights, recipe.model.revision
        return Source(
            weights=weights, revision=revision, run=run, recipe=recipe, arm=arm, checkpoint=base.checkpoint
        )
    stage = run / arm
    final = stage / FINAL
    finished = read_json(stage / DONE).get("step") if _is_finished(stage) else None
    if _is_finished(stage) and step in (None, finished):
        return Source(weights=str(final), run=run, recipe=recipe, arm=arm, step=finished)
    if step is None:
        raise RunFolderError(f"no finished model of the arm {arm}", where=str(final), fix=_what_run_has(run))
    checkpoint, model = complete(stage / CHECKPOINTS).get(step), stage / MODELS / folder_of(step)
    if checkpoint is None and not (model / "config.json").is_file():
        what = f"no checkpoint of step {step:,} of {arm} is kept"
        raise RunFolderError(what, where=str(stage), fix=_what_run_has(run))
    return Source(weights=str(model), run=run, recipe=recipe, arm=arm, step=step, checkpoint=checkpoint)


def _is_finished(stage: Path) -> bool:
    return is_done(stage) and (stage / FINAL / "config.json").is_file()


def _seeds(run: Path) -> list[str]:
    """The folders of a run with several seeds, each of which is a run."""
    return sorted(path.name for path in run.glob("seed-*") if is_run(path))


def _what_run_has(run: Path) -> str:
    """The models that can be named of a run."""
    if seeds := _seeds(run):
        return f"name one of them, say {run / seeds[0]}; there are {', '.join(seeds[:_SHOWN])}"
    names = []
    for arm in TRAINING_ORDER:
        stage = run / arm
        steps = {*complete(stage / CHECKPOINTS), *complete(stage / MODELS)}
        if _is_finished(stage):
            names.append(str(stage))
            steps.discard(read_json(stage / DONE).get("step"))
        names += [f"{stage}@{step}" for step in sorted(steps)]
    if not names:
        return "no stage has finished or saved a checkpoint: let the run go on (the same command)"
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"name one of: {', '.join(names[-_SHOWN:])}{more}"


def _what_is_near(path: Path) -> str:
    """What to name in place of a folder that is neither a run nor a model."""
    if (path / "adapter_config.json").is_file():
        return f"these are adapters alone; the whole model is in {path.parent}"
    near = [str(each) for each in sorted(path.iterdir()) if is_run(each) or (each / "config.json").is_file()]
    if near:
        return f"name one of: {', '.join(near[:_SHOWN])}"
    return "name a run folder (with recipe.yaml) or a model folder (with config.json)"


def _refuse_mistyped(name: str, path: Path) -> None:
    """Raise ModelError for a path to nothing, unless it may be a hub id: OWNER/NAME."""
    may_be_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    names = [each.name for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []
    names += BUILTIN if path.parent == Path() else ()
    close = difflib.get_close_matches(path.name, names, n=1)
    beside_runs = bool(close) and "/" in name and is_run(path.parent / close[0])
    if may_be_id and not beside_runs:
        return
    fix = f"did you mean {path.parent / close[0]}? " if close else ""
    fix += "name a run folder, a folder in Hugging Face format, a hub id (OWNER/NAME), or `builtin`"
    raise ModelError("there is no such folder", where=name, fix=fix)
