"""A study's data, read and checked before anything heavy is loaded: a bad file is told in a second."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlcs.data.loading import Loaded, load, require_usable
from rlcs.data.rows import Row
from rlcs.data.sources import Role
from rlcs.errors import DataError
from rlcs.recipe.schema import Data, Recipe
from rlcs.records import Problem


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data sources of a study, read and checked; `notes` say what was left out of them.

    What no arm of the study needs is not read, and empty.
    """

    cold_start: tuple[Row, ...]
    rl: tuple[Problem, ...]
    test: tuple[Problem, ...]
    notes: tuple[str, ...] = ()


def load_run_data(recipe: Recipe) -> RunData:
    """Read and check the data sources that the arms need. Raises DataError before anything is trained."""
    study, data = recipe.study, recipe.data
    loaded: dict[Role, Loaded] = {}
    if study.cold_starts:
        loaded["cold_start"] = load_source("cold_start", data.cold_start, recipe)
    chosen: tuple[Problem, ...] = ()
    if study.main != "sft":
        loaded["rl"] = load_source("rl", data.rl, recipe)
        chosen = by_pass_rate([row.problem for row in loaded["rl"].rows], data)
    loaded["test"] = load_source("test", data.test, recipe)
    return RunData(
        cold_start=loaded["cold_start"].rows if study.cold_starts else (),
        rl=chosen,
        test=tuple(row.problem for row in loaded["test"].rows),
        notes=tuple(f"left out of {role}: {bad}" for role, each in loaded.items() for bad in each.bad),
    )


def by_pass_rate(problems: Sequence[Problem], settings: Data) -> tuple[Problem, ...]:
    """The problems whose pass rate lies within `data.rl_pass_rate`. Raises DataError if none has or does."""
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


def load_source(role: Role, source: str, recipe: Recipe) -> Loaded:
    """One data source; too many unusable rows raise DataError."""
    settings: Data = recipe.data
    loaded = load(source, settings, decode_limit=recipe.images.decode_limit, role=role)
    require_usable(loaded, settings)
    return loaded
