"""The blind control of a run: what its arms answer without the image, and RL problems that need none.

`eval/ARM/blind/` has the answers to the test problems' blind twins, `rl_blind/` the base's to RL problems'.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlcs.data.blind import blind_twins
from rlcs.data.run_data import RunData
from rlcs.errors import DataError
from rlcs.evals.blind import GUESSED, split_gains
from rlcs.evals.scores import mean
from rlcs.recipe.arms import gain_pairs
from rlcs.recipe.schema import Recipe
from rlcs.records import Problem
from rlcs.storage import read_jsonl

RL_BLIND = "rl_blind"
_RATE = "blind_rate"


def blind_tasks(arm: str, recipe: Recipe, data: RunData, folder: Path) -> dict[Path, Sequence[Problem]]:
    """What an arm's model answers blind, by the folder of its answers."""
    tasks: dict[Path, Sequence[Problem]] = {}
    how = recipe.eval.blind
    if how != "none":
        tasks[folder / "eval" / arm / "blind"] = blind_twins(data.test, how)
    if arm == "base" and recipe.data.rl_blind == "drop":
        twins = blind_twins(data.rl, "other")
        tasks[folder / RL_BLIND] = [twin for twin in twins if _rate(twin) is None]
    return {place: problems for place, problems in tasks.items() if problems}


def answered_blind(data: RunData, folder: Path) -> tuple[list[str], str]:
    """The ids of RL problems that the base answers right blind, and a sentence about them.

    Raises DataError where these are all.
    """
    path = folder / RL_BLIND / "predictions.jsonl"
    measured = {row["id"]: row["correct"] is True for row in read_jsonl(path)} if path.exists() else {}
    blind = [p.id for p in data.rl if measured.get(p.id) or (_rate(p) or 0.0) >= GUESSED]
    total = len(data.rl)
    if len(blind) == total:
        raise DataError(
            f"the base answers all {total:,} RL problems right without their images",
            where="data.rl_blind=drop",
            fix="name problems that need their image, or set data.rl_blind=keep",
        )
    chance = sum(1 / len(p.choices) for p in data.rl if p.choices)
    by_chance = f"; about {chance:,.0f} would be guessed by chance (multiple choice)" if chance else ""
    text = f"{len(blind):,} of {total:,} RL problems are left out: the base answers them right without "
    return blind, f"{text}their image{by_chance}"


def _rate(problem: Problem) -> float | None:
    rate = problem.metadata.get(_RATE)
    return float(rate) if isinstance(rate, int | float) else None


def blind_summary(arms: Iterable[str], problems: Sequence[Problem], folder: Path) -> dict[str, Any] | None:
    """The split of the arms' gains by whether a problem needs its image; None without a blind measurement."""
    arms = [arm for arm in arms if (folder / "eval" / arm / "blind" / "scores.json").exists()]
    if not arms:
        return None
    return split_gains(
        {arm: _shares(folder / "eval" / arm) for arm in arms},
        {arm: _shares(folder / "eval" / arm / "blind") for arm in arms},
        pairs=gain_pairs(arms),
        chance=mean([1 / len(p.choices) if p.choices else 0.0 for p in problems if p.images]),
    )


def _shares(folder: Path) -> Mapping[str, float]:
    return {row["id"]: float(row["correct"] is True) for row in read_jsonl(folder / "predictions.jsonl")}
