"""The study with several seeds, each in its own folder, and the mean over them."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rlcs import report
from rlcs.data.run_data import RunData
from rlcs.distributed import ALONE, World
from rlcs.evals.scores import with_interval
from rlcs.pipeline.run_folder import claim, command
from rlcs.pipeline.study import Study
from rlcs.progress import Output
from rlcs.recipe.schema import Recipe
from rlcs.signals import StopFlag
from rlcs.storage import write_json
from rlcs.storage.locks import hold


def run_seeds(
    recipe: Recipe,
    folder: Path,
    count: int,
    *,
    data: RunData,
    output: Output,
    stop: StopFlag,
    world: World = ALONE,
) -> dict[str, Any]:
    """Run the study with `count` seeds; returns the summary, with means over several seeds.

    Seeds share the held-out problems, so the interval of a mean is the Wilson interval of that
    mean over the problems once, not over problems times seeds.
    """
    if count == 1:
        return Study(recipe, folder, data=data, output=output, stop=stop, world=world).run()

    def begin() -> None:
        claim(folder, recipe)
        write_json(folder / "seeds.json", {"count": count})  # from which `rlcs doctor` shows how to resume

    def conclude(summary: Mapping[str, Any]) -> None:
        write_json(folder / "summary.json", summary)
        report.build(folder)

    with ExitStack() as stack:
        world.first(lambda: stack.enter_context(hold(folder)))
        world.first(begin)
        summaries = {}
        for seed in range(recipe.seed, recipe.seed + count):
            own = recipe.model_copy(update={"seed": seed})
            study = Study(own, folder / f"seed-{seed}", data=data, output=output, stop=stop, world=world)
            summaries[seed] = study.run()
        summary = averaged(summaries)
        world.first(lambda: conclude(summary))
    return summary


def averaged(summaries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over seeds of every arm's accuracy, and the values of each seed."""
    arms = {}
    first = next(iter(summaries.values()))
    for arm in first["arms"]:
        scores = [summary["arms"][arm] for summary in summaries.values()]
        accuracy, n = sum(score["accuracy"] for score in scores) / len(scores), scores[0]["n"]
        arms[arm] = {**with_interval(accuracy, n), "n": n, "unscored": sum(s["unscored"] for s in scores)}
    return {
        "name": first["name"],
        "arms": arms,
        "seconds": {s: sum(x["seconds"][s] for x in summaries.values()) for s in first["seconds"]},
        "seeds": list(summaries),
        "per_seed": {str(seed): summary["arms"] for seed, summary in summaries.items()},
        "recipe": first["recipe"],
        "versions": first["versions"],
        "command": command(),
    }
