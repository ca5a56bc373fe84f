"""The folder of one training stage: metrics, checkpoints, resuming, and the marker of its end."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlcs.data.problem_store import ROLLOUTS
from rlcs.data.stream import Resumable
from rlcs.distributed import World
from rlcs.errors import CheckpointError
from rlcs.model.checkpoints import complete
from rlcs.model.loading import save
from rlcs.progress import Screen
from rlcs.recipe.execution import Trackers as TrackerSettings
from rlcs.recipe.sampling import Rollouts
from rlcs.recipe.stages import Grpo, Stage
from rlcs.records import NO_SIGNAL, Group, StepReport
from rlcs.signals import StopFlag, Stopped
from rlcs.storage import mark_done, read_jsonl
from rlcs.train.checkpoint import Checkpoints
from rlcs.train.clock import Clock
from rlcs.train.collapse import FOLDER, CollapseWatch
from rlcs.train.handover import kept_steps, ranking
from rlcs.train.health import SIGNS
from rlcs.train.metrics import MetricsLog
from rlcs.train.rollout_log import RolloutLog, measure
from rlcs.train.state import TrainState, capture, restore, restore_weights
from rlcs.train.trackers import Trackers
from rlcs.train.trainer import StepResult, Trainer
from rlcs.train.validation import FILE, SENT, Validation, sentence

log = logging.getLogger("rlcs")


class RunDir:
    """The folder of one training stage, from which a stopped stage resumes.

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
        self.carried: dict[str, Any] = {}
        """What else the stage carries from step to step, JSON-able: checkpoints hold it."""
        self.validation: Validation | None = None
        """Set it before training to measure while the stage trains."""
        self.until: int | None = None
        """Set it before RL to leave the stage after that step."""
        self.saves = True
        """Whether a stage that is left saves a checkpoint to go on from."""
        self._settings = settings
        self._recipe_hash = recipe_hash
        self._gap_alarm = gap_alarm
        self._metrics = MetricsLog(path / "metrics.jsonl")
        self._trackers = Trackers(trackers, path, stage=name)
        self._rollouts = RolloutLog(path / ROLLOUTS)
        self._started = time.monotonic()
        self._spent_before = 0.0
        self._clock = Clock()
        self._checkpoints: Checkpoints
        self._world: World
        self._trainer: Trainer
        self._stream: Resumable
        self._steps: int
        self._saved = 0
        self._groups: Sequence[Group] = ()
        self._watch: CollapseWatch

    @property
    def spent_s(self) -> float:
        """Wall seconds of this stage so far."""
        return self._spent_before + time.monotonic() - self._started

    def resume(self, trainer: Trainer, stream: Resumable, *, steps: int) -> int:
        """Restore the newest valid checkpoint of a stage of `steps`, if there is one; the steps done."""
        self._trainer, self._stream, self._steps = trainer, stream, steps
        self._world = trainer.vlm.world
        if late := [step for step in self._settings.keep_steps if step > steps]:
            log.warning("%s ends at step %d, before keep_steps=%s", self.name, steps, late)
        self._first(self._trackers.skip_what_was_sent)
        self._checkpoints = Checkpoints(self.path / "checkpoints", self._world)
        state = self._checkpoints.load_latest()
        self._read_validation(0 if state is None else state.step)
        if state is None:
            self._first(lambda: self._metrics.resume_from(0))
            self._begin_watch()
            return 0
        if state.recipe_hash != self._recipe_hash:
            raise CheckpointError(
                "the checkpoint was written under another recipe",
                where=str(self._checkpoints.folder),
                fix="remove the folder to train this stage anew",
            )
        restore(state, trainer.vlm.model, trainer.optimizer)
        trainer.done, trainer.bad_steps = state.schedule["done"], state.schedule["bad_steps"]
        trainer.lost_steps = state.schedule.get("lost_steps", 0)
        stream.restore(state.cursor)
        self._spent_before = state.extra["spent_s"]
        self.zero_variance_steps = state.extra["zero_variance_steps"]
        self.carried = dict(state.extra["carried"])
        self._first(lambda: self._metrics.resume_from(state.step))
        self._begin_watch()
        self._saved = state.step
        return state.step

    def _begin_watch(self) -> None:
        """Watch for a collapse, from the metrics so far on."""
        path, limit = self.path / "metrics.jsonl", self._gap_alarm
        gets_harder = isinstance(self._settings, Grpo) and self._settings.order == "easy_first"
        without = ("accuracy",) if gets_harder else ()

        def begin() -> CollapseWatch:
            rows = read_jsonl(path) if path.exists() else []
            return CollapseWatch(self.path / FOLDER, rows, gap_limit=limit, without=without)

        self._watch = self._world.first(begin)

    def _read_validation(self, step: int) -> None:
        """Take up the measurements of an earlier attempt, up to the step at which this one goes on."""
        if (validation := self.validation) is not None:
            path = self.path / FILE
            validation.rows.update(self._world.first(lambda: validation.read(path, step)))

    def validate(self, step: int, *, screen: Screen, stop: StopFlag) -> bool:
        """Measure the model after `step` steps where that is due; whether it was.

        The best model so far gets a checkpoint where the stage is to keep it. Raises Stopped, with a finished
        checkpoint of this step.
        """
        validation = self.validation
        if validation is None or not validation.is_due(step, self._steps):
            return False
        try:
            row = {"step": step, **validation.measure(stop)}
            validation.add(row)
        except Stopped:
            self._save_once(step)
            raise
        values = {name: float(row[name]) for name in SENT if row.get(name) is not None}
        named = {f"validation/{name}": value for name, value in values.items()}
        if step > validation.sent:
            self._first(lambda: self._trackers.send(named, step))
        shown = {name: value for name, value in row.items() if name != "right"}
        screen.say(sentence(row, self._steps), {"validation": shown})
        if step in self._chosen() and self._saved < step < self._steps:
            self._start_save(step)
        return True

    def is_last_or_measured(self, step: int) -> bool:
        """Whether the model after `step` steps is to be measured, or the last one."""
        due = self.validation is not None and self.validation.is_due(step, self._steps)
        return due or step in (self._steps, self.until)

    def stop_in_step(self, done: int, stop: StopFlag) -> None:
        """End here after a stop signal, with a checkpoint of the `done` steps, of which the model is.

        Raises Stopped.
        """
        self._save_once(done)
        self._world.check(stop, f"{self.name} in step {done + 1} of {self._steps}")

    def conclude(self, screen: Screen, stop: StopFlag) -> None:
        """Measure the model if that is due, and write it; left early, a checkpoint if it `saves`.

        Raises TrainingError where too many steps had no finite gradient.
        """
        if self.until is None:
            self._trainer.require_finite(self._trainer.done)
            self.validate(self._steps, screen=screen, stop=stop)
            self.finish(screen)
        else:
            self._rollouts.wait()
            if self.saves:
                self._save_once(self.until)
            self.validate(self.until, screen=screen, stop=stop)
            self._trackers.close()

    def _save_once(self, step: int) -> None:
        if step > self._saved:
            self.save(step)
        self._checkpoints.wait()

    def _first(self, work: Callable[[], None]) -> None:
        """Do `work` on rank 0 alone; other ranks do not wait for it."""
        if self._world.rank == 0:
            work()

    def keep_rollouts(self, step: int, groups: Sequence[Group]) -> dict[str, float]:
        """Write the rollouts of a step and their problems; returns the averages over them."""
        self._groups = groups
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
        """Log step `step` (from 1), begin to save a checkpoint when due, and end here after a stop signal.

        A checkpoint that was written meanwhile is finished. The seconds for which training stood still since
        the last step are among those of this one: `checkpoint` for copies, `checkpoint_wait` for an earlier
        checkpoint that was not yet written. No result means that the step had no gradient. Raises Stopped,
        after a signal to any rank, with a checkpoint of this step.
        """
        seconds = {**seconds, **self._clock.seconds}
        self._clock = Clock()
        report = step_report(self.name, result, step=step, steps=self._steps, values=values, seconds=seconds)
        self._warn_of_gap(report.values, screen)
        self._first(lambda: self._log(report))
        screen.step(report)
        self._keep_collapse(report, screen)
        self._checkpoints.poll()
        due = step % self._settings.save_every == 0 or step in self._settings.keep_steps
        if self._world.agree(stop):
            self.save(step)
            self._world.check(stop, f"{self.name} after step {step} of {self._steps}")
        if due and step < self._steps:
            self._start_save(step)

    def _warn_of_gap(self, values: Mapping[str, float], screen: Screen) -> None:
        """Warn where the sampler's logprobs differ much from the policy's, say with outdated weights."""
        sign = next(sign for sign in SIGNS if sign.key == "sampler_gap")
        if (gap := values.get(sign.key, 0.0)) > self._gap_alarm:
            text = f"{sign.name}: {sign.message(gap, self._gap_alarm)}"
            log.warning(text)
            screen.say(f"warning: {text}")

    def _keep_collapse(self, report: StepReport, screen: Screen) -> None:
        """Keep the answers of a step in which a sign crossed its limit, and the checkpoint before it."""
        row = {"step": report.step, "skipped": report.skipped, **report.values}
        if not self._groups or (crossing := self._watch.add(row)) is None:
            return
        self._checkpoints.wait()
        folder, watch, groups = self._checkpoints.folder, self._watch, self._groups
        watch.kept.append(self._world.first(lambda: watch.keep(crossing, groups, complete(folder))))
        text = f"{self.name} in step {report.step:,}: {crossing.message}"
        log.warning(text)
        screen.say(f"warning: {text}; `rlcs doctor {self.path.parent} --replay` finds out what prevents it")

    def _log(self, report: StepReport) -> None:
        self._metrics.append(report)
        self._trackers.append(report)

    def save(self, step: int) -> None:
        """Save a checkpoint after step `step` (from 1), when the rollouts up to it are written."""
        self._rollouts.wait()
        self._checkpoints.save(self._state(step), **self._kept())
        self._saved = step

    def _start_save(self, step: int) -> None:
        """Begin to save a checkpoint, which a later step finishes, when the rollouts up to it are written."""
        self._rollouts.wait()
        with self._clock("checkpoint_wait"):
            self._checkpoints.wait()
        with self._clock("checkpoint"):
            self._checkpoints.start(self._state(step), **self._kept())
        self._saved = step

    def _state(self, step: int) -> TrainState:
        trainer = self._trainer
        return capture(
            trainer.vlm.model,
            trainer.optimizer,
            step=step,
            cursor=self._stream.state(),
            schedule={
                "done": trainer.done,
                "bad_steps": trainer.bad_steps,
                "lost_steps": trainer.lost_steps,
            },
            extra={
                "spent_s": self.spent_s,
                "zero_variance_steps": self.zero_variance_steps,
                "carried": self.carried,
            },
            recipe_hash=self._recipe_hash,
        )

    def _kept(self) -> dict[str, Any]:
        """How many of the newest checkpoints are kept, and which steps' always."""
        explaining = (each.checkpoint for each in self._watch.kept)
        always = {*explaining, *self._settings.keep_steps, *self._chosen()}
        return {"keep": self._settings.keep_checkpoints, "always": always}

    def _chosen(self) -> set[int]:
        """The steps that the stage may end with, or RL be tried from, by the measurements so far."""
        return kept_steps(self._settings.rule, self.validation.rows) if self.validation else set()

    def finish(self, screen: Screen) -> None:
        """Write the last model, or the one that validation chose, in Hugging Face format; then the marker."""
        self._checkpoints.wait()
        self._trackers.close()
        self._rollouts.wait()
        step = self._restore_best(screen)
        save(self._trainer.vlm, self.final)
        facts = {
            "seconds": round(self.spent_s, 1),
            "optimizer_steps": self._trainer.done,
            "step": step,
            "rule": self._settings.rule,
        }
        self._world.first(lambda: mark_done(self.path, reads=["final"], **facts))

    def _restore_best(self, screen: Screen) -> int:
        """Give the model the weights that a rule by validation takes, if any; the step that it has now.

        A step without an intact checkpoint (after damage to the disk) gives way to the next best.
        """
        rows = self.validation.rows if self.validation else {}
        for step in ranking(self._settings.rule, rows):
            if step == self._steps:
                break
            self._save_once(self._steps)
            try:
                state = self._checkpoints.load(step)
            except CheckpointError as error:
                log.warning("step %d was the best, and is passed over: %s", step, error)
                continue
            restore_weights(state, self._trainer.vlm.model)
            figures = f"{rows[step]['accuracy']:.1%} right"
            if (before := rows.get(0)) is not None:
                figures += f"; {before['accuracy']:.1%} before the first step"
            by = {"best_pass_1": "best", "best_pass_k": "best by pass@k", "most_signal": "richest in signal"}
            why = f"the {by[self._settings.rule]} in validation ({figures})"
            screen.say(f"{self.name}: the model of step {step:,} is kept, {why}")
            return step
        return self._steps


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
