"""The in-process engine: samples from the model that trains, and serves requests from other threads."""

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from rlcs.engines.base import Progress
from rlcs.engines.decoding import DecodeRequest, DecodingBatch, Listener, Row
from rlcs.engines.onednn_linear import packed
from rlcs.model.chat import Chat
from rlcs.model.vlm import Vlm
from rlcs.records import Prompt, Rollout, Sampling

log = logging.getLogger(__name__)


class LocalEngine:
    """Samples from `vlm` in this process.

    `sample` decodes in the caller's thread. What is submitted is decoded in a thread that lives as long as
    there is work: an idle engine holds no thread, and needs no closing. Of the two one waits for the other.
    """

    def __init__(self, vlm: Vlm, chat: Chat, *, max_rows: int, cache_tokens: float = math.inf) -> None:
        """At most `max_rows` answers are decoded at once, and at most `cache_tokens` reserved for them.

        A request that alone is larger is decoded alone.
        """
        self._vlm, self._chat = vlm, chat
        self._max_rows, self._cache_tokens = max_rows, cache_tokens
        self._decoding = threading.Lock()
        self._submitting = threading.Lock()
        self._waiting: list[DecodeRequest] = []
        self._batch = DecodingBatch(vlm, chat)
        self._thread_runs = False
        # Undone by `sync`, or when the engine is collected, and the generator with it.
        self._packed: AbstractContextManager[None] | None = None

    @property
    def waiting(self) -> int:
        """Submitted requests that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._batch.requests)

    def sync(self) -> None:
        """Let requests submitted from now on be answered by the weights as they are now.

        Waits for those that are under way. `sample` always takes the weights of now.
        """
        with self._decoding:
            self._unpack()

    def _unpack(self) -> None:
        if self._packed is not None:
            self._packed.__exit__(None, None, None)
            self._packed = None

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int = 0, progress: Progress = None
    ) -> list[tuple[Rollout, ...]]:
        """See `Engine.sample`. The model is left in the mode (train or eval) in which it was."""
        requests = [DecodeRequest(prompt=prompt, sampling=sampling, step=step) for prompt in prompts]
        with self._ready():
            self._unpack()
            with packed(self._vlm.model):
                # Prefilling a few prompts at a time would cost more than rows that are free for a while.
                for ended in self._decode(list(requests), refill=self._max_rows // 4):
                    if ended and progress is not None:
                        progress(ended)
        return [tuple(self._rollout(request, row) for row in request.rows) for request in requests]

    def submit(
        self, prompt: Prompt, sampling: Sampling, *, listener: Listener, stops: Sequence[str] = ()
    ) -> DecodeRequest:
        """Begin with `sampling.n` answers; `listener` gets their tokens, until each has had its last.

        From any thread. An answer ends before any of the (non-empty) `stops`.
        """
        request = DecodeRequest(prompt=prompt, sampling=sampling, stops=tuple(stops), listener=listener)
        with self._submitting:
            self._waiting.append(request)
            if not self._thread_runs:
                self._thread_runs = True
                threading.Thread(target=self._serve, name="rlcs-engine").start()
        return request

    @torch.no_grad()
    def _serve(self) -> None:
        """Decode what is submitted, until nothing is left."""
        with self._ready():
            while self._has_work():
                try:
                    if self._packed is None:
                        weights = packed(self._vlm.model)
                        weights.__enter__()
                        self._packed = weights
                    for _ in self._decode(self._waiting, refill=0):
                        pass
                except Exception as error:  # one request too many for the memory must not end the service
                    self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Report an error to the requests under way, or to those that wait if none could begin."""
        failed = self._batch.requests
        if not failed:
            with self._submitting:
                failed, self._waiting = self._waiting, []
        log.exception("the engine failed on %d requests", len(failed))
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
        """The model in eval mode, and whole on every rank, for one thread at a time."""
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
        """Decode the requests that wait, taken out in their order; yields how many answers each step ended.

        Others join a batch under way as soon as at least `refill` rows are free.
        """
        batch = self._batch
        while True:
            batch.drop_cancelled()
            if not batch.requests or self._max_rows - batch.live >= refill:
                batch.add(self._joining(batch, waiting))
            if not batch.requests:
                return
            yield batch.step()

    def _joining(self, batch: DecodingBatch, waiting: list[DecodeRequest]) -> list[DecodeRequest]:
        """Take out who joins now, as memory allows: rows and prompts are padded to the longest."""
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
        )
