"""Decodes a batch for the local engine: prompts prefilled once, branched n times, a token a row and step.

All rows form one flat sequence of queries; `ForestCache` gives each its prompt and its own tokens. Every
request has its own sampling settings, limit and stop strings, and joins and leaves while others go on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlcs.engines.cache import ForestCache, RecordingPlan
from rlcs.engines.detokenizer import Detokenizer
from rlcs.engines.sampling import choose, likeliest, uniform
from rlcs.errors import ModelError
from rlcs.model import attention
from rlcs.model.chat import Chat
from rlcs.model.chunks import PREFILL_TOKENS
from rlcs.model.experts import Routing
from rlcs.model.image_features import image_inputs
from rlcs.model.packing import pack
from rlcs.model.policy import hidden_states
from rlcs.model.vlm import Vlm
from rlcs.records import Prompt, Sampling, StopReason, rollout_seed
from rlcs.records.trees import Tree


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One token of answer `index` and the text that it completes; `stop` is set on the last one.

    `likeliest` are the ids that were most likely in its place, with their logprobs, if they were requested.
    """

    index: int
    id: int
    logprob: float
    text: str
    stop: StopReason | None
    likeliest: tuple[tuple[int, float], ...] = ()


Listener = Callable[[Token | Exception], None]
"""Called with every token, in the thread that decodes; an exception means that the request failed, and is
the last call."""


