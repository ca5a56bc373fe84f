"""Samples in this process from the model that trains, and serves requests from other threads."""

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from rlcs.engines.base import EngineView, OnGroup, Seen
from rlcs.engines.branches import DecodeRequest, Listener, Row, Token
from rlcs.engines.cache_sizes import cache_sizes
from rlcs.engines.decoding import DecodingBatch
from rlcs.engines.onednn_linear import packed
from rlcs.engines.prefixes import Prefixes
from rlcs.errors import out_of_memory_in
from rlcs.model.chat import Chat
from rlcs.model.vlm import Vlm
from rlcs.records import Prompt, Rollout, Routes, Sampling

log = logging.getLogger(__name__)


class LocalEngine:
    """Samples from `vlm` in this process.

    `sample` decodes in the caller's thread. Submitted requests are decoded in a thread that ends with the
    last of them: an idle engine holds no thread and needs no closing. The two never decode at the same time.
    """

    def __init__(
        self,
        vlm: Vlm,
        chat: Chat,
        *,
        max_rows: int,
        cache_tokens: float = math.inf,
        keeps_routes: bool = False,
        prefix_bytes: int = 0,
    ) -> None:
        """At most `max_rows` answers are decoded at once, and at most `cache_tokens` reserved for them.

        A request that alone is larger is decoded alone. `keeps_routes`: rollouts say which experts computed
        them. Keys and values of submitted prompts are kept in `prefix_bytes` of memory, for later ones that
        begin alike; not of models with recurrent layers.
        """
        self._vlm, self._chat = vlm, chat
        self._max_rows, self._cache_tokens = max_rows, cache_tokens
        self._decoding = threading.Lock()
        self._submitting = threading.Lock()
        self._waiting: list[DecodeRequest] = []
        recurrent = cache_sizes(vlm.model.config.get_text_config()).row_bytes(1) > 0
        self._prefixes = Prefixes(0 if recurrent or keeps_routes else prefix_bytes)
        self._batch = DecodingBatch(vlm, chat, keeps_routes=keeps_routes, prefixes=self._prefixes)
        self._thread_runs = False
        # Closed by `sync`, or when the engine and with it the generator is garbage-collected.
        self._packed: AbstractContextManager[None] | None = None

    @property
    def waiting(self) -> int:
        """Number of submitted requests that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of requests that are being answered."""
        return len(self._batch.requests)

    def sync(self) -> None:
        """Answer requests submitted from now on with the current weights.

        Waits for those under way. `sample` always uses the current weights.
        """
        with self._decoding:
            self._unpack()

    def _unpack(self) -> None:
        self._prefixes.clear()
        if self._packed is not None:
            self._packed.__exit__(None, None, None)
            self._packed = None

    def rest(self) -> None:
        """Do nothing: the cache is gone when `sample` returns."""

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int = 0, on_group: OnGroup = None
    ) -> list[tuple[Rollout, ...]]:
        """See `Engine.sample`. The model is left in the mode (train or eval) in which it was."""
        requests = [DecodeRequest(prompt=prompt, sampling=sampling, step=step) for prompt in prompts]
        self._answer(requests, on_group)
        return [self._group(request) for request in requests]

    @torch.no_grad()
    def inspect(self, prompts: Sequence[Prompt], sampling: Sampling, *, candidates: int) -> list[EngineView]:
        """See `Engine.inspect`: the engine of each rank is an instance."""
        seen: list[list[tuple[tuple[int, float], ...]]] = [[] for _ in prompts]

        def listener(found: list[tuple[tuple[int, float], ...]]) -> Listener:
            def listen(token: Token | Exception) -> None:
                if isinstance(token, Token):
                    others = ((i, logprob) for i, logprob in token.likeliest if i != token.id)
                    found.append(((token.id, token.logprob), *others))

            return listen

        requests = [
            DecodeRequest(
                prompt=prompt, sampling=sampling, num_likeliest=candidates, listener=listener(found)
            )
            for prompt, found in zip(prompts, seen, strict=True)
        ]
        precision = self._answer(requests, None)
        world = self._vlm.world
        own = EngineView(
            name=f"the engine of rank {world.rank}" if world.grouped else "the local engine",
            precision=str(precision).removeprefix("torch."),
            prompts=tuple(
                Seen(prompt_ids=prompt.ids, ids=tuple(request.rows[0].ids), candidates=tuple(found))
                for prompt, request, found in zip(prompts, requests, seen, strict=True)
            ),
        )
        return world.gather(own)

    def _answer(self, requests: Sequence[DecodeRequest], on_group: OnGroup) -> torch.dtype:
        """Decode requests with the current weights in this thread; returns the number format of these."""
        unfinished = list(requests)
        with self._ready():
            self._unpack()
            try:
                with out_of_memory_in("", fix=self._needs(requests)), packed(self._vlm.model):
                    # Prefilling a few prompts at a time would cost more than leaving rows free for a while.
                    for ended in self._decode(list(requests), refill=self._max_rows // 4):
                        if ended and on_group is not None:
                            for request in [request for request in unfinished if request.finished]:
                                unfinished.remove(request)
                                on_group(self._group(request))
            finally:
                self._prefixes.clear()  # the weights may change now
            head: torch.Tensor = self._vlm.model.get_output_embeddings().weight
            return head.dtype

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        listener: Listener,
        stops: Sequence[str] = (),
        num_likeliest: int = 0,
    ) -> DecodeRequest:
        """Start `sampling.n` answers; `listener` is called with their tokens, up to the last of each.

        From any thread. An answer ends before any of the (non-empty) `stops`. With each token come the
        `num_likeliest` tokens that were most likely in its place.
        """
        request = DecodeRequest(
            prompt=prompt,
            sampling=sampling,
            stops=tuple(stops),
            num_likeliest=num_likeliest,
            listener=listener,
        )
        with self._submitting:
            self._waiting.append(request)
            if not self._thread_runs:
                self._thread_runs = True
                threading.Thread(target=self._serve, name="rlcs-engine").start()
        return request

    @torch.no_grad()
    def _serve(self) -> None:
        """Decode submitted requests until none is left."""
        with self._ready():
            while self._has_work():
                try:
                    if self._packed is None:
                        weights = packed(self._vlm.model)
                        weights.__enter__()
                        self._packed = weights
                    with out_of_memory_in("", fix=self._needs(self._waiting)):
                        for _ in self._decode(self._waiting, refill=0):
                            pass
                except Exception as error:  # running out of memory must not end the service
                    self._fail(error)

    def _needs(self, requests: Sequence[DecodeRequest]) -> str:
        """The memory that these requests need at once, and how to need less."""
        rows = min(self._max_rows, sum(request.sampling.n for request in requests))
        longest = max((request.max_tokens for request in requests), default=0)
        element = self._vlm.model.dtype.itemsize
        kept = cache_sizes(self._vlm.model.config.get_text_config())
        a_token, a_row = kept.token_bytes(element), kept.row_bytes(element)
        states = f" + {rows:,} x {a_row:,} bytes of states" if a_row else ""
        return (
            "ask for fewer answers at once (--batch, --concurrency, teacher.concurrency), or shorter ones: "
            f"{rows:,} x {longest:,} tokens of prompt and answer x {a_token:,} bytes of keys and values"
            f"{states} "
            f"= {rows * (longest * a_token + a_row) / 2**30:,.2f} GB, twice while they grow"
        )

    def _fail(self, error: Exception) -> None:
        """Report an error to the requests under way, or to all waiting ones if none could begin."""
        failed = self._batch.requests
        if not failed:
            with self._submitting:
                failed, self._waiting = self._waiting, []
        log.exception("the engine failed on %d requests", len(failed))
        self._prefixes.clear()  # memory may have run out
        for request in failed:
            if request.listener is not None:
                request.listener(error)
        self._batch.clear()

    def _has_work(self) -> bool:
        with self._submitting:
            self._thread_runs = bool(self._waiting)
            return self._thread_runs

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Lock the model for this thread, in eval mode and with all weights on every rank."""
        with self._decoding:
            was_training = self._vlm.model.training
            self._vlm.model.eval()
            try:
                with self._vlm.gathered():
                    yield
            finally:
                self._batch.clear()
                self._vlm.model.train(was_training)

    def _decode(self, waiting: list[DecodeRequest], *, refill: int) -> Iterator[int]:
        """Move requests from `waiting` into the batch and decode; yields how many answers each step ended.

        Requests join a batch under way as soon as at least `refill` rows are free.
        """
        batch = self._batch
        while True:
            batch.drop_cancelled()
            if not batch.requests or self._max_rows - batch.live >= refill:
                batch.add(self._joining(waiting))
            if not batch.requests:
                return
            yield batch.step()

    def _joining(self, waiting: list[DecodeRequest]) -> list[DecodeRequest]:
        """Take out the requests that fit into memory now: rows and prompts are padded to the longest."""
        batch = self._batch
        joining: list[DecodeRequest] = []
        rows, longest = batch.live, max((request.max_tokens for request in batch.requests), default=0)
        with self._submitting:
            waiting[:] = [request for request in waiting if not request.cancelled]
            for request in waiting:
                rows, longest = rows + request.sampling.n, max(longest, request.max_tokens)
                fits = rows <= self._max_rows and rows * longest <= self._cache_tokens
                if not fits and (joining or batch.requests):
                    break
                joining.append(request)
            del waiting[: len(joining)]
        return joining

    def _group(self, request: DecodeRequest) -> tuple[Rollout, ...]:
        return tuple(self._rollout(request, row) for row in request.rows)

    def _rollout(self, request: DecodeRequest, row: Row) -> Rollout:
        assert row.stop is not None, "every row has ended"
        return Rollout(
            problem_id=request.prompt.problem_id,
            index=row.index,
            ids=tuple(row.ids),
            logprobs=tuple(row.logprobs),
            stop=row.stop,
            seed=row.seed,
            text=self._chat.text(row.ids),
            routes=self._routes(request, row),
        )

    def _routes(self, request: DecodeRequest, row: Row) -> Routes | None:
        """Of the answer, and with the first one of the prompt, if they are kept."""
        if not request.routes:
            return None
        text = self._vlm.model.config.get_text_config()
        data = (request.routes if row.index == 0 else b"") + b"".join(row.routes)
        return Routes(layers=text.num_hidden_layers, chosen=text.num_experts_per_tok, data=data)
