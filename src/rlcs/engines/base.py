"""Protocol of rollout engines."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from rlcs.engines.arrivals import Arrivals
from rlcs.records import Prompt, Rollout, Sampling

OnGroup = Callable[[tuple[Rollout, ...]], None] | None
"""Called with all rollouts of a prompt as soon as they have finished; prompts finish in any order."""


class Engine(Protocol):
    """Samples rollouts from the current policy."""

    def sync(self) -> None:
        """Sample from the policy's current weights from now on."""
        ...

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int = 0, on_group: OnGroup = None
    ) -> list[tuple[Rollout, ...]]:
        """Sample `sampling.n` rollouts of every prompt, in the order of the prompts.

        Rollout i of a prompt depends on (sampling.seed, step, problem id, repeat, i) and the policy alone.
        Under `torchrun` all ranks must call this together, each with its own prompts (or none).
        """
        ...

    def rest(self) -> None:
        """Free what sampling holds of GPUs that also train, until the next `sample`; all ranks call it."""
        ...


@runtime_checkable
class BackgroundEngine(Engine, Protocol):
    """An engine that samples elsewhere, so that this process can do other work meanwhile."""

    def start(self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int = 0) -> Arrivals:
        """Begin to `sample` the prompts, by the weights of the last `sync`; their rollouts arrive later.

        Under `torchrun` all ranks must call this together, each with all prompts. Until all have arrived
        nothing else may be sampled or synced.
        """
        ...
