"""The seconds from the start of a run to the first answer of its engine, which comes before any training."""

from collections.abc import Iterable

from rlcs.plan.data_size import Rows
from rlcs.plan.placement import Placement
from rlcs.plan.rates import Speeds
from rlcs.plan.step_time import GUESSED, Phases, StepTime

IMPORTS_S = 40.0
"""Seconds of imports on all ranks at once, of joining, and of the checks that need no model: a guess."""
ROWS = 2000.0
"""Rows a second that are read and checked, image sizes included: a guess."""
FILE = 2
"""Bytes of a published weight."""
FIRST_ANSWER_S = 5.0
"""Seconds of the first answer, with kernels that are chosen in it: a guess."""


def start_time(place: Placement, data: Iterable[Rows], speeds: Speeds) -> StepTime:
    """From the start of `rlcs run` to the first answer; nothing needs to be downloaded."""
    phases, total = Phases(place, speeds), place.sizes.total
    rows = sum(each.count or 0 for each in data)
    phases.add(
        "libraries and ranks", IMPORTS_S, GUESSED, "imports, joining, checks without a model", busy=0.0
    )
    phases.add(
        "data are read",
        rows / ROWS,
        GUESSED,
        f"{rows:,} known rows / {ROWS:,.0f} a second, no download",
        busy=0.0,
    )
    phases.add(
        "weights are loaded",
        FILE * total / speeds["disk_read"],
        ["disk_read"],
        f"{FILE * total / 1e9:.1f} GB / {speeds['disk_read'] / 1e9:.3g} GB/s, on one rank, no download",
        busy=0.0,
    )
    moved = total * place.weight
    phases.add(
        "weights are spread",
        moved / speeds["to_host"],
        ["to_host"],
        f"{moved / 1e9:.1f} GB / {speeds['to_host'] / 1e9:.3g} GB/s to the GPUs",
        busy=0.0,
    )
    if place.rollout.engine != "local":
        written = total * place.compute
        phases.add(
            "weights for vLLM are written",
            written / speeds["disk_write"],
            ["disk_write"],
            f"{written / 1e9:.1f} GB / {speeds['disk_write'] / 1e9:.3g} GB/s",
            busy=0.0,
        )
        if not place.rollout.urls:
            phases.add(
                "vLLM starts",
                speeds["start_s"],
                ["start_s"],
                "all at once: imports, weights, compiling, a profile, CUDA graphs",
                busy=0.0,
            )
    phases.add("the first answer", FIRST_ANSWER_S, GUESSED, "the problem with the largest image", busy=0.0)
    return phases.time
