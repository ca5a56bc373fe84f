"""What every rollout engine offers."""

from collections.abc import Callable, Sequence
from typing import Protocol

from rlcs.records import Prompt, Rollout, Sampling

Progress = Callable[[int], None]
"""Told how many rollouts have finished since it was last told."""


class Engine(Protocol):
    """Samples from the current policy."""

    def sync(self) -> None:
        """Take over the policy's weights as they are now."""
        ...

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        step: int = 0,
        progress: Progress | None = None,
    ) -> list[tuple[Rollout, ...]]:
        """`sampling.n` rollouts of every prompt, in the order of the prompts.

        Rollout i of a prompt depends on (sampling.seed, step, problem id, i) and the policy alone.
        """
        ...
