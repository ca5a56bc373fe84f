"""The in-process engine: prompts prefilled once, branched G times, finished rows dropped and refilled.

It samples from the very model that trains, so there is nothing to synchronise. All live rows form
one flat sequence of queries; `ForestCache` gives each its trunk and its own tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlcs.engines.base import Progress
from rlcs.engines.cache import ForestCache, RecordingPlan
from rlcs.engines.onednn_linear import packed
from rlcs.engines.sampling import choose, uniform
from rlcs.model import attention
from rlcs.model.chat import Chat
from rlcs.model.packing import pack
from rlcs.model.policy import hidden_states, image_inputs
from rlcs.model.vlm import Vlm
from rlcs.records import Prompt, Rollout, Sampling, StopReason, Tree, rollout_seed

PREFILL_TOKENS = 16384
"""Trunk tokens prefilled in one forward pass."""


@dataclass
class _Row:
    """One rollout in the making: `place` of its prompt in the request, `start` of its positions."""

    place: int
    prompt: Prompt
    index: int
    seed: int
    start: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop: StopReason | None = None


class LocalEngine:
    """Samples from `vlm` in this process."""

    def __init__(self, vlm: Vlm, chat: Chat, *, max_rows: int) -> None:
        """`max_rows` rollouts are decoded at once (a group is never split, so at least one group)."""
        self._vlm = vlm
        self._chat = chat
        self._max_rows = max_rows

    def sync(self) -> None:
        """Nothing to do: see above."""

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        step: int = 0,
        progress: Progress | None = None,
    ) -> list[tuple[Rollout, ...]]:
        """See `Engine.sample`. The model is left in the mode (train or eval) in which it was.

        With a sharded model all ranks must call this, each with its own prompts (or none).
        """
        was_training = self._vlm.model.training
        self._vlm.model.eval()
        groups: list[list[Rollout | None]] = [[None] * sampling.n for _ in prompts]
        waiting = list(enumerate(prompts))[::-1]
        batch = _Batch(self._vlm, self._chat, sampling, step)
        with self._vlm.gathered(), packed(self._vlm.model):
            while waiting or batch.rows:
                free = self._max_rows - batch.live
                if waiting and (not batch.live or free >= max(sampling.n, self._max_rows // 4)):
                    batch.add([waiting.pop() for _ in range(min(len(waiting), max(1, free // sampling.n)))])
                done = batch.step()
                for row in done:
                    groups[row.place][row.index] = self._rollout(row)
                if done and progress is not None:
                    progress(len(done))
        self._vlm.model.train(was_training)
        return [tuple(r for r in group if r is not None) for group in groups]

    def _rollout(self, row: _Row) -> Rollout:
        assert row.stop is not None, "only finished rows become rollouts"
        return Rollout(
            problem_id=row.prompt.problem_id,
            index=row.index,
            ids=tuple(row.ids),
            logprobs=tuple(row.logprobs),
            stop=row.stop,
            seed=row.seed,
            text=self._chat.text(row.ids),
        )


class _Batch:
    """The rows that are being decoded, with the logits (B, V) of each row's next token."""

    def __init__(self, vlm: Vlm, chat: Chat, sampling: Sampling, step: int) -> None:
        self._vlm, self._chat, self._sampling, self._step = vlm, chat, sampling, step
        self._banned = torch.tensor(sampling.banned_ids, dtype=torch.long, device=vlm.device)
        self._cache: ForestCache | None = None
        self._logits = torch.empty(0)
        self.rows: list[_Row] = []

    @property
    def live(self) -> int:
        """Rows without a stop reason."""
        return sum(row.stop is None for row in self.rows)

    def add(self, prompts: Sequence[tuple[int, Prompt]]) -> None:
        """Prefill prompts, given with their places, and open `n` rows on each."""
        for chunk in _by_tokens(prompts, PREFILL_TOKENS):
            trunks = pack([Tree(prompt=p, branches=()) for _, p in chunk], self._chat.patches)
            trunks = trunks.to(self._vlm.device)
            plan = RecordingPlan(attention.make_plan(self._vlm.attention, trunks.layout, self._vlm.device))
            images = image_inputs(self._vlm, trunks)
            states = hidden_states(self._vlm, trunks.ids, trunks.positions, plan=plan, **images)
            ends = [span.stop - 1 for span in trunks.layout.trees]
            logits = self._head(states[ends]).repeat_interleave(self._sampling.n, dim=0)
            cache = ForestCache.prefilled(plan, trunks.layout, self._sampling.n)
            starts = [int(trunks.positions[:, s.start : s.stop].max()) + 1 for s in trunks.layout.trees]
            self._open(chunk, starts)
            if self._cache is None:
                self._cache, self._logits = cache, logits
            else:
                self._cache.append(cache)
                self._logits = torch.cat([self._logits, logits])

    def _open(self, prompts: Sequence[tuple[int, Prompt]], starts: Sequence[int]) -> None:
        for (place, prompt), start in zip(prompts, starts, strict=True):
            first = prompt.repeat * self._sampling.n
            for index in range(self._sampling.n):
                seed = rollout_seed(self._sampling.seed, self._step, prompt.problem_id, first + index)
                self.rows.append(_Row(place=place, prompt=prompt, index=index, seed=seed, start=start))

    def _head(self, states: Tensor) -> Tensor:
        logits: Tensor = self._vlm.model.get_output_embeddings()(states)
        return logits

    def step(self) -> list[_Row]:
        """Choose a token for every row, then compute the next logits; returns the rows that ended."""
        ids, logprobs = self._choose()
        ended = []
        for row, token, logprob in zip(self.rows, ids.tolist(), logprobs.tolist(), strict=True):
            if row.stop is None:
                row.ids.append(token)
                row.logprobs.append(logprob)
                row.stop = self._verdict(row)
                if row.stop is not None:
                    ended.append(row)
        self._advance(ids)
        return ended

    def _choose(self) -> tuple[Tensor, Tensor]:
        """The next token of every row, and its logprob."""
        seeds = torch.tensor([row.seed for row in self.rows], device=self._vlm.device)
        counters = torch.tensor([len(row.ids) for row in self.rows], device=self._vlm.device)
        return choose(
            self._logits,
            uniform(seeds, counters),
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            banned=self._banned,
        )

    def _verdict(self, row: _Row) -> StopReason | None:
        """Whether a row ends with its newest token, and why."""
        if row.ids[-1] in self._sampling.stop_ids:
            return StopReason.EOS
        return StopReason.LENGTH if len(row.ids) >= self._sampling.max_new_tokens else None

    def _advance(self, ids: Tensor) -> None:
        """Feed the chosen tokens; ended rows ride along until an eighth of the rows has ended."""
        assert self._cache is not None, "rows were added before"
        ended = len(self.rows) - self.live
        if ended == len(self.rows):
            self.rows, self._cache = [], None
            return
        if ended * 8 >= len(self.rows):
            kept = [i for i, row in enumerate(self.rows) if row.stop is None]
            self.rows = [self.rows[i] for i in kept]
            chosen = torch.tensor(kept, device=ids.device)
            self._cache.keep(chosen)
            ids = ids[chosen]
        starts = torch.tensor([row.start for row in self.rows], device=ids.device)
        positions = (starts + self._cache.row_lengths).expand(3, -1)
        self._cache.begin_step()
        self._logits = self._head(hidden_states(self._vlm, ids, positions, plan=self._cache))
        self._cache.end_step()


def _by_tokens(prompts: Sequence[tuple[int, Prompt]], budget: int) -> list[list[tuple[int, Prompt]]]:
    """Split into runs of at most `budget` prompt tokens (at least one prompt each)."""
    chunks: list[list[tuple[int, Prompt]]] = []
    used = budget
    for place, prompt in prompts:
        if used + len(prompt.ids) > budget:
            chunks.append([])
            used = 0
        chunks[-1].append((place, prompt))
        used += len(prompt.ids)
    return chunks
