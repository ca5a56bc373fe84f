"""Tries RL from several checkpoints of SFT: the trial that gets highest goes on as the arm's training.

Candidates are what each rule by validation takes, and the last step. All get `round_steps` steps of the arm's
own RL (its settings, problems, seeds and engine), are measured on the validation problems, and the better
half stays (successive halving, Jamieson & Talwalkar 2016, arXiv 1502.07943). One that the paired interval of
the difference does not tell from the best, and that clearly rises faster, goes before it. The winner goes on
from where it is, so that the losers' steps are the whole cost; the schedule of all trials ends where the
winner's training does.

    RUN/trial-000126/       the trial from step 126 of SFT; the winner's becomes RUN/sft_grpo
    RUN/sft/candidates.json what was tried, what each rule would have taken, and why this one was
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlcs.distributed import World
from rlcs.evals.intervals import interval_of_mean
from rlcs.evals.scores import mean
from rlcs.model.checkpoints import folder_of
from rlcs.model.source import CHECKPOINTS, FINAL, MODELS
from rlcs.recipe.arms import RlArm
from rlcs.recipe.handover import Handover, Rule, losers_steps, rounds_of
from rlcs.recipe.schema import Recipe
from rlcs.records import to_row
from rlcs.storage import DONE, mark_done, read_json, read_jsonl, write_json
from rlcs.train.handover import Rows, choices
from rlcs.train.validation import FILE, shares

ARM: RlArm = "sft_grpo"
"""The arm that the winner becomes."""
CANDIDATES = "candidates.json"

Interval = tuple[float, float, float]
"""A value with the ends of its 95% interval."""
Try = Callable[[int, int, int], None]
"""Trains RL from a step of SFT until its own step `until`, of so many steps in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A trial after a round: its accuracy, what the best one has over it, and its gain with a step of RL.

    `faster` is that gain less the best one's. All have 95% intervals, paired problem by problem.
    """

    step: int
    accuracy: float
    behind: Interval
    slope: Interval
    faster: Interval

    @property
    def catches_up(self) -> bool:
        """Whether it is not clearly behind the best one, and clearly rises faster."""
        return self.behind[1] <= 0 < self.faster[1]


def standings(trials: Mapping[int, Rows], until: int) -> list[Standing]:
    """The trials after `until` steps of RL from the best on: `trials` are measurements by step of SFT.

    By their accuracy, but those that catch up with the best one stand before it, the steepest of them first;
    of equals the earlier step of SFT.
    """
    best = max(trials, key=lambda step: (trials[step][until]["accuracy"], -step))
    found = []
    for step, rows in trials.items():
        behind = [a - b for a, b in zip(shares(trials[best][until]), shares(rows[until]), strict=True)]
        gains, of_best = _gains(rows, until), _gains(trials[best], until)
        standing = Standing(
            step=step,
            accuracy=rows[until]["accuracy"],
            behind=_interval(behind),
            slope=_interval(gains, until),
            faster=_interval([a - b for a, b in zip(gains, of_best, strict=True)], until),
        )
        found.append(standing)
    return sorted(
        found, key=lambda s: (not s.catches_up, -s.slope[0] if s.catches_up else -s.accuracy, s.step)
    )


def _gains(rows: Rows, until: int) -> list[float]:
    """What each problem's share has gained since the trial began."""
    return [after - before for before, after in zip(shares(rows[0]), shares(rows[until]), strict=True)]


def _interval(moves: Sequence[float], steps: int = 1) -> Interval:
    """The mean of paired differences, and its interval, a step."""
    low, high = interval_of_mean(moves)
    return mean(moves) / steps, low / steps, high / steps


def trial_folder(run: Path, step: int) -> Path:
    """The folder of the trial from a step of SFT."""
    return run / f"trial-{step:06d}"


def trials_of(run: Path) -> list[Path]:
    """The folders of the trials of a run, or of its seeds, that did not become the arm."""
    return sorted((*run.glob("trial-*"), *run.glob("seed-*/trial-*")))


