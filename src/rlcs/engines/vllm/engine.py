"""Rollouts by vLLM, in servers or in this process; either way the same prompts, seeds and records."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from rlcs.engines.base import Progress
from rlcs.engines.vllm.fleet import Body, Take
from rlcs.engines.vllm.protocol import request_body, rollouts_of
from rlcs.engines.vllm.weights import Weights, WeightsFolder
from rlcs.model.chat import Chat
from rlcs.model.loading import give_back_memory
from rlcs.model.vlm import Vlm
from rlcs.records import Prompt, Rollout, Sampling


class Backend(Protocol):
    """Answers requests by given weights."""

    def ask(self, bodies: Sequence[Body], weights: Weights, take: Take) -> None:
        """Give every reply to `take`, in any order."""
        ...


class VllmEngine:
    """Samples from the weights that `vlm` had at the last `sync`."""

    def __init__(
        self, backend: Backend, published: WeightsFolder, vlm: Vlm, chat: Chat, *, decode_limit: int
    ) -> None:
        """`published` is shared by all engines of a backend; `decode_limit` is in pixels."""
        self._backend, self._published = backend, published
        self._vlm, self._chat, self._decode_limit = vlm, chat, decode_limit
        self._weights: Weights | None = None

    def sync(self) -> None:
        """Publish the model's weights; a server loads them before it next answers."""
        self._weights = self._published.publish(self._vlm)

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        step: int = 0,
        progress: Progress | None = None,
    ) -> list[tuple[Rollout, ...]]:
        """See `Engine.sample`. Raises TrainingError if no server answers for long, EndpointError.

        Under `torchrun` every rank calls this with its own prompts, and rank 0 asks for all.
        """
        if self._weights is None or self._weights != self._published.newest:
            self.sync()
        # vLLM starts, starts again or wakes up on rank 0 below, maybe on GPUs that train, each of which
        # has a rank with a cache of its own: nobody passes the gathering before all have done this.
        give_back_memory()
        world = self._vlm.world
        by_rank = world.gather(list(prompts))
        everything = [prompt for some in by_rank for prompt in some]
        groups = world.first(lambda: self._ask(everything, sampling, step=step, progress=progress))
        start = sum(len(some) for some in by_rank[: world.rank])
        return groups[start : start + len(prompts)]

    def _ask(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int, progress: Progress | None
    ) -> list[tuple[Rollout, ...]]:
        assert self._weights is not None, "sync has published them"
        groups: dict[int, tuple[Rollout, ...]] = {}

        def take(place: int, reply: dict[str, Any]) -> bool:
            group = rollouts_of(reply, prompts[place], sampling, step=step, text=self._chat.text)
            if group is None:
                return False
            groups[place] = group
            if progress is not None:
                progress(len(group))
            return True

        bodies = [
            partial(request_body, prompt, sampling, step=step, limit=self._decode_limit) for prompt in prompts
        ]
        if bodies:
            self._backend.ask(bodies, self._weights, take)
        return [groups[place] for place in range(len(prompts))]