@dataclass(eq=False, kw_only=True, slots=True)
class Row:
    """One answer that is being decoded; `start` is the position of its first token."""

    sampling: Sampling
    index: int
    seed: int
    start: int
    listener: Listener | None
    detokenizer: Detokenizer
    num_likeliest: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    routes: list[bytes] = field(default_factory=list)
    stop: StopReason | None = None

    def take(self, token: int, logprob: float, likeliest: tuple[tuple[int, float], ...] = ()) -> None:
        """Append a token, decide whether the answer ends with it, and report it to the listener."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in self.sampling.stop_ids:
            self.stop = StopReason.EOS
        elif len(self.ids) >= self.sampling.max_new_tokens:
            self.stop = StopReason.LENGTH
        if self.listener is None:
            return
        text = "" if self.stop is StopReason.EOS else self.detokenizer.feed(token)
        if self.detokenizer.stopped:
            self.stop = StopReason.EOS
        elif self.stop is not None:
            text += self.detokenizer.flush()
        self.listener(
            Token(index=self.index, id=token, logprob=logprob, text=text, stop=self.stop, likeliest=likeliest)
        )


@dataclass(eq=False, kw_only=True, slots=True)
class DecodeRequest:
    """`sampling.n` answers to one prompt; each ends before any of the `stops`, which need a listener.

    The listener gets the `num_likeliest` most likely tokens beside each token.
    """

    prompt: Prompt
    sampling: Sampling
    step: int = 0
    stops: tuple[str, ...] = ()
    num_likeliest: int = 0
    listener: Listener | None = None
    cancelled: bool = False
    rows: list[Row] = field(default_factory=list, repr=False)
    routes: bytes = b""

    @property
    def max_tokens(self) -> int:
        """The longest that prompt and answer can become."""
        return len(self.prompt.ids) + self.sampling.max_new_tokens

    @property
    def finished(self) -> bool:
        """Whether all answers have ended."""
        return bool(self.rows) and all(row.stop is not None for row in self.rows)

    def cancel(self) -> None:
        """Remove the request from the batch at the next step. From any thread."""
        self.cancelled = True


class DecodingBatch:
    """The rows that are being decoded, with the logits (B, V) of each row's next token."""

    def __init__(self, vlm: Vlm, chat: Chat, *, keeps_routes: bool = False) -> None:
        """Empty: `add` requests, then `step`. `keeps_routes`: of a mixture, which experts compute what."""
        self._vlm, self._chat, self._keeps_routes = vlm, chat, keeps_routes
        self.clear()

    def clear(self) -> None:
        """Drop all requests and free their memory."""
        self.requests: list[DecodeRequest] = []
        self._rows: list[Row] = []
        self._cache: ForestCache | None = None
        self._logits = self._seeds = self._starts = torch.empty(0)
        self._settings: list[tuple[Sampling, Tensor, list[int] | slice]] = []

    @property
    def live(self) -> int:
        """Number of answers that are still being decoded."""
        return sum(row.stop is None for row in self._rows)

    def add(self, requests: Sequence[DecodeRequest]) -> None:
        """Prefill the prompts of requests and open `sampling.n` rows on each."""
        self.requests += requests
        for chunk in _by_tokens(requests, PREFILL_TOKENS):
            trunks = pack([Tree(prompt=r.prompt, branches=()) for r in chunk], self._chat.patches)
            trunks = trunks.to(self._vlm.device)
            layout, device = trunks.layout, self._vlm.device
            plan = RecordingPlan(attention.make_plan(self._vlm.attention, layout, device), layout, device)
            images = image_inputs(self._vlm, trunks)
            states, routes = self._computed(trunks.ids, trunks.positions, plan=plan, **images)
            ends = [trunk.stop - 1 for trunk in layout.trunks]
            counts = torch.tensor([r.sampling.n for r in chunk], device=device)
            logits = self._vlm.logits(states[ends]).repeat_interleave(counts, dim=0)
            cache = ForestCache.prefilled(plan, counts)
            for request, trunk in zip(chunk, layout.trunks, strict=True):
                self._open(request, start=int(trunks.positions[:, trunk.start : trunk.stop].max()) + 1)
                request.routes = b"".join(routes[trunk.start : trunk.stop])
            if self._cache is None:
                self._cache, self._logits = cache, logits
            else:
                self._cache.append(cache)
                self._logits = torch.cat([self._logits, logits])
        if requests:
            self._rows_changed()

    def _open(self, request: DecodeRequest, *, start: int) -> None:
        sampling, prompt = request.sampling, request.prompt
        for index in range(sampling.n):
            number = prompt.repeat * sampling.n + index
            seed = rollout_seed(sampling.seed, request.step, prompt.problem_id, number)
            request.rows.append(
                Row(
                    sampling=sampling,
                    index=index,
                    seed=seed,
                    start=start,
                    listener=request.listener,
                    detokenizer=Detokenizer(self._chat.text, request.stops),
                    num_likeliest=request.num_likeliest,
                )
            )
        self._rows += request.rows

    def _rows_changed(self) -> None:
        """Rebuild what stays the same from step to step: seeds, first positions, rows by settings."""
        device = self._vlm.device
        self._seeds = torch.tensor([row.seed for row in self._rows], device=device)
        self._starts = torch.tensor([row.start for row in self._rows], device=device)
        groups: dict[tuple[float, float, tuple[int, ...]], list[int]] = {}
        for index, row in enumerate(self._rows):
            key = row.sampling.temperature, row.sampling.top_p, row.sampling.banned_ids
            groups.setdefault(key, []).append(index)
        self._settings = [
            (
                self._rows[group[0]].sampling,
                torch.tensor(banned, dtype=torch.long, device=device),
                slice(None) if len(groups) == 1 else group,  # all rows: a view, no copy of the logits
            )
            for (_, _, banned), group in groups.items()
        ]

    def _computed(self, *inputs: Tensor, **keywords: Any) -> tuple[Tensor, list[bytes]]:
        """The `hidden_states` of tokens, and the experts that computed each, if they are to be kept."""
        if not self._keeps_routes:
            return hidden_states(self._vlm, *inputs, **keywords), []
        routing = Routing()
        states = hidden_states(self._vlm, *inputs, routing=routing, **keywords)
        table = routing.table(self._vlm.model.config.get_text_config().num_hidden_layers)
        return states, [token.tobytes() for token in table.cpu().numpy().astype("<u2")]

    def drop_cancelled(self) -> None:
        """End the answers of cancelled requests."""
        cancelled = [request for request in self.requests if request.cancelled]
        for request in cancelled:
            for row in request.rows:
                row.stop = row.stop or StopReason.ERROR
        if cancelled:
            self._drop_ended()

    def step(self) -> int:
        """Choose a token for every row, then compute the next logits; returns how many answers ended."""
        ids, logprobs = self._choose()
        ended = 0
        for index, (row, token, logprob) in enumerate(
            zip(self._rows, ids.tolist(), logprobs.tolist(), strict=True)
        ):
            if row.stop is None:
                if not math.isfinite(logprob):
                    self._require_numbers(index)
                row.take(token, logprob, self._likeliest(index))
                ended += row.stop is not None
        if ended:
            self._drop_ended()
        if self._rows:
            self._advance(ids)
        return ended

    def _choose(self) -> tuple[Tensor, Tensor]:
        """The next token of every row, and its logprob."""
        assert self._cache is not None, "rows were added before"
        ids, logprobs = torch.empty_like(self._seeds), torch.empty(len(self._rows), device=self._vlm.device)
        draws = uniform(self._seeds, self._cache.row_lengths)
        for sampling, banned, group in self._settings:
            ids[group], logprobs[group] = choose(
                self._logits[group],
                draws[group],
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                banned=banned,
            )
        return ids, logprobs

    def _require_numbers(self, index: int) -> None:
        """Raise ModelError where a row's logits are no numbers to choose a token by."""
        logits = self._logits[index]
        if bool(logits.isnan().any()) or not bool(logits.isfinite().any()):
            fix = "its weights are damaged, or training has spoilt them: take another model or checkpoint"
            raise ModelError("the model computes NaN instead of probabilities", fix=fix)

    def _likeliest(self, index: int) -> tuple[tuple[int, float], ...]:
        """The most likely next tokens of a row whose request wants them."""
        row = self._rows[index]
        if not row.num_likeliest:
            return ()
        temperature = row.sampling.temperature
        return likeliest(self._logits[index], temperature=temperature, count=row.num_likeliest)

    def _drop_ended(self) -> None:
        """Drop requests whose answers have all ended; after the last one free all memory."""
        self.requests = [r for r in self.requests if any(row.stop is None for row in r.rows)]
        if not self.requests:
            self.clear()

    def _advance(self, ids: Tensor) -> None:
        """Compute the logits after the chosen tokens; ended rows leave once they are an eighth of all."""
        assert self._cache is not None, "rows were added before"
        kept = [index for index, row in enumerate(self._rows) if row.stop is None]
        if (len(self._rows) - len(kept)) * 8 >= len(self._rows):
            self._rows = [self._rows[index] for index in kept]
            chosen = torch.tensor(kept, device=ids.device)
            self._cache.keep(chosen)
            ids = ids[chosen]
            self._rows_changed()
        positions = (self._starts + self._cache.row_lengths).expand(3, -1)
        self._cache.begin_step()
        states, routes = self._computed(ids, positions, plan=self._cache)
        for row, experts in zip(self._rows, routes, strict=False):
            if row.stop is None:
                row.routes.append(experts)
        self._logits = self._vlm.logits(states)
        self._cache.end_step()


def _by_tokens(requests: Sequence[DecodeRequest], budget: int) -> list[list[DecodeRequest]]:
    """Split into runs of at most `budget` prompt tokens (at least one prompt each)."""
    chunks: list[list[DecodeRequest]] = []
    used = budget
    for request in requests:
        if used + len(request.prompt.ids) > budget:
            chunks.append([])
            used = 0
        chunks[-1].append(request)
        used += len(request.prompt.ids)
    return chunks
