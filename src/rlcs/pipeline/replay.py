"""Repeats the steps before a collapse with one change each, and says which change prevents it.

Every replay is the real RL stage in a temporary folder: from the checkpoint before the collapse (or the
stage's beginning), with the same problems and seeds, sampled anew, to a few steps after the collapse. So
the replay without a change must collapse too; where it does not, the others prove nothing. A change that
holds the sign within its limit but lets another one cross its own does not help either.
"""

import io
import json as jsonlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlcs.data.problem_store import ROLLOUTS
from rlcs.data.run_data import RunData
from rlcs.distributed import ALONE, World
from rlcs.errors import RlcsError, UserError
from rlcs.model.checkpoints import folder_of
from rlcs.pipeline.probe import steps_of, trials_of
from rlcs.pipeline.study import Study
from rlcs.progress import Output, Screen, screen
from rlcs.recipe.arms import RL_ARMS, RlArm
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.schema import Recipe
from rlcs.records import from_row, to_row
from rlcs.signals import StopFlag, Stopped
from rlcs.storage import read_jsonl, write_json, write_jsonl
from rlcs.storage.locks import LOCK
from rlcs.train.collapse import (
    BATCH,
    FOLDER,
    RESULT,
    WINDOW,
    Crossing,
    examples,
    kept_crossings,
    last_mean,
    read_batch,
)
from rlcs.train.rollout_log import file_of

_OWN = ("recipe.yaml", "logs", "rollout", "report", "judge", "summary.json", LOCK)
"""What a replay has of its own; all else of the run's folder is linked."""
_QUIET = (
    "grpo.save_every=1000000000", "grpo.keep_steps=[]", "trackers.tensorboard=false",
    "trackers.trackio=null", "trackers.wandb=null",
)  # fmt: skip
_EXCERPT = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class Collapse:
    """A crossing that a run kept, and where."""

    run: Path
    arm: RlArm
    crossing: Crossing

    @property
    def folder(self) -> Path:
        """The folder with the batch."""
        return self.run / self.arm / FOLDER


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change of the recipe, as a person would write it; no words for none."""

    name: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of the sign under a change: its mean over the last steps, None where there is none.

    `other` is another sign that crossed its limit and was still beyond it at the end.
    """

    change: Change
    value: float | None = None
    accuracy: float | None = None
    held: bool = False
    other: str = ""
    seconds: float = 0.0
    error: str = ""


def find_collapse(folder: Path, step: int | None = None) -> Collapse:
    """The first collapse that a run kept (in that step), of its first seed with any. Raises UserError."""
    for run in (folder, *sorted(folder.glob("seed-*"))):
        for arm in RL_ARMS:
            for crossing in kept_crossings(run / arm / FOLDER):
                if step in (None, crossing.step):
                    return Collapse(run=run, arm=arm, crossing=crossing)
    of_trials = ((trial, each) for trial in trials_of(folder) for each in kept_crossings(trial / FOLDER))
    if (found := next(of_trials, None)) is not None:
        trial, crossing = found
        raise UserError(
            f"only a trial that lost, from step {int(trial.name[6:]):,} of SFT, collapsed (in step "
            f"{crossing.step:,}: {crossing.message}): what it began with is removed, so that nothing can be "
            "replayed",
            where=str(trial),
            fix=f"its answers are in {trial / FOLDER / folder_of(crossing.step) / BATCH}, and its metrics "
            "beside; the arm that goes on did not collapse",
        )
    where = "this run" if step is None else f"step {step:,} of this run"
    raise UserError(
        f"no sign of collapse crossed its limit in {where}, so that there is nothing to replay",
        where=str(folder),
        fix="rlcs doctor RUN says how it is; a sign counts when its mean over "
        f"{WINDOW} steps crosses its limit and was within it before",
    )


