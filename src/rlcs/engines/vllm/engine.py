"""Samples rollouts with vLLM's servers: the prompts of all ranks in one fleet, or of each rank in its own."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from rlcs.engines.arrivals import Arrivals, OnArrival
from rlcs.engines.base import EngineView, OnGroup
from rlcs.engines.vllm.protocol import OnAnswers, PromptRequest
from rlcs.engines.vllm.server import LostWeightsError
from rlcs.engines.vllm.transfer import Transfer, TransferError
from rlcs.engines.vllm.weights import Weights, WeightsFolder
from rlcs.errors import TrainingError
from rlcs.model.chat import Chat
from rlcs.model.loading import give_back_memory
from rlcs.model.vlm import Vlm
from rlcs.records import Prompt, Rollout, Sampling

log = logging.getLogger("rlcs")


class Backend(Protocol):
    """One or several vLLM instances."""

    def generate(self, requests: Sequence[PromptRequest], weights: Weights, on_answers: OnAnswers) -> None:
        """Answer all requests with these weights; `on_answers` is called once for each, in any order.

        Raises TrainingError if a request fails too often.
        """
        ...

    def inspect(self, requests: Sequence[PromptRequest], weights: Weights) -> list[EngineView]:
        """What every instance that is well sees of the prompts, with these weights; others are warned of."""
        ...

    def rest(self) -> None:
        """Free the memory of GPUs that also train, until the next `generate`."""
        ...

    @property
    def shares_gpu(self) -> bool:
        """Whether an instance may start or wake up on this rank's GPU, which needs its free memory."""
        ...


class VllmEngine:
    """Samples from the weights that `vlm` had at the last `sync`."""

    def __init__(
        self,
        backend: Backend,
        published: WeightsFolder,
        vlm: Vlm,
        chat: Chat,
        *,
        ranks: int | None = None,
        transfer: Transfer | None = None,
        keeps_routes: bool = False,
    ) -> None:
        """`published` is shared by all engines of a backend.

        Every `ranks` ranks share one backend, and their first asks it for all of them; None: all ranks.
        After the first weights `transfer` sends them, as long as it can. `keeps_routes`: rollouts say which
        experts computed them.
        """
        self._transfer, self._keeps_routes = transfer, keeps_routes
        self._backend, self._published = backend, published
        self._ranks = ranks or vlm.world.size
        self._vlm, self._chat = vlm, chat
        self._weights: Weights | None = None

    def sync(self) -> None:
        """Publish the model's weights; a server loads them before it next answers."""
        if self._transfer is not None and self._published.newest is not None:
            self._give_back_memory()
            sent = self._published.announce(self._vlm)
            try:
                self._transfer.send(self._vlm, sent)
            except TransferError as error:
                if self._transfer.is_required:
                    raise TrainingError(
                        f"weights could not be sent to vLLM: {error}",
                        where="rollout.weights=transfer",
                        fix="see its log, or set rollout.weights=folder",
                    ) from error
                self._transfer = None
                if self._vlm.world.rank == 0:
                    log.warning("weights go to vLLM through a folder from now on: %s", error)
            else:
                self._weights = sent
                return
        self._weights = self._published.publish(self._vlm)

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int = 0, on_group: OnGroup = None
    ) -> list[tuple[Rollout, ...]]:
        """See `Engine.sample`. Raises TrainingError, EndpointError."""
        weights = self._current()
        self._give_back_memory()  # on every rank before one asks: all meet in `gather` first
        world = self._vlm.world
        asker = world.rank - world.rank % self._ranks
        shared = world.gather(prompts)[asker : asker + self._ranks] if self._ranks > 1 else [prompts]
        own = [prompt for of_rank in shared for prompt in of_rank] if self._asks else []
        requests = self._requests(own, sampling, step)
        groups: dict[int, tuple[Rollout, ...]] = {}
        answer = partial(self._answered, requests, groups, on_group)
        while not all(world.each(partial(answer, weights))):
            weights = self._weights = self._published.publish(self._vlm)
        answered = world.each(lambda: [groups[index] for index in range(len(own))])[asker]
        start = sum(map(len, shared[: world.rank - asker]))
        return answered[start : start + len(prompts)]

    def inspect(self, prompts: Sequence[Prompt], sampling: Sampling, *, candidates: int) -> list[EngineView]:
        """See `Engine.inspect`. Raises EndpointError."""
        weights = self._current()
        self._give_back_memory()
        requests = [
            replace(request, num_likeliest=candidates)
            for request in (self._requests(prompts, sampling, 0) if self._asks else ())
        ]
        views = self._vlm.world.each(lambda: self._backend.inspect(requests, weights) if requests else [])
        return [view for of_rank in views for view in of_rank]

    def rest(self) -> None:
        """See `Engine.rest`. vLLM asserts that memory does not shrink meanwhile: all ranks wait for all."""
        self._vlm.world.each(lambda: self._backend.rest() if self._asks else None)

    def start(self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int = 0) -> Arrivals:
        """See `BackgroundEngine.start`; for servers on other GPUs: colocated ones sleep while training."""
        requests, weights = self._requests(prompts, sampling, step), self._current()

        def sample(on_arrival: OnArrival) -> None:
            try:
                self._generate(requests, weights, on_arrival)
            except LostWeightsError as error:
                raise TrainingError(
                    "all vLLM servers were restarted and have lost the weights that were sent to them",
                    where="rollout.weights",
                    fix="the same command continues from the last checkpoint; or set rollout.weights=folder",
                ) from error

        return Arrivals(sample, len(requests), self._vlm.world)

    @property
    def _asks(self) -> bool:
        return self._vlm.world.rank % self._ranks == 0

    def _give_back_memory(self) -> None:
        """Free cached memory, which takes about a second, if a vLLM may start or wake up on this GPU."""
        if self._backend.shares_gpu:
            give_back_memory()

    def _current(self) -> Weights:
        """The newest published weights; published now if they are another model's, or there are none."""
        if self._weights is None or self._weights != self._published.newest:
            self.sync()
        assert self._weights is not None, "sync has published them"
        return self._weights

    def _requests(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> list[PromptRequest]:
        self._chat.prepare(ref for prompt in prompts for ref in prompt.images)
        return [
            PromptRequest(
                prompt=prompt,
                sampling=sampling,
                step=step,
                resized=self._chat.resized,
                keeps_routes=self._keeps_routes,
                marks_images=self._vlm.family.vllm_marks_images,
            )
            for prompt in prompts
        ]

    def _answered(
        self,
        requests: Sequence[PromptRequest],
        groups: dict[int, tuple[Rollout, ...]],
        on_group: OnGroup,
        weights: Weights,
    ) -> bool:
        """Add the groups that are missing; False if no server has these weights and they lie in no folder."""
        missing = [index for index in range(len(requests)) if index not in groups]

        def on_arrival(index: int, rollouts: tuple[Rollout, ...]) -> None:
            groups[missing[index]] = rollouts
            if on_group is not None:
                on_group(rollouts)

        try:
            self._generate([requests[index] for index in missing], weights, on_arrival)
        except LostWeightsError:
            return False
        return True

    def _generate(self, requests: Sequence[PromptRequest], weights: Weights, on_arrival: OnArrival) -> None:
        def on_answers(index: int, rollouts: tuple[Rollout, ...]) -> None:
            read = (replace(rollout, text=self._chat.text(rollout.ids)) for rollout in rollouts)
            on_arrival(index, tuple(read))

        if requests:
            self._backend.generate(requests, weights, on_answers)
