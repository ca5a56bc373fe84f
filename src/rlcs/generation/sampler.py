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
from rlcs.recipe.schema import Eval, Images, Model, Prompts, Recipe
from rlcs.recipe.stages import Grpo
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
        self._sampling = chat.sampling(
            max_new_tokens=sampling.max_new_tokens,
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
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
                yield from (Sample(id=r.id, index=r.index, turn=turn, error=str(error)) for r in group)
        rollouts = self._engine.sample(prompts, self._sampling, step=turn)
        for prompt, group, drawn in zip(prompts, members, rollouts, strict=True):
            for request in group:
                rollout = drawn[request.index % n]
                broken = rollout.stop is StopReason.ERROR
                yield Sample(
                    id=request.id,
                    index=request.index,
                    turn=turn,
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
    `logs` is for their logs). By vLLM a model is served as it lies there:
    nothing of its weights is loaded here or written anew. It keeps its own pixel bounds and context length.
    Raises ModelError, UserError.
    """
    if isinstance(model, Endpoint):
        with EndpointClient(model, sampling) as client:
            yield client
        return
    from rlcs.engines.factory import open_engines  # torch is for models of ours alone
    from rlcs.engines.vllm.server import context_length
    from rlcs.model import loading

    settings = settings or EngineSettings()
    longest, local = sampling.max_new_tokens, settings.engine == "local"
    vlm = loading.load(Model(name=model), weights=local)
    size = vlm.processor.image_processor.size
    own = int(vlm.model.config.get_text_config().max_position_embeddings)
    context = context_length(settings, own) or own
    at_once = {"concurrency": max(1, rows // sampling.n)}
    recipe = Recipe(
        prompt=Prompts(system=None, max_tokens=max(1, context - longest)),
        images=Images(min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]),
        grpo=Grpo(max_new_tokens=longest, max_rows=rows),
        eval=Eval(max_new_tokens=longest, max_rows=rows),
        rollout=Rollouts.model_validate(settings.model_dump() | at_once),
    )
    chat = loading.make_chat(vlm, recipe.prompt, recipe.images)
    # Two prompts for each place in vLLM, so that a long answer does not leave the others empty.
    batch_size = rows if local else 2 * rows * settings.servers
    with open_engines(recipe, logs, unchanged=loading.resolve(model)) as make:
        yield EngineSampler(make(vlm, chat, rows), chat, sampling, batch_size=batch_size)
