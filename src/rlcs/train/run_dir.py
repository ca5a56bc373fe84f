"""The folder of one training stage: metrics, checkpoints, resuming, and the marker of its end."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlcs.data.stream import ProblemStream
from rlcs.distributed import World
from rlcs.errors import CheckpointError
from rlcs.model.loading import save
from rlcs.progress import Screen
from rlcs.recipe.execution import Trackers as TrackerSettings
from rlcs.recipe.sampling import Rollouts
from rlcs.recipe.stages import Stage
from rlcs.records import NO_SIGNAL, Group, StepReport
from rlcs.signals import StopFlag
from rlcs.storage import write_json
from rlcs.train import checkpoint
from rlcs.train.health import SIGNS
from rlcs.train.metrics import MetricsLog
from rlcs.train.rollout_log import RolloutLog, measure
from rlcs.train.trackers import Trackers
from rlcs.train.trainer import StepResult, Trainer

log = logging.getLogger("rlcs")

DONE = "done.json"
"""The marker of a finished stage; a stage that has one is not run again."""


def is_done(folder: Path) -> bool:
    """Whether the stage in this folder has finished."""
    return (folder / DONE).is_file()


def mark_done(folder: Path, **facts: object) -> None:
    """Write the marker of a finished stage, with facts about it (seconds, counts)."""
    write_json(folder / DONE, facts)


class RunDir:
    """The folder of one training stage (a `StageRun`), from which a stopped stage resumes.

    `spent_s` is the stage's wall time over all attempts, as far as checkpoints know;
    `zero_variance_steps` counts the last steps in a row without a reward difference.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        seed: int,
        settings: Stage,
        recipe_hash: str,
        trackers: TrackerSettings = TrackerSettings(),  # noqa: B008 - frozen
        gap_alarm: float = Rollouts().alarm,
    ) -> None:
        """Create the folder; checkpoints of another `recipe_hash` are refused.

        Warns where the mean difference of the sampler's and the policy's logprobs is above `gap_alarm`.
        """
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.name = name
        self.seed = seed
        self.final = path / "final"
        self.zero_variance_steps = 0
        self._settings = settings
        self._recipe_hash = recipe_hash
        self._gap_alarm = gap_alarm
        self._metrics = MetricsLog(path / "metrics.jsonl")
        self._trackers = Trackers(trackers, path, stage=name)
        self._rollouts = RolloutLog(path / "rollouts")
        self._started = time.monotonic()
        self._spent_before = 0.0
        self._world: World
        self._trainer: Trainer
        self._stream: ProblemStream[Any]
        self._steps: int

    @property
    def spent_s(self) -> float:
        """Wall seconds of this stage so far."""
        return self._spent_before + time.monotonic() - self._started

    def resume(self, trainer: Trainer, stream: ProblemStream[Any], *, steps: int) -> int:
        """Restore the newest valid checkpoint of a stage of `steps`, if there is one; the steps done."""
        self._trainer, self._stream, self._steps = trainer, stream, steps
        self._world = trainer.vlm.world
        self._first(self._trackers.skip_what_was_sent)
        state = checkpoint.load_latest(self.path / "checkpoints", self._world)
        if state is None:
            self._first(lambda: self._metrics.resume_from(0))
            return 0
        if state.recipe_hash != self._recipe_hash:
            raise CheckpointError(
                "the checkpoint was written under another recipe",
                where=str(self.path / "checkpoints"),
                fix="remove the folder to train this stage anew",
            )
        checkpoint.restore(state, trainer.vlm.model, trainer.optimizer)
        trainer.done, trainer.bad_steps = state.schedule["done"], state.schedule["bad_steps"]
        stream.restore(state.cursor)
        self._spent_before = state.extra["spent_s"]
        self.zero_variance_steps = state.extra["zero_variance_steps"]
        self._first(lambda: self._metrics.resume_from(state.step))
        return state.step

    def _first(self, work: Callable[[], None]) -> None:
        """Do `work` on rank 0 alone; other ranks do not wait for it."""
        if self._world.rank == 0:
            work()

    def keep_rollouts(self, step: int, groups: Sequence[Group]) -> dict[str, float]:
        """Write the rollouts of a step and their problems; returns the averages over them."""
        self._first(lambda: self._rollouts.write(step, groups))
        return measure(groups)

    def after_step(
        self,
        result: StepResult | None,
        *,
        step: int,
        values: Mapping[str, float],
        seconds: Mapping[str, float],
        screen: Screen,
        stop: StopFlag,
    ) -> None:
        """Log step `step` (from 1), save a checkpoint when due, and end here after a stop signal to any rank.

        No result means that the step had no gradient. Raises Stopped.
        """
        report = step_report(self.name, result, step=step, steps=self._steps, values=values, seconds=seconds)
        self._warn_of_gap(report.values, screen)
        self._first(lambda: self._log(report))
        screen.step(report)
        stopping = self._world.agree(stop)
        if stopping or (step % self._settings.save_every == 0 and step < self._steps):
            self.save(step)
        if stopping:
            self._world.check(stop, f"{self.name} after step {step} of {self._steps}")

    def _warn_of_gap(self, values: Mapping[str, float], screen: Screen) -> None:
        """Warn where the sampler's logprobs differ much from the policy's, say with outdated weights."""
        sign = next(sign for sign in SIGNS if sign.key == "sampler_gap")
        if (gap := values.get(sign.key, 0.0)) > self._gap_alarm:
            text = f"{sign.name}: {sign.message(gap, self._gap_alarm)}"
            log.warning(text)
            screen.say(f"warning: {text}")

    def _log(self, report: StepReport) -> None:
        self._metrics.append(report)
        self._trackers.append(report)

    def save(self, step: int) -> None:
        """Save a checkpoint after step `step` (from 1)."""
        trainer = self._trainer
        state = checkpoint.capture(
            trainer.vlm.model,
            trainer.optimizer,
            step=step,
            cursor=self._stream.state(),
            schedule={"done": trainer.done, "bad_steps": trainer.bad_steps},
            extra={"spent_s": self.spent_s, "zero_variance_steps": self.zero_variance_steps},
            recipe_hash=self._recipe_hash,
        )
        keep = self._settings.keep_checkpoints
        checkpoint.save(self.path / "checkpoints", state, keep=keep, world=self._world)

    def finish(self) -> None:
        """Write the trained model in Hugging Face format, then the marker."""
        self._trackers.close()
        save(self._trainer.vlm, self.final)
        facts = {"seconds": round(self.spent_s, 1), "optimizer_steps": self._trainer.done}
        self._world.first(lambda: mark_done(self.path, **facts))


def step_report(
    stage: str,
    result: StepResult | None,
    *,
    step: int,
    steps: int,
    values: Mapping[str, float],
    seconds: Mapping[str, float],
) -> StepReport:
    """The report of one step of a stage, without values that are not finite; no result: no gradient."""
    merged = dict(values)
    skipped = NO_SIGNAL
    if result is not None:
        merged = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr}
        merged |= {**result.values, **values, "tokens": float(result.tokens)}
        merged["tokens_per_s"] = result.tokens / max(1e-9, sum(seconds.values()))
        skipped = result.skipped
    finite = {name: value for name, value in merged.items() if math.isfinite(value)}
    return StepReport(stage=stage, step=step, steps=steps, values=finite, seconds=seconds, skipped=skipped)
