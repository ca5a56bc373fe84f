"""Makes the demonstrations of a run, once for its folder."""

import time
from collections.abc import Sequence
from pathlib import Path

from rlcs.data.rows import Row
from rlcs.distill.run import run as distill
from rlcs.errors import RlcsError
from rlcs.progress import Output
from rlcs.recipe.schema import Recipe
from rlcs.signals import StopFlag
from rlcs.storage import is_done, mark_done, read_json, verify_done


def make_demonstrations(
    rows: Sequence[Row], recipe: Recipe, folder: Path, *, output: Output, stop: StopFlag
) -> None:
    """Make the demonstrations of a study unless the folder has them. Raises RlcsError if some are missing."""
    started = time.monotonic()
    if is_done(folder):
        verify_done(folder, {})
        return
    with output.screen("cold start", sum(row.response is None for row in rows)) as view:
        kept = distill(
            rows, recipe.teacher, folder=folder, seed=recipe.seed, images=recipe.images, view=view, stop=stop
        )
    # Without a marker the same command samples the missing answers.
    if failed := read_json(folder / "stats.json")["failed"]:
        raise RlcsError(
            f"the teacher left {failed:,} samples unanswered",
            where=str(folder),
            fix="the same command asks them again; to do without them, start in a new run folder with "
            f"data.cold_start={folder / 'kept.jsonl'}",
        )
    seconds = round(time.monotonic() - started, 1)
    mark_done(folder, reads=["kept.jsonl", "stats.json"], seconds=seconds, kept=len(kept))
