"""What a training loop needs around it: a clock, and a place that keeps its rollouts, metrics and state."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rlcs.data.stream import ProblemStream
from rlcs.progress import Screen
from rlcs.records import Group
from rlcs.signals import StopFlag
from rlcs.train.trainer import StepResult, Trainer


class Clock:
    """Adds up wall seconds by phase: `with clock("update"): ...`."""

    def __init__(self) -> None:
        """All phases start at zero."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the body."""
        started = time.perf_counter()
        try:
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
        """Begin a stage of `steps`, from the newest checkpoint if there is one; the steps already done."""
        ...

    def keep_rollouts(self, step: int, groups: Sequence[Group]) -> dict[str, float]:
        """Write down the rollouts of a step; their averages."""
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
        """Log a step, save a checkpoint when due, and stop here if asked to. Raises Stopped."""
        ...

    def finish(self) -> None:
        """Write the trained model, then the marker of a finished stage."""
        ...
