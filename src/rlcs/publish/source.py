"""Finds the model to publish: the weights of one arm, and the run that trained them if there is one."""

from dataclasses import dataclass
from pathlib import Path

from rlcs.data.sources import suggest
from rlcs.errors import ModelError, RunFolderError, UserError
from rlcs.model import loading
from rlcs.recipe.arms import ARMS, TRAINING_ORDER
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.schema import Recipe
from rlcs.train.run_dir import is_done


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Weights (a folder or hub id), with their run, its recipe and the arm where they are known."""

    weights: str
    revision: str | None = None
    run: Path | None = None
    recipe: Recipe | None = None
    arm: str | None = None


def find_source(name: str, arm: str | None) -> Source:
    """Find the model `name`: a run folder (its main model or `arm`'s), a stage's `final`, or any model.

    Raises UserError, RunFolderError or ModelError where there is nothing to export.
    """
    if arm is not None and arm not in ARMS:
        raise UserError(f"no arm is called {arm!r}", where="--arm", fix=suggest(arm, ARMS))
    path = Path(name).expanduser()
    if (path / "recipe.yaml").is_file():
        return _of_run(path, arm)
    if (
        path.name == "final"
        and (path.parent.parent / "recipe.yaml").is_file()
        and path.parent.name in TRAINING_ORDER
    ):
        return _of_run(path.parent.parent, arm or path.parent.name)
    if arm is not None:
        raise UserError("only a run has arms, and this is a model", where=name, fix="leave --arm out")
    if path.is_dir() and not (path / "config.json").is_file():
        fix = "name a run folder (with recipe.yaml) or a model folder (with config.json)"
        raise ModelError("neither a run nor a model is here", where=name, fix=fix)
    return Source(weights=loading.resolve(str(path) if path.is_dir() else name))


def _of_run(run: Path, arm: str | None) -> Source:
    recipe = load_recipe(str(run / "recipe.yaml")).recipe
    arm = arm or recipe.study.main
    if seeds := sorted(path.name for path in run.glob("seed-*")):
        fix = f"name one of them, say {run / seeds[0]}"
        raise RunFolderError(f"the run has a model for each of {len(seeds)} seeds", where=str(run), fix=fix)
    if ARMS[arm].parent is None:
        model = recipe.model
        return Source(
            weights=loading.resolve(model.name), revision=model.revision, run=run, recipe=recipe, arm=arm
        )
    final = run / arm / "final"
    if not is_done(run / arm) or not (final / "config.json").is_file():
        finished = [a for a in TRAINING_ORDER if (run / a / "final" / "config.json").is_file()]
        fix = f"finish the run, or choose --arm among: {', '.join(['base', *finished])}"
        raise RunFolderError(f"no finished model of the arm {arm}", where=str(final), fix=fix)
    return Source(weights=str(final), run=run, recipe=recipe, arm=arm)
