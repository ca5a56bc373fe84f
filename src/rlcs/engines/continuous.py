"""Continuous batching: requests join, stream and leave while others are being answered.

Every request has its own sampling settings, limit and stop strings. The model runs in one thread,
which lives as long as there is work: an idle engine holds no thread, and needs no closing.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from rlcs.engines.detokenizer import Detokenizer
from rlcs.engines.local import _Batch, _Row
from rlcs.engines.onednn_linear import packed
from rlcs.engines.sampling import choose, uniform
from rlcs.model.chat import Chat
from rlcs.model.vlm import Vlm
from rlcs.records import Prompt, Sampling, StopReason, rollout_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One token of answer `index` and the text that it made certain; `stop` is set on the last one."""

    index: int
    id: int
    logprob: float
    text: str
    stop: StopReason | None


Listener = Callable[[Token | Exception], None]
"""Called in the engine's thread; an exception means that the request failed and nothing more comes."""


@dataclass(eq=False, kw_only=True)
class Ticket:
    """A request under way: `sampling.n` answers to one prompt."""

    prompt: Prompt
    sampling: Sampling
    stops: tuple[str, ...]
    tell: Listener
    cancelled: bool = False

    @property
    def most_tokens(self) -> int:
        """The longest that prompt and answer can become."""
        return len(self.prompt.ids) + self.sampling.max_new_tokens

    def cancel(self) -> None:
        """Nobody listens any more: the request leaves at the next step. From any thread."""
        self.cancelled = True


@dataclass(kw_only=True)
class _Live(_Row):
    """One answer in the making."""

    ticket: Ticket
    text: Detokenizer = field(repr=False)


class ContinuousEngine:
    """Answers requests from any thread."""

    def __init__(self, vlm: Vlm, chat: Chat, *, max_rows: int = 64, cache_tokens: int = 1 << 18) -> None:
        """At most `max_rows` answers are decoded at once, and at most `cache_tokens` reserved for them.

        A request that alone is larger is answered alone. The weights may not change while the engine lives.
        """
        self._vlm, self._chat = vlm, chat
        self._packed = packed(vlm.model)  # undone when the engine is collected, and the generator with it
        self._packed.__enter__()
        self._max_rows, self._cache_tokens = max_rows, cache_tokens
        self._lock = threading.Lock()
        self._waiting: list[Ticket] = []
        self._live: list[Ticket] = []
        self._working = False

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._live)

    def submit(
        self, prompt: Prompt, sampling: Sampling, *, tell: Listener, stops: Sequence[str] = ()
    ) -> Ticket:
        """Ask for `sampling.n` answers; `tell` gets their tokens, until each has had its last."""
        ticket = Ticket(prompt=prompt, sampling=sampling, stops=tuple(stops), tell=tell)
        with self._lock:
            self._waiting.append(ticket)
            if not self._working:
                self._working = True
                threading.Thread(target=self._work, name="rlcs-engine").start()
        return ticket

    @torch.no_grad()
    def _work(self) -> None:
        self._vlm.model.eval()
        batch = _MixedBatch(self._vlm, self._chat)
        while (joining := self._next(batch)) is not None:
            try:
                batch.join(joining)
                batch.step()
            except Exception as error:  # one request too many for the memory must not end the service
                log.exception("the engine failed on %d requests", len(self._live))
                for ticket in self._live:
                    ticket.tell(error)
                batch = _MixedBatch(self._vlm, self._chat)

    def _next(self, batch: "_MixedBatch") -> list[Ticket] | None:
        """Who joins before the next step; None when there is nothing left to do."""
        with self._lock:
            batch.drop_cancelled()
            self._waiting = [ticket for ticket in self._waiting if not ticket.cancelled]
            self._live = list(dict.fromkeys(row.ticket for row in batch.open_rows))
            joining = []
            while self._waiting and self._fits(self._waiting[0]):
                joining.append(self._waiting.pop(0))
                self._live.append(joining[-1])
            self._working = bool(self._live)
            return joining if self._working else None

    def _fits(self, ticket: Ticket) -> bool:
        """Whether memory allows one more request: rows and trunks are padded to the longest."""
        live = [*self._live, ticket]
        rows = sum(each.sampling.n for each in live)
        reserved = rows * max(each.most_tokens for each in live)
        return len(live) == 1 or (rows <= self._max_rows and reserved <= self._cache_tokens)


