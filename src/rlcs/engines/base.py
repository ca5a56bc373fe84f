"""Protocol of rollout engines."""

from collections.abc import Callable, Sequence
from typing import Protocol

from rlcs.records import Prompt, Rollout, Sampling

Progress = Callable[[int], None] | None
"""Called with the number of rollouts that have finished since the last call."""


class Engine(Protocol):
    """Samples rollouts from the current policy."""

    def sync(self) -> None:
        """Sample from the policy's current weights from now on."""
        ...

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int = 0, progress: Progress = None
    ) -> list[tuple[Rollout, ...]]:
        """Sample `sampling.n` rollouts of every prompt, in the order of the prompts.

        Rollout i of a prompt depends on (sampling.seed, step, problem id, repeat, i) and the policy alone.
        Under `torchrun` all ranks must call this together, each with its own prompts (or none).
        """
        ...
