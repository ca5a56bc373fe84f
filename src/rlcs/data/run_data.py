"""Reads and checks all data of a study, before any model is loaded, so that errors are reported at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlcs.data.loading import Loaded, load, require_usable
from rlcs.data.rows import Row
from rlcs.data.sources import Role
from rlcs.errors import DataError
from rlcs.recipe.schema import Data, Study
from rlcs.records import Problem


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a study; `notes` name the rows that were left out, and say which answers were unwrapped.

    A source that no arm of the study needs is not read: its data is empty.
    """

    cold_start: tuple[Row, ...]
    rl: tuple[Problem, ...]
    test: tuple[Problem, ...]
    notes: tuple[str, ...] = ()


def load_run_data(study: Study, settings: Data, *, decode_limit: int) -> RunData:
    """Read and check the data sources that the arms need; `decode_limit` is in pixels an image.

    Raises DataError before anything is trained.
    """
    sources: dict[Role, str] = {"test": settings.test}
    if study.main != "sft":
        sources = {"rl": settings.rl, **sources}
    if study.cold_starts:
        sources = {"cold_start": settings.cold_start, **sources}
    loaded: dict[Role, Loaded] = {}
    for role, source in sources.items():
        loaded[role] = load(source, settings, decode_limit=decode_limit, role=role)
        require_usable(loaded[role], settings)
    notes = [f"{role}: {note}" for role, each in loaded.items() for note in each.notes]
    notes += [f"left out of {role}: {bad}" for role, each in loaded.items() for bad in each.bad]
    problems = {role: [row.problem for row in each.rows] for role, each in loaded.items()}
    return RunData(
        cold_start=loaded["cold_start"].rows if "cold_start" in loaded else (),
        rl=by_pass_rate(problems["rl"], settings) if "rl" in problems else (),
        test=tuple(problems["test"]),
        notes=tuple(notes),
    )


def by_pass_rate(problems: Sequence[Problem], settings: Data) -> tuple[Problem, ...]:
    """Select the problems with a pass rate within `data.rl_pass_rate`. Raises DataError if there are none."""
    if settings.rl_pass_rate is None:
        return tuple(problems)
    low, high = settings.rl_pass_rate
    rates = [(problem, problem.metadata.get("pass_rate")) for problem in problems]
    chosen = tuple(p for p, rate in rates if isinstance(rate, int | float) and low <= rate <= high)
    if not chosen:
        known = sum(isinstance(rate, int | float) for _, rate in rates)
        raise DataError(
            f"no problem has a pass_rate from {low:g} to {high:g} ({known:,} of {len(rates):,} have one)",
            where=settings.rl,
            fix="name the problems.jsonl of `rlcs distill`, or widen data.rl_pass_rate",
        )
    return chosen