class _MixedBatch(_Batch):
    """Rows of requests with settings of their own."""

    rows: list[_Live]  # type: ignore[assignment]

    def __init__(self, vlm: Vlm, chat: Chat) -> None:
        super().__init__(vlm, chat, chat.sampling(max_new_tokens=1), step=0)
        self._joining: list[Ticket] = []

    @property
    def open_rows(self) -> list[_Live]:
        return [row for row in self.rows if row.stop is None]

    def drop_cancelled(self) -> None:
        for row in self.open_rows:
            if row.ticket.cancelled:
                row.stop = StopReason.ERROR
        if not self.live:
            self.rows, self._cache = [], None

    def join(self, tickets: Sequence[Ticket]) -> None:
        """Prefill the prompts of new requests; those of one `n` go together."""
        for n, same in groupby(sorted(tickets, key=lambda t: t.sampling.n), key=lambda t: t.sampling.n):
            self._joining = list(same)
            self._sampling = replace(self._sampling, n=n)
            self.add([(place, ticket.prompt) for place, ticket in enumerate(self._joining)])

    def _open(self, prompts: Sequence[tuple[int, Prompt]], starts: Sequence[int]) -> None:
        for (place, prompt), start in zip(prompts, starts, strict=True):
            ticket = self._joining[place]
            for index in range(ticket.sampling.n):
                self.rows.append(
                    _Live(
                        place=place,
                        prompt=prompt,
                        index=index,
                        seed=rollout_seed(ticket.sampling.seed, 0, prompt.problem_id, index),
                        start=start,
                        ticket=ticket,
                        text=Detokenizer(self._chat.text, ticket.stops),
                    )
                )

    def _choose(self) -> tuple[Tensor, Tensor]:
        """As in `_Batch`, for the rows of each setting in turn."""
        device = self._logits.device
        ids = torch.zeros(len(self.rows), dtype=torch.long, device=device)
        logprobs = torch.zeros(len(self.rows), device=device)
        settings: dict[tuple[float, float], list[int]] = {}
        for place, row in enumerate(self.rows):
            sampling = row.ticket.sampling
            settings.setdefault((sampling.temperature, sampling.top_p), []).append(place)
        for (temperature, top_p), places in settings.items():
            seeds = torch.tensor([self.rows[place].seed for place in places], device=device)
            counters = torch.tensor([len(self.rows[place].ids) for place in places], device=device)
            ids[places], logprobs[places] = choose(
                self._logits[places],
                uniform(seeds, counters),
                temperature=temperature,
                top_p=top_p,
                banned=self._banned,
            )
        return ids, logprobs

    def _verdict(self, row: _Row) -> StopReason | None:
        """Tell the newest token to whoever asked."""
        assert isinstance(row, _Live), "only such rows are opened here"
        sampling, stop, text = row.ticket.sampling, None, ""
        if row.ids[-1] in sampling.stop_ids:
            stop = StopReason.EOS
        else:
            text = row.text.feed(row.ids[-1])
            if row.text.stopped:
                stop = StopReason.EOS
            elif len(row.ids) >= sampling.max_new_tokens:
                stop = StopReason.LENGTH
        if stop is not None and not row.text.stopped:
            text += row.text.flush()
        row.ticket.tell(
            Token(index=row.index, id=row.ids[-1], logprob=row.logprobs[-1], text=text, stop=stop)
        )
        return stop
