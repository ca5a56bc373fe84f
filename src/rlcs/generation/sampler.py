"""Samplers: answer requests with any model and yield samples as they finish."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlcs.errors import DataError, out_of_memory_in
from rlcs.recipe.sampling import Endpoint, EngineSettings, Rollouts
from rlcs.recipe.schema import Images, Model, Prompts
from rlcs.records import Message, Prompt, Request, Rollout, Sample, Sampling
from rlcs.signals import StopFlag

if TYPE_CHECKING:
    from rlcs.engines.base import Engine
    from rlcs.model.chat import Chat


class Sampler(Protocol):
    """Answers requests."""

    def samples(self, requests: Iterable[Request], *, stop: StopFlag | None = None) -> Iterator[Sample]:
        """Yield one sample for each request as they finish, in no order; end early when `stop` is set.

        Requests are drawn lazily, so that the next ones may depend on earlier samples.
        """
        ...


class EngineSampler:
    """Answers requests with an engine of rlcs and the chat format of its model."""

    def __init__(self, engine: "Engine", chat: "Chat", sampling: Sampling, *, batch_size: int) -> None:
        """Answer about `batch_size` requests at a time.

        A sample depends only on its key, the seed and the weights. Requests that differ only in their index
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
        while not (stop and stop.is_set) and (batch := list(islice(source, self.batch_size))):
            yield from self.batch(batch)

    def batch(self, requests: Sequence[Request]) -> list[Sample]:
        """Answer requests together; calls the engine even without any, as all ranks must call it."""
        return [sample for sample, _ in self.drawn(requests)]

    def drawn(self, requests: Sequence[Request]) -> list[tuple[Sample, Rollout | None]]:
        """Answer requests as `batch` does: each sample with its tokens, None where there is no answer."""
        drawn: list[tuple[Sample, Rollout | None]] = []
        for turn in sorted({request.turn for request in requests}) or [0]:
            drawn += self._turn([request for request in requests if request.turn == turn], turn)
        return drawn

    def _turn(self, requests: Sequence[Request], turn: int) -> Iterator[tuple[Sample, Rollout | None]]:
        n = self._sampling.n
        groups: dict[tuple[str, int, tuple[Message, ...]], list[Request]] = {}
        for request in requests:
            groups.setdefault((request.id, request.index // n, request.messages), []).append(request)
        prompts: list[Prompt] = []
        members: list[list[Request]] = []
        for (name, repeat, messages), group in groups.items():
            try:
                prompt = self._chat.checked(self._chat.conversation(messages, name=name))
                prompts.append(replace(prompt, repeat=repeat))
                members.append(group)
            except DataError as error:
                yield from ((request.sample(error=str(error)), None) for request in group)
        with out_of_memory_in("sampling"):
            rollouts = self._engine.sample(prompts, self._sampling, step=turn)
        for prompt, group, drawn in zip(prompts, members, rollouts, strict=True):
            for request in group:
                rollout = drawn[request.index % n]
                sample = replace(
                    rollout.sample,
                    index=request.index,
                    turn=turn,
                    prompt_tokens=len(prompt.ids),
                    retryable=bool(rollout.sample.error),
                )
                yield sample, rollout


@contextmanager
def open_sampler(
    model: str | Endpoint,
    sampling: Sampling,
    *,
    settings: EngineSettings | None = None,
    rows: int = 64,
    logs: Path = Path(),
    images: Images | None = None,
) -> Iterator[Sampler]:
    """Open a model that is not being trained: on a server, in a folder, on the hub, or `builtin`.

    Without a server the engine of `settings` samples, `rows` at once (with vLLM in each server that it
    starts, whose logs go to `logs`). vLLM reads the model's folder itself: this process neither loads nor
    writes its weights. The model keeps its pixel bounds and context length; a server gets images within those
    of `images`. Raises ModelError, UserError.
    """
    if isinstance(model, Endpoint):
        from rlcs.engines.openai_client import EndpointClient  # what reads samples asks nobody

        with EndpointClient(model, sampling, images) as client:
            yield client
        return
    from rlcs.engines.factory import EngineNeeds, open_engines  # without an endpoint alone: imports torch
    from rlcs.engines.vllm.server import context_length
    from rlcs.model import loading

    settings = settings or EngineSettings()
    vlm = loading.load(Model(name=model), weights=settings.engine == "local")
    least, most = vlm.family.pixel_bounds(vlm.processor)
    own = Images(min_pixels=least, max_pixels=most)
    longest = int(vlm.model.config.get_text_config().max_position_embeddings)
    max_tokens = (context_length(settings, longest) or longest) - sampling.max_new_tokens
    prompts = Prompts(system=None, max_tokens=max(1, max_tokens))
    chat = loading.make_chat(vlm, prompts, own)
    at_once = {"concurrency": max(1, rows // sampling.n)}
    needs = EngineNeeds(
        settings=Rollouts.model_validate(settings.model_dump() | at_once),
        max_tokens=prompts.max_tokens + sampling.max_new_tokens,
        max_rows=max(rows, sampling.n),
    )
    # Twice as many requests as vLLM computes at once, so that it stays busy while a long answer ends.
    batch_size = rows if settings.engine == "local" else 2 * rows * settings.servers
    with open_engines(needs, logs, unchanged=loading.resolve(model)) as make:
        yield EngineSampler(make(vlm, chat, rows), chat, sampling, batch_size=batch_size)
