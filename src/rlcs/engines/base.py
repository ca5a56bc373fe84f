"""Protocol of rollout engines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rlcs.engines.arrivals import Arrivals
from rlcs.records import Prompt, Rollout, Sampling

OnGroup = Callable[[tuple[Rollout, ...]], None] | None
"""Called with all rollouts of a prompt as soon as they have finished; prompts finish in any order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What an engine read and computed for one prompt: the prompt's ids as it has them, and its answer.

    `candidates` are, in place of each token of the answer, that token and the most likely ones, each id with
    its logprob at the sampling temperature.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    candidates: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineView:
    """What one instance of an engine (a server, or the engine of a rank) saw of some prompts, in their order.

    `precision` is the number format in which it computes: `float32`, `bfloat16`, `float16`, or `fp8`.
    """

    name: str
    precision: str
    prompts: tuple[Seen, ...]


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

    def inspect(self, prompts: Sequence[Prompt], sampling: Sampling, *, candidates: int) -> list[EngineView]:
        """Let every instance answer every prompt once, and say what it saw, with so many candidates a token.

        It answers as it does in `sample`. Under `torchrun` all ranks must call this together, with the same
        prompts, and all get the views of all instances. An instance that is down is left out.
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
