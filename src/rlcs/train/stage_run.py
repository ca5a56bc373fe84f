"""The services that a training loop uses: a clock, and a run that saves its rollouts, metrics and state."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rlcs.data.stream import ProblemStream
from rlcs.errors import out_of_memory_in
from rlcs.progress import Screen
from rlcs.records import Group
from rlcs.signals import StopFlag
from rlcs.train.trainer import StepResult, Trainer


class Clock:
    """Measures wall seconds by phase: `with clock("update"): ...`. OutOfMemory names the phase."""

    def __init__(self) -> None:
        """Starts all phases at zero."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the seconds of the body to a phase."""
        started = time.perf_counter()
        try:
            with out_of_memory_in(phase):
                yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


class StageRun(Protocol):
    """One training stage of a run; `RunDir` keeps it in a folder.

    `seed` is the run's; `zero_variance_steps` counts the last steps in a row without a reward difference.
    """

    seed: int
    zero_variance_steps: int

    def resume(self, trainer: Trainer, stream: ProblemStream[Any], *, steps: int) -> int:
        """Restore the newest checkpoint of a stage of `steps`, if there is one; the steps done."""
        ...

    def validate(self, step: int, *, screen: Screen, stop: StopFlag) -> bool:
        """Measure the model after `step` steps where that is due; whether it was. Raises Stopped."""
        ...

    def keep_rollouts(self, step: int, groups: Sequence[Group]) -> dict[str, float]:
        """Write the rollouts of a step; returns their averages."""
        ...

    def save(self, step: int) -> None:
        """Save a checkpoint after step `step` (from 1)."""
        ...

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
        """Log a step, save a checkpoint when due, and end here after a stop signal. Raises Stopped."""
        ...

    def finish(self, screen: Screen) -> None:
        """Write the trained model, of the last step or the best one, then the marker of a finished stage."""
        ...
