"""Reads and checks all data of a study, before any model is loaded, so that errors are reported at once."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlcs.data.check import grouped
from rlcs.data.loading import Loaded, load_indexed, require_usable
from rlcs.data.overlap import KINDS, SHARED, Kind, Overlap, OverlapFinder
from rlcs.data.rows import Row
from rlcs.data.sources import Role
from rlcs.data.stored import chosen, digests_of, pass_rates, problems_of, remembered, without
from rlcs.errors import DataError
from rlcs.recipe.schema import Data, Study, Validation
from rlcs.records import Problem, from_row, to_row

_MAX_PIXELS = 2_000_000_000
"""Pixels that are decoded to compare one training source with the test problems: about 20 s on two cores."""
_SHOWN = 3
_ID = 40
"""Characters of an id that are shown."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a study; `notes` name the rows that were left out, and say which answers were unwrapped.

    A source that no arm of the study needs is not read: its data is empty. `validation` holds the problems
    that are measured while a stage trains; none of them is in `rl`. `checks` are the facts that the run
    folder's `data_checks.json` holds.
    """

    cold_start: Sequence[Row]
    rl: Sequence[Problem]
    test: Sequence[Problem]
    validation: Sequence[Problem] = ()
    notes: tuple[str, ...] = ()
    checks: Mapping[str, Any] = field(default_factory=dict)

    def without(self, left_out: Mapping[str, Collection[str]]) -> "RunData":
        """The same data without the training rows of these ids."""
        return replace(
            self,
            cold_start=without(self.cold_start, left_out.get("cold_start", ())),
            rl=without(self.rl, left_out.get("rl", ())),
        )


def sources_of(study: Study, settings: Data, validation: Validation) -> dict[str, tuple[str, Role]]:
    """The data sources that a study needs and their roles, by the name of their data in `RunData`."""
    sources: dict[str, tuple[str, Role]] = {"test": (settings.test, "test")}
    if study.main != "sft" or validation.held_out:
        sources = {"rl": (settings.rl, "rl"), **sources}
    if study.cold_starts:
        sources = {"cold_start": (settings.cold_start, "cold_start"), **sources}
    if validation.on and validation.source is not None:
        sources["validation"] = (validation.source, "test")
    return sources


def key_of(name: str) -> str:
    """The recipe key of a data source."""
    return "validation.source" if name == "validation" else f"data.{name}"


def load_run_data(
    study: Study,
    settings: Data,
    *,
    decode_limit: int,
    validation: Validation = Validation(),  # noqa: B008 - frozen
    store: Path | None = None,
    watch: Callable[[str, int], None] = lambda *_: None,
) -> RunData:
    """Read and check the data sources that the arms need; `decode_limit` is in pixels an image.

    Images that are embedded in rows are held in memory, or written into the folder `store`. The rows of large
    sources lie on disk, as `load_indexed` says. `watch` gets the name of a source and the number of its rows
    so far, now and then.

    Raises DataError before anything is trained.
    """
    loaded: dict[str, Loaded] = {}
    for name, (source, role) in sources_of(study, settings, validation).items():
        loaded[name] = load_indexed(
            source, settings, decode_limit=decode_limit, role=role, store=store, watch=partial(watch, name)
        )
        require_usable(loaded[name], settings)
    notes = [f"{name}: {note}" for name, each in loaded.items() for note in each.notes]
    notes += [f"left out of {name}: {line}" for name, each in loaded.items() for line in grouped(each.bad)]
    problems = {name: problems_of(each.rows) for name, each in loaded.items()}
    rl = by_pass_rate(problems["rl"], settings) if "rl" in problems else ()
    rl, held_out = hold_out(rl, validation.held_out, settings.rl)
    if "validation" in problems:
        held_out = problems["validation"][: validation.problems]
    data = RunData(
        cold_start=loaded["cold_start"].rows if "cold_start" in loaded else (),
        rl=rl if study.main != "sft" else (),
        test=problems["test"],
        validation=held_out,
        notes=tuple(notes),
        checks={"sources": {name: _facts(each) for name, each in loaded.items()}},
    )
    return compare_with_test(data, settings)


def _facts(loaded: Loaded) -> dict[str, Any]:
    faults = grouped(loaded.bad)
    return {
        "source": loaded.source,
        "usable": len(loaded.rows),
        "left_out": len(loaded.bad),
        "faults": faults,
    }


def compare_with_test(data: RunData, settings: Data) -> RunData:
    """Find the training rows that are also in the test data, and do with them as `data.overlap` says.

    Raises DataError with `refuse`, and with `drop` if nothing is left.
    """
    training = {"cold_start": problems_of(data.cold_start), "rl": data.rl}
    found, uncompared = _overlaps(training, data.test, settings)
    facts = [fact for role, overlaps in found.items() for fact in overlap_facts(role, overlaps)]
    notes = [_overlap_line(fact, len(training[fact["role"]]), settings.overlap) for fact in facts]
    shared = {role: {o.a for o in overlaps if o.kind in SHARED} for role, overlaps in found.items()}
    if uncompared:
        notes.append(
            f"{uncompared:,} images were compared with those of test by their files, not by their "
            "pixels, to save time; `rlcs data overlap` compares all"
        )
    if settings.overlap == "refuse" and any(shared.values()):
        raise DataError(
            "\n    ".join(["training and test data overlap", *notes]),
            where="data.overlap=refuse",
            fix="data.overlap=drop leaves these rows out of the training; `rlcs data overlap` names them all",
        )
    checks = {"setting": settings.overlap, "found": facts, "images_not_compared": uncompared}
    data = replace(data, notes=(*data.notes, *notes), checks={**data.checks, "overlap": checks})
    if settings.overlap != "drop":
        return data
    for role, ids in shared.items():
        if len(ids) == len(training[role]):
            raise DataError(
                f"all {len(ids):,} rows are also in data.test, so that data.overlap=drop leaves none",
                where=f"data.{role}",
                fix="name another source for training or for test",
            )
    return data.without(shared)


def _overlaps(
    training: Mapping[str, Sequence[Problem]], test: Sequence[Problem], settings: Data
) -> tuple[dict[str, list[Overlap]], int]:
    """The overlaps of each training source with the test, and how many images were not compared by pixels."""
    every = settings.overlap != "warn"
    about = [digests_of(test), every, _MAX_PIXELS]
    finder: list[OverlapFinder] = []

    def find(problems: Sequence[Problem]) -> dict[str, Any]:
        if not finder:  # to make one takes long for a large test
            finder.append(OverlapFinder(test, all_problems=every, max_pixels=_MAX_PIXELS))
        overlaps = finder[0].find(problems)
        return {"overlaps": list(map(to_row, overlaps)), "uncompared": finder[0].uncompared}

    found: dict[str, list[Overlap]] = {}
    uncompared = 0
    for role, problems in training.items():
        if problems:
            fact = remembered(problems, "overlap", about, partial(find, problems))
            found[role] = [from_row(Overlap, row) for row in fact["overlaps"]]
            uncompared = max(uncompared, fact["uncompared"])
    return found, uncompared


def overlap_facts(role: str, overlaps: Sequence[Overlap]) -> list[dict[str, Any]]:
    """Count the overlaps of one training source with the test data by their kind, with the first ids."""
    facts = []
    for kind in KINDS:
        same = [each for each in overlaps if each.kind == kind]
        first = [[each.a, each.b] for each in same[:_SHOWN]]
        facts += [{"role": role, "kind": kind, "rows": len(same), "first": first}] if same else []
    return facts


_SAYS: dict[Kind, str] = {
    "same problem": "are also in {test}, with the same question and the same images",
    "same question": "are also in {test}, with the same question (without images)",
    "same image": "have an image of {test}, with another question",
    "near image": "have an image that looks like one of {test}",
}
_DONE = {
    "warn": "the test then measures what was trained on. data.overlap=drop leaves them out of the training, "
    "data.overlap=refuse stops a run",
    "drop": "they are left out of the training (data.overlap=drop)",
    "refuse": "the run does not start (data.overlap=refuse)",
}


def overlap_sentence(fact: Mapping[str, Any], total: int, test: str) -> str:
    """One sentence about the overlaps of one kind: how many, and the first of them."""
    pairs = "; ".join(f"{a[:_ID]} is {b[:_ID]} there" for a, b in fact["first"])
    says = _SAYS[fact["kind"]].format(test=test)
    return f"{fact['rows']:,} of {total:,} rows of {fact['role']} {says} (first: {pairs})"


def _overlap_line(fact: Mapping[str, Any], total: int, setting: str) -> str:
    """The sentence, and what is done about it."""
    sentence = overlap_sentence(fact, total, "test")
    return f"{sentence}: {_DONE[setting]}" if fact["kind"] in SHARED else f"note: {sentence}"


def hold_out(
    problems: Sequence[Problem], count: int, source: str
) -> tuple[Sequence[Problem], Sequence[Problem]]:
    """Split the last `count` problems off. Raises DataError where that is more than half of them."""
    if count > len(problems) / 2:
        few = max(1, len(problems) // 5)
        raise DataError(
            f"validation would take {count:,} of {len(problems):,} problems of data.rl",
            where=source,
            fix=f"set validation.problems={few} or so, or name other problems in validation.source",
        )
    left = len(problems) - count
    return problems[:left], problems[left:]


def by_pass_rate(problems: Sequence[Problem], settings: Data) -> Sequence[Problem]:
    """Select the problems with a pass rate within `data.rl_pass_rate`. Raises DataError if there are none."""
    if settings.rl_pass_rate is None:
        return problems
    low, high = settings.rl_pass_rate
    rates = list(pass_rates(problems))
    selected = [position for position, rate in enumerate(rates) if low <= rate <= high]
    if not selected:
        known = sum(not math.isnan(rate) for rate in rates)
        raise DataError(
            f"no problem has a pass_rate from {low:g} to {high:g} ({known:,} of {len(rates):,} have one)",
            where=settings.rl,
            fix="name the problems.jsonl of `rlcs distill`, or widen data.rl_pass_rate",
        )
    return chosen(problems, selected)