def changes(recipe: Recipe, crossing: Crossing) -> Iterator[Change]:
    """The changes that apply to a recipe, each alone: those that are cheap and mild first."""
    grpo = recipe.grpo
    lr = grpo.optimizer.lr
    yield Change(name="learning rate halved", words=(f"grpo.optimizer.lr={lr / 2:g}",))
    yield Change(name="learning rate a tenth", words=(f"grpo.optimizer.lr={lr / 10:g}",))
    if grpo.kl.active:
        yield Change(
            name="five times the KL penalty", words=(f"grpo.kl.coefficient={5 * grpo.kl.coefficient:g}",)
        )
    else:
        yield Change(name="KL penalty on", words=("grpo.kl.kind=k3", "grpo.kl.coefficient=0.01"))
    if grpo.optimizer_steps > 1 or recipe.overlap == "one_step_off":
        if grpo.loss != "sapo":
            words = (f"grpo.clip_low={grpo.clip_low / 2:g}", f"grpo.clip_high={grpo.clip_high / 2:g}")
            yield Change(name="half the clip range", words=words)
        if grpo.old_logprobs == "sampler":
            yield Change(name="old logprobs by the policy", words=("grpo.old_logprobs=policy",))
        if grpo.mismatch_mask is None:
            yield Change(name="bad answers far from the policy left out", words=("grpo.mismatch_mask=0.1",))
    if recipe.rollout.engine != "local" and recipe.rollout.cap is None:
        yield Change(name="importance weights", words=("rollout.importance_cap=2",))
    yield from _rewards_left_out(recipe)
    if crossing.key == "entropy":
        yield Change(name="entropy control", words=("grpo.entropy.control=clip_cov",))
    if crossing.key in ("truncated", "no_format_share", "repeated_share"):
        yield Change(name="cut answers not learnt from", words=("grpo.overlong.drop_truncated=true",))
    other = 1.0 if grpo.temperature != 1.0 else 1.2 if crossing.key == "entropy" else 0.8
    yield Change(name=f"temperature {other:g}", words=(f"grpo.temperature={other:g}",))


def _rewards_left_out(recipe: Recipe) -> Iterator[Change]:
    """Each part of the reward off, but for the first, which decides what is right."""
    reward = recipe.grpo.reward
    deciding = next(iter(reward.weights))
    for part in ("format", "length"):
        if getattr(reward, part) and part != deciding:
            yield Change(name=f"reward without {part}", words=(f"grpo.reward.{part}=0",))
    if reward.judge.weight and deciding != "judge":
        yield Change(name="reward without judge", words=("grpo.reward.judge.weight=0",))
    for function in reward.functions:
        name = function.rpartition(":")[2]
        if reward.functions[function] and name != deciding:
            rest = {each: weight for each, weight in reward.functions.items() if each != function}
            yield Change(
                name=f"reward without {name}", words=(f"grpo.reward.functions={jsonlib.dumps(rest)}",)
            )


class Replay:
    """The replays of one collapse."""

    def __init__(
        self, collapse: Collapse, data: RunData, *, output: Output, stop: StopFlag, world: World = ALONE
    ) -> None:
        """`data` is that of the run, as it was read."""
        self.collapse, self._data = collapse, data
        self._output, self._stop, self._world = output, stop, world
        self._path = str(collapse.run / "recipe.yaml")
        self._recipe = load_recipe(self._path, []).recipe
        steps = world.first(lambda: steps_of(collapse.arm, self._recipe, collapse.run))
        self.last = min(steps, collapse.crossing.step + WINDOW)

    def run(self) -> dict[str, Any]:
        """Replay without a change, then with each; the result, which is also kept beside the batch."""
        collapse, view = self.collapse, self._output.screen("replay", 0)
        view.say(
            f"{collapse.crossing.message}; replaying steps {collapse.crossing.checkpoint + 1} to {self.last}"
        )
        outcomes = []
        for change in (Change(name="no change"), *changes(self._recipe, collapse.crossing)):
            outcomes.append(self._replay(change))
            view.say(sentence(outcomes[-1], collapse.crossing))
        result = {
            "arm": collapse.arm,
            "crossing": to_row(collapse.crossing),
            "last_step": self.last,
            "repeats": not outcomes[0].held and not outcomes[0].error,
            "outcomes": [to_row(outcome) for outcome in outcomes],
            "fixes": [to_row(outcome.change) for outcome in fixes(outcomes)],
        }
        folder = collapse.folder / f"step-{collapse.crossing.step:06d}"
        self._world.first(lambda: write_json(folder / RESULT, result))
        return result

    def _replay(self, change: Change) -> Outcome:
        """Train to the last step with a change, in a folder that is removed again."""
        started, crossing = time.monotonic(), self.collapse.crossing
        try:
            recipe = load_recipe(self._path, [*_QUIET, *change.words]).recipe
            with ExitStack() as stack:  # of rank 0 alone
                path = self._world.first(lambda: self._own_folder(stack))
                rows, crossed = self._train(recipe, path)
        except Stopped:
            raise
        except RlcsError as error:
            return Outcome(change=change, error=error.what, seconds=round(time.monotonic() - started, 1))
        value = last_mean(rows, crossing.key)
        beyond = (each for each in crossed if each.is_bad(last_mean(rows, each.key) or 0.0))
        return Outcome(
            change=change,
            value=value,
            accuracy=last_mean(rows, "accuracy"),
            held=value is not None and not crossing.is_bad(value),
            other=next((each.name for each in beyond if each.key != crossing.key), ""),
            seconds=round(time.monotonic() - started, 1),
        )

    def _own_folder(self, stack: ExitStack) -> Path:
        return Path(stack.enter_context(TemporaryDirectory(dir=self.collapse.run, prefix=".replay-")))

    def _train(self, recipe: Recipe, folder: Path) -> tuple[list[dict[str, Any]], list[Crossing]]:
        """The metrics of a replay, and the signs that crossed their limits."""
        # Measurements take time and change nothing; their problems are left out of the data already.
        validation = recipe.validation.model_copy(update={"grpo_every": 0})
        recipe = recipe.model_copy(update={"validation": validation})
        study = Study(recipe, folder, data=self._data, output=_Silent(), stop=self._stop, world=self._world)
        study.claim()
        self._world.first(lambda: self._link(folder))
        log, stage = logging.getLogger("rlcs"), folder / self.collapse.arm
        level = log.level
        log.setLevel(logging.ERROR)  # that it collapses again is no news
        try:
            study.repeat(self.collapse.arm, self._recipe, until=self.last)
        finally:
            log.setLevel(level)
        return self._world.first(
            lambda: (read_jsonl(stage / "metrics.jsonl"), kept_crossings(stage / FOLDER))
        )

    def _link(self, folder: Path) -> None:
        """Link what the stage began with, and the checkpoint with the metrics and rollouts up to it."""
        run, arm, step = self.collapse.run, self.collapse.arm, self.collapse.crossing.checkpoint
        for path in run.iterdir():
            if path.name not in (*_OWN, arm) and not path.name.startswith("."):
                (folder / path.name).symlink_to(path.resolve())
        if step:
            checkpoint = Path(arm) / "checkpoints" / f"step-{step:06d}"
            (folder / checkpoint).parent.mkdir(parents=True)
            (folder / checkpoint).symlink_to((run / checkpoint).resolve())
            (folder / arm / ROLLOUTS).mkdir()
            for path in (run / arm / ROLLOUTS / file_of(number) for number in range(1, step + 1)):
                if path.exists():  # the engine drafts from it
                    (folder / arm / ROLLOUTS / path.name).symlink_to(path.resolve())
            rows = read_jsonl(run / arm / "metrics.jsonl")
            write_jsonl(folder / arm / "metrics.jsonl", [row for row in rows if row["step"] <= step])


