"""`rlcs distill`: the cold start's data alone, into a folder that a study may take up later."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlcs.data.loading import load, require_usable
from rlcs.data.sources import Role
from rlcs.distill.run import run
from rlcs.progress import screen
from rlcs.recipe.schema import Recipe
from rlcs.signals import StopFlag
from rlcs.storage import read_json


def distil(
    recipe: Recipe, folder: Path, *, afresh: bool, quiet: bool, json: bool, stop: StopFlag
) -> dict[str, Any]:
    """Ask about `data.cold_start`; returns the statistics. `afresh`: responses in the data are not used."""
    role: Role = "rl" if afresh else "cold_start"
    loaded = load(recipe.data.cold_start, recipe.data, decode_limit=recipe.images.decode_limit, role=role)
    require_usable(loaded, recipe.data)
    rows = [replace(row, response=None) for row in loaded.rows] if afresh else loaded.rows
    asked = sum(row.response is None for row in rows)
    with screen("cold start", asked, quiet=quiet, json=json) as view:
        for bad in loaded.bad:
            view.say(f"left out: {bad}")
        run(rows, recipe.teacher, folder=folder, seed=recipe.seed, view=view, stop=stop)
    stats: dict[str, Any] = read_json(folder / "stats.json")
    return stats
