"""Samplers: requests in, samples out as they finish, whatever model stands behind them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlcs.engines.openai_client import EndpointClient
from rlcs.errors import DataError
from rlcs.recipe.sampling import Endpoint, EngineSettings, Rollouts
from rlcs.recipe.schema import Images, Model, Prompts
from rlcs.records import Message, Prompt, Request, Sample, Sampling, StopReason
from rlcs.signals import StopFlag

if TYPE_CHECKING:
    from rlcs.engines.base import Engine
    from rlcs.model.chat import Chat


class Sampler(Protocol):
    """Answers requests."""

    def samples(self, requests: Iterable[Request], *, stop: StopFlag | None = None) -> Iterator[Sample]:
        """Yield one sample for each request as they finish, in no order; end early when `stop` is set.

        Requests are drawn lazily, so that what is asked next may depend on what was answered.
        """
        ...


class EngineSampler:
    """An engine of ours with the chat format of its model."""

    def __init__(self, engine: "Engine", chat: "Chat", sampling: Sampling, *, batch_size: int) -> None:
        """Ask about `batch_size` requests at a time.

        A sample depends on its key, the seed and the policy alone. Requests that differ in their index alone
        share one prompt: the engine draws `sampling.n` samples of it together, those with the indices
        0 to n - 1, n to 2n - 1, and so on.
        """
        self._engine, self._chat = engine, chat
        ids = chat.sampling(max_new_tokens=1)
        self._sampling = replace(
            sampling, stop_ids=ids.stop_ids, banned_ids=ids.banned_ids, vision_ids=ids.vision_ids
        )
        self.batch_size = max(1, batch_size // sampling.n) * sampling.n

    def samples(self, requests: Iterable[Request], *, stop: StopFlag | None = None) -> Iterator[Sample]:
        """See `Sampler.samples`."""
        source = iter(requests)
        while not (stop and stop.is_set) and (some := list(islice(source, self.batch_size))):
            yield from self.batch(some)

    def batch(self, requests: Sequence[Request]) -> list[Sample]:
        """Answer requests in one go; the engine is called without any too: ranks call it together."""
        samples: list[Sample] = []
        for turn in sorted({request.turn for request in requests}) or [0]:
            samples += self._turn([request for request in requests if request.turn == turn], turn)
        return samples

    def _turn(self, requests: Sequence[Request], turn: int) -> Iterator[Sample]:
        n = self._sampling.n
        groups: dict[tuple[str, int, tuple[Message, ...]], list[Request]] = {}
        for request in requests:
            groups.setdefault((request.id, request.index // n, request.messages), []).append(request)
        prompts: list[Prompt] = []
        members: list[list[Request]] = []
        for (name, place, messages), group in groups.items():
            try:
                prompts.append(replace(self._chat.conversation(messages, name=name), repeat=place))
                members.append(group)
            except DataError as error:
                yield from (request.sample(error=str(error)) for request in group)
        rollouts = self._engine.sample(prompts, self._sampling, step=turn)
        for prompt, group, drawn in zip(prompts, members, rollouts, strict=True):
            for request in group:
                rollout = drawn[request.index % n]
                broken = rollout.stop is StopReason.ERROR
                yield request.sample(
                    text=rollout.text,
                    stop=rollout.stop,
                    prompt_tokens=len(prompt.ids),
                    tokens=len(rollout.ids),
                    error="the engine broke the answer off" if broken else "",
                    retryable=broken,
                )


@contextmanager
def open_sampler(
    model: str | Endpoint,
    sampling: Sampling,
    *,
    settings: EngineSettings | None = None,
    rows: int = 64,
    logs: Path = Path(),
) -> Iterator[Sampler]:
    """Open any model that does not train: behind a server, or in a folder, on the hub, or `builtin`.

    Without a server the engine of `settings` samples, `rows` at once (in each server that vLLM starts for it;
    `logs` is for their logs). vLLM reads the model's folder itself: none of its weights are loaded here or
    written anew. The model keeps its own pixel bounds and context length. Raises ModelError, UserError.
    """
    if isinstance(model, Endpoint):
        with EndpointClient(model, sampling) as client:
            yield client
        return
    from rlcs.engines.factory import EngineNeeds, open_engines  # torch is for models of ours alone
    from rlcs.engines.vllm.server import context_length
    from rlcs.model import loading

    settings = settings or EngineSettings()
    vlm = loading.load(Model(name=model), weights=settings.engine == "local")
    bounds = vlm.processor.image_processor.size
    images = Images(min_pixels=bounds["shortest_edge"], max_pixels=bounds["longest_edge"])
    own = int(vlm.model.config.get_text_config().max_position_embeddings)
    most = (context_length(settings, own) or own) - sampling.max_new_tokens
    prompts = Prompts(system=None, max_tokens=max(1, most))
    chat = loading.make_chat(vlm, prompts, images)
    at_once = {"concurrency": max(1, rows // sampling.n)}
    needs = EngineNeeds(
        settings=Rollouts.model_validate(settings.model_dump() | at_once),
        max_tokens=prompts.max_tokens + sampling.max_new_tokens,
        max_rows=max(rows, sampling.n),
        decode_limit=images.decode_limit,
    )
    # Two prompts for each place in vLLM, so that a long answer does not leave the others empty.
    batch_size = rows if settings.engine == "local" else 2 * rows * settings.servers
    with open_engines(needs, logs, unchanged=loading.resolve(model)) as make:
        yield EngineSampler(make(vlm, chat, rows), chat, sampling, batch_size=batch_size)
