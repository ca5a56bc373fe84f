"""The progress of each stage of a run, for the live page and for `rlcs doctor`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlcs.progress import median_rate
from rlcs.recipe.arms import ARMS, TRAINING_ORDER, stages_behind
from rlcs.report.findings import phases, recipe_values
from rlcs.report.load_run import Run, number, read_object, read_text
from rlcs.storage import DONE, is_done


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Progress of a stage: `done` of `total` steps or problems (0: unknown), seconds left (None: unknown)."""

    key: str
    name: str
    state: Literal["done", "begun", "waiting"]
    done: int = 0
    total: int = 0
    left_s: float | None = None

    @property
    def share(self) -> float:
        """The share that is done, from 0 to 1."""
        return 1.0 if self.state == "done" else min(1.0, self.done / self.total) if self.total else 0.0

    @property
    def place(self) -> str:
        """How far it is: `40 of 80`, or its state where the total is unknown."""
        return f"{self.done:,} of {self.total:,}" if self.total else self.state


def progress(run: Run) -> list[Progress]:
    """The progress of each stage of this run, in order: those that began, and those that its recipe needs.

    The base is measured first, and every other arm as soon as it is trained.
    """
    named = recipe_values(run.recipe).get("study.arms")
    arms = {str(arm) for arm in named} if isinstance(named, list) else set()
    needed = {stage for arm in arms if arm in ARMS for stage in stages_behind(arm)}
    found = []
    for key in ("base", "cold_start", *TRAINING_ORDER):
        if key in needed or key in run.curves:
            found.append(_stage(run, key))
        if key in arms or key in run.answers:
            found.append(_measurement(run, key))
    return found


def ending(run: Run) -> str:
    """The error that ended the newest attempt; empty while it runs or when it is done."""
    lines = read_text(newest_log(run.folder) or Path()).splitlines()
    last = [line.partition("ended by ")[2] for line in lines if " ended by " in line]
    return last[-1] if last else ""


def newest_log(folder: Path) -> Path | None:
    """The log of the last attempt."""
    logs = {int(p.stem[8:]): p for p in folder.glob("logs/attempt-*.log") if p.stem[8:].isdigit()}
    return logs[max(logs)] if logs else None


def _measurement(run: Run, arm: str) -> Progress:
    answered = len(run.answers.get(arm, ()))
    done = is_done(run.folder / "eval" / arm)
    return Progress(
        key=f"eval_{arm}",
        name=f"Measuring: {ARMS[arm].label}",
        state="done" if done else "begun" if answered else "waiting",
        done=answered,
        total=len(run.problems),
    )


def _stage(run: Run, key: str) -> Progress:
    rows = run.curves.get(key, ())
    finished = is_done(run.folder / key)
    last = int((number(rows[-1], "step") if rows else 0) or 0)
    total = int((number(rows[-1], "steps") if rows else 0) or 0)
    by_phase = ([seconds for _, seconds in points] for points in phases(rows).values())
    seconds = [sum(step) for step in zip(*by_phase, strict=False)]
    rate = median_rate(seconds)
    begun = bool(rows) or (key == "cold_start" and (run.folder / key).is_dir())
    return Progress(
        key=key,
        name=ARMS[key].stage if key in ARMS else "Cold start",
        state="done" if finished else "begun" if begun else "waiting",
        done=last or int(number(read_object(run.folder / key / DONE), "kept") or 0),
        total=total,
        left_s=(total - last) / rate if rate and total and not finished else None,
    )
