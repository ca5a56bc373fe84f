"""Reads a run folder, complete or not, into records.

A report must be possible after a failure, so missing, torn and invalid files raise no error: what cannot
be read is left out.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from json import loads
from pathlib import Path
from typing import TypeVar

from rlcs.data.problem_store import PROBLEMS, ROLLOUTS
from rlcs.errors import RunFolderError
from rlcs.recipe.arms import ARMS, TRAINING_ORDER
from rlcs.records import GradedSample, Problem, from_row_or_none

_LOG = logging.getLogger(__name__)

T = TypeVar("T")
Row = Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The readable content of one run folder (one seed)."""

    folder: Path
    summary: Row
    recipe: str
    cold_start: Row
    curves: Mapping[str, tuple[Row, ...]]
    """Stage -> rows of metrics.jsonl in step order."""
    problems: tuple[Problem, ...]
    """The held-out problems; paths of kept images are relative to the folder `eval`."""
    answers: Mapping[str, Mapping[str, GradedSample]]
    """Arm -> problem id -> answer."""
    blind: Mapping[str, Mapping[str, GradedSample]]
    """Arm -> problem id -> answer to its blind twin."""
    scores: Mapping[str, Row]
    """Arm -> scores.json."""
    rollouts: Mapping[str, tuple[int, tuple[GradedSample, ...]]]
    """RL stage -> (last step, its rollouts)."""
    validation: Mapping[str, tuple[Row, ...]]
    """Stage -> rows of validation.jsonl."""
    done: Mapping[str, Row]
    """Stage -> done.json."""
    handover: Row
    """sft/candidates.json: the trials of RL by which SFT's model was chosen."""
    data_checks: Row


def read_runs(folder: Path) -> list[Run]:
    """The runs of `folder`: its `seed-*` folders, or the folder itself."""
    seeds = [p for p in folder.glob("seed-*") if p.is_dir()]
    seeds.sort(key=lambda p: (len(p.name), p.name))
    return [read_run(p) for p in seeds or [folder]]


def require_runs(folder: Path) -> list[Run]:
    """The runs of `folder`. Raises RunFolderError where nothing of a run can be read."""
    runs = read_runs(folder)
    if not any(run.curves or run.scores or run.recipe for run in runs):
        raise RunFolderError(
            "no run is here", where=str(folder), fix="give the folder with recipe.yaml in it"
        )
    return runs


def read_run(folder: Path) -> Run:
    """Read one run folder."""
    arms = [a for a in ARMS if (folder / "eval" / a).is_dir()]
    answers = {a: _answers(folder / "eval" / a) for a in arms}
    blind = {a: _answers(folder / "eval" / a / "blind") for a in arms}
    stages = {s: tuple(read_rows(folder / s / "metrics.jsonl")) for s in TRAINING_ORDER}
    rollouts = {s: _last_rollouts(folder / s / ROLLOUTS) for s in TRAINING_ORDER}
    scores = {a: read_object(folder / "eval" / a / "scores.json") for a in arms}
    validation = {s: tuple(read_rows(folder / s / "validation.jsonl")) for s in TRAINING_ORDER}
    return Run(
        folder=folder,
        summary=read_object(folder / "summary.json"),
        recipe=read_text(folder / "recipe.yaml"),
        cold_start=read_object(folder / "cold_start" / "stats.json"),
        curves={s: rows for s, rows in stages.items() if rows},
        problems=tuple(read_records(Problem, folder / "eval" / PROBLEMS)),
        answers={a: rows for a, rows in answers.items() if rows},
        blind={a: rows for a, rows in blind.items() if rows},
        scores={a: row for a, row in scores.items() if row},
        rollouts={s: last for s, last in rollouts.items() if last},
        validation={s: rows for s, rows in validation.items() if rows},
        done={s: read_object(folder / s / "done.json") for s in TRAINING_ORDER},
        handover=read_object(folder / "sft" / "candidates.json"),
        data_checks=read_object(folder / "data_checks.json"),
    )


def _answers(folder: Path) -> dict[str, GradedSample]:
    rows = read_records(GradedSample, folder / "predictions.jsonl")
    return {row.sample.id: row for row in rows}


def read_text(path: Path) -> str:
    """The content of a text file, or an empty text."""
    if not path.is_file():  # missing, or a pipe that would never end
        return ""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        _LOG.warning("the report leaves out %s: %s", path, error)
        return ""


def read_object(path: Path) -> Row:
    """The JSON object in a file, or an empty one."""
    content = read_text(path)
    value = _json(content)
    if content and not isinstance(value, dict):
        _LOG.warning("the report leaves out %s: not a JSON object", path)
    return value if isinstance(value, dict) else {}


def number(row: Row, name: str) -> float | None:
    """A finite number of a row, or None."""
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except OverflowError:  # integers in JSON have no limit
        return None
    return found if math.isfinite(found) else None


def part(row: Row, name: str) -> Row:
    """An object inside a row, or an empty one."""
    value = row.get(name)
    return value if isinstance(value, dict) else {}


def text(row: Row, name: str) -> str:
    """A value of a row as text; empty for null and missing ones."""
    value = row.get(name)
    return "" if value is None else str(value)


def _json(content: str) -> object:
    try:
        value: object = loads(content)
    except (ValueError, RecursionError):
        return None
    return value


def read_rows(path: Path) -> Iterator[Row]:
    """The JSON objects of a JSONL file, without other lines."""
    for line in read_text(path).split("\n"):
        value = _json(line)
        if isinstance(value, dict):
            yield value


def read_records(kind: type[T], path: Path) -> Iterator[T]:
    """The records of a JSONL file, without rows that cannot be read."""
    records = (from_row_or_none(kind, row) for row in read_rows(path))
    return (record for record in records if record is not None)


def kept_images(problem: Problem) -> list[str]:
    """The paths of those images of a problem that the run kept."""
    return [ref.path for ref in problem.images if ref.path]


def by_reward(rollouts: Sequence[GradedSample]) -> tuple[GradedSample, ...]:
    """Rollouts with the best first; one that is not scored counts as a reward of zero."""
    return tuple(sorted(rollouts, key=lambda one: -(one.grade.reward or 0.0)))


def saved_steps(folder: Path) -> dict[int, Path]:
    """The file of rollouts of each step, in step order."""
    files = {int(p.stem[5:]): p for p in folder.glob("step-*.jsonl") if p.stem[5:].isdigit()}
    return dict(sorted(files.items()))


def _last_rollouts(folder: Path) -> tuple[int, tuple[GradedSample, ...]] | None:
    for step, path in reversed(saved_steps(folder).items()):
        if rollouts := tuple(read_records(GradedSample, path)):
            return step, rollouts
    return None
