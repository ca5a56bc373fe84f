"""Reads and checks all data of a study, before any model is loaded, so that errors are reported at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlcs.data.loading import Loaded, load, require_usable
from rlcs.data.rows import Row
from rlcs.data.sources import Role
from rlcs.errors import DataError
from rlcs.recipe.schema import Data, Study, Validation
from rlcs.records import Problem


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a study; `notes` name the rows that were left out, and say which answers were unwrapped.

    A source that no arm of the study needs is not read: its data is empty. `validation` holds the problems
    that are measured while a stage trains; none of them is in `rl`.
    """

    cold_start: tuple[Row, ...]
    rl: tuple[Problem, ...]
    test: tuple[Problem, ...]
    validation: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def load_run_data(
    study: Study,
    settings: Data,
    *,
    decode_limit: int,
    validation: Validation = Validation(),  # noqa: B008 - frozen
) -> RunData:
    """Read and check the data sources that the arms need; `decode_limit` is in pixels an image.

    Raises DataError before anything is trained.
    """
    sources: dict[Role, str] = {"test": settings.test}
    if study.main != "sft" or validation.held_out:
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
    rl = by_pass_rate(problems["rl"], settings) if "rl" in problems else ()
    rl, held_out = hold_out(rl, validation.held_out, settings.rl)
    if validation.on and validation.source is not None:
        measured = load(validation.source, settings, decode_limit=decode_limit, role="test")
        require_usable(measured, settings)
        notes += [f"left out of validation: {bad}" for bad in measured.bad]
        held_out = tuple(row.problem for row in measured.rows[: validation.problems])
    return RunData(
        cold_start=loaded["cold_start"].rows if "cold_start" in loaded else (),
        rl=rl if study.main != "sft" else (),
        test=tuple(problems["test"]),
        validation=held_out,
        notes=tuple(notes),
    )


def hold_out(
    problems: tuple[Problem, ...], count: int, source: str
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """Split the last `count` problems off. Raises DataError where that is more than half of them."""
    if count > len(problems) / 2:
        raise DataError(
            f"validation would take {count:,} of {len(problems):,} problems of data.rl",
            where=source,
            fix="lower validation.problems, or name other problems in validation.source",
        )
    left = len(problems) - count
    return problems[:left], problems[left:]


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