class _Silent(Output):
    """Shows no training steps."""

    def screen(self, stage: str, total: int) -> Screen:
        return screen(stage, total, quiet=True, stream=io.StringIO())


def fixes(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The changes under which all signs stayed within their limits, those with most right answers first."""
    held = [outcome for outcome in outcomes[1:] if outcome.held and not outcome.other]
    return sorted(held, key=lambda outcome: -(outcome.accuracy or 0.0))


def sentence(outcome: Outcome, crossing: Crossing) -> str:
    """What one replay showed."""
    took = f"{outcome.seconds:.0f} s"
    if outcome.error:
        return f"{outcome.change.name}: failed ({outcome.error}); {took}"
    value = "not measured" if outcome.value is None else crossing.form.format(outcome.value)
    return f"{outcome.change.name}: {crossing.name.lower()} {value}; {took}"


def lines(result: Mapping[str, Any], collapse: Collapse) -> list[str]:
    """The table of the replays, what to do, and answers of the step in which the sign crossed its limit."""
    crossing = collapse.crossing
    outcomes = [from_row(Outcome, row) for row in result["outcomes"]]
    width = max(len(outcome.change.name) for outcome in outcomes)
    limit = f"limit {crossing.form.format(crossing.limit)}"
    shown = [f"{collapse.arm} in step {crossing.step:,}: {crossing.message}", ""]
    shown.append(
        f"{'change':<{width}}  {crossing.name} ({limit}) and right answers after step {result['last_step']:,}"
    )
    for outcome in outcomes:
        value = "-" if outcome.value is None else crossing.form.format(outcome.value)
        right = "" if outcome.accuracy is None else f"{outcome.accuracy:.1%} right"
        but = f", but beyond its limit: {outcome.other.lower()}" if outcome.other else ""
        verdict = outcome.error or (f"prevents it{but}" if outcome.held else "does not")
        verdict = verdict if outcome.change.words else ""
        shown.append(f"{outcome.change.name:<{width}}  {value:<18} {right:<12} {verdict}".rstrip())
    shown.append("")
    best = [from_row(Change, row) for row in result["fixes"]]
    if not result["repeats"]:
        shown.append(
            "Without a change it did not come again (does sampling differ?): the others prove nothing."
        )
    elif best:
        shown += [f"{change.name} prevents it: {' '.join(change.words)}" for change in best]
    else:
        shown.append("None of these changes prevents it alone: combine them, or read the answers below.")
    shown += ["", f"Answers of step {crossing.step:,} in which it shows most:"]
    for rollout, reward in examples(read_batch(collapse.folder, crossing), crossing.key):
        text = " ".join(rollout.text.split())
        cut = text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}..."
        shown.append(f"  {rollout.problem_id} (reward {'none' if reward is None else f'{reward:g}'}): {cut}")
    return shown