def probe(run: Path, handover: Handover, *, steps: int, train: Try, world: World) -> None:
    """Choose the model that SFT hands over to an arm of `steps` steps of RL; all ranks call it together.

    What an earlier attempt did is not done again. Afterwards `sft/final` is the chosen model, and `sft_grpo`
    the beginning of its training where anything was tried.
    """
    path = run / "sft" / CANDIDATES
    if not world.first(lambda: path.exists() and "chosen" in read_json(path)):
        taken = world.first(lambda: choices(rows_of(run / "sft")))
        alive = sorted(set(taken.values()))
        total = steps - losers_steps(len(alive), handover.round_steps)
        facts: dict[str, Any] = {"choices": taken, "candidates": alive, "steps": total, "rounds": []}
        for number, count in enumerate(rounds_of(len(alive)), start=1):
            until = number * handover.round_steps
            trials = {step: _tried(run, step, until, total, train, world) for step in alive}
            order = standings(trials, until)
            alive = [each.step for each in order[: (count + 1) // 2]]
            facts["rounds"].append({"steps": until, "standings": [to_row(each) for each in order]})
            world.first(lambda: write_json(path, facts))
            world.first(partial(_remove_losers, run, [each.step for each in order], alive))
        facts |= {
            "chosen": alive[0],
            "why": _why(facts["rounds"], taken),
            "cost": _cost(run, facts, steps, world),
        }
        world.first(lambda: write_json(path, facts))
    world.first(lambda: _hand_over(run, read_json(path)["chosen"]))


def steps_of(arm: RlArm, recipe: Recipe, run: Path) -> int:
    """The steps of an arm of RL; trials that were lost have taken some of them."""
    tried = arm == ARM and recipe.sft.handover.rule == "probe"
    return int(read_json(run / "sft" / CANDIDATES)["steps"]) if tried else recipe.grpo.steps


def rows_of(stage: Path) -> dict[int, Mapping[str, Any]]:
    """The measurements of a stage so far, by step."""
    path = stage / FILE
    return {row["step"]: row for row in read_jsonl(path)} if path.exists() else {}


def _tried(run: Path, step: int, until: int, total: int, train: Try, world: World) -> Rows:
    """The measurements of a trial that has taken `until` steps."""
    folder = trial_folder(run, step)
    if until not in world.first(lambda: rows_of(folder)):
        train(step, until, total)
    return world.first(lambda: rows_of(folder))


def _remove_losers(run: Path, tried: Sequence[int], alive: Sequence[int]) -> None:
    """Remove what is large of trials that do not go on: states of training, and the model they began with."""
    for step in set(tried) - set(alive):
        for folder in (trial_folder(run, step) / CHECKPOINTS, run / "sft" / MODELS / folder_of(step)):
            shutil.rmtree(folder, ignore_errors=True)


def _hand_over(run: Path, step: int) -> None:
    """Give the winner's trial the name of the arm, and make its beginning the model that SFT ended with."""
    stage, trial = run / "sft", trial_folder(run, step)
    if trial.exists():
        trial.replace(run / ARM)
    done, final = read_json(stage / DONE), stage / FINAL
    model = stage / MODELS / folder_of(step)
    if done["step"] != step:
        if model.exists():  # else it is in its place, and only the marker is of before
            if final.exists():
                last = stage / MODELS / folder_of(done["step"])
                shutil.rmtree(last, ignore_errors=True)
                final.replace(last)
            model.replace(final)
        facts = {name: value for name, value in done.items() if name != "files"}
        mark_done(stage, reads=[FINAL], **{**facts, "step": step})


def _why(rounds: Sequence[Mapping[str, Any]], taken: Mapping[Rule, int]) -> str:
    """Why the winner of the last round was chosen, in a sentence."""
    if not rounds:
        return f"every rule takes step {taken['last']:,}: there was nothing to try"
    first, second, *_ = rounds[-1]["standings"]
    count = rounds[-1]["steps"]
    text = f"after {count:,} step{'' if count == 1 else 's'} of RL the model from step {first['step']:,} has "
    text += f"{first['accuracy']:.1%} right, that from step {second['step']:,} {second['accuracy']:.1%}"
    if first["accuracy"] < second["accuracy"]:
        slopes = (f"{100 * each['slope'][0]:+.2f}" for each in (first, second))
        return (
            f"{text}, which is no clear lead, and it rises faster: {' against '.join(slopes)} points a step"
        )
    low, high = (100 * end for end in second["behind"][1:])
    verdict = "excludes" if low > 0 else "includes"
    return f"{text}; the 95% interval of the difference, {low:+.1f} to {high:+.1f} points, {verdict} zero"


def _cost(run: Path, facts: Mapping[str, Any], steps: int, world: World) -> dict[str, Any]:
    """What the choice cost: the losers' steps of RL, and the answers that were sampled to measure."""

    def count() -> dict[str, Any]:
        lost = steps - facts["steps"]
        found: dict[str, Any] = {"steps": lost, "share": lost / steps}
        tried = [trial_folder(run, step) for step in facts["candidates"]]
        for name, folders in (("sft", [run / "sft"]), ("trials", tried)):
            rows = [row for folder in folders for row in rows_of(folder).values()]
            found[f"{name}_answers"] = sum(row["n"] * row["samples"] for row in rows)
            found[f"{name}_seconds"] = round(sum(row["seconds"] for row in rows), 1)
        return found

    return world.first(count)
