"""Decodes a batch for the local engine: prompts prefilled once, and each branch computed once.

Answers to one request that have said the same so far are one branch: one query computes the logits for all,
and each draws its next token from them with its own number. Where they draw different tokens, they part.
All queries form one flat sequence; `ForestCache` gives each its prompt and its branch's tokens. Every
request has its own sampling settings, limit and stop strings, and joins and leaves while others go on.

Letters in shapes: Q queries, M the most answers that any of their branches has, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlcs.engines.branches import Branch, DecodeRequest, Likeliest, Row
from rlcs.engines.cache import ForestCache, Prefill, RecordingPlan
from rlcs.engines.detokenizer import Detokenizer
from rlcs.engines.drafting import Drafter, pass_cost
from rlcs.engines.prefixes import ContinuingPlan, Prefix, Prefixes, rest_of
from rlcs.engines.sampling import choose, likeliest, uniform
from rlcs.engines.slots import settled
from rlcs.errors import ModelError
from rlcs.model import attention
from rlcs.model.chat import Chat
from rlcs.model.chunks import PREFILL_TOKENS
from rlcs.model.experts import Routing
from rlcs.model.image_features import image_inputs
from rlcs.model.packing import Pack, pack
from rlcs.model.policy import hidden_states
from rlcs.model.vlm import Vlm
from rlcs.records import StopReason, rollout_seed
from rlcs.records.trees import Tree


class DecodingBatch:
    """The branches that are being decoded, with the logits (Q, V) that their answers draw the next token by.

    A branch has a query for its last token, and one for each token of its draft.
    """

    def __init__(
        self, vlm: Vlm, chat: Chat, *, keeps_routes: bool = False, prefixes: Prefixes | None = None
    ) -> None:
        """Empty: `add` requests, then `step`. `keeps_routes`: of a mixture, which experts compute what.

        `prefixes` are the prompts that were computed with the present weights.
        """
        self._vlm, self._chat, self._keeps_routes = vlm, chat, keeps_routes
        self._prefixes = prefixes or Prefixes(0)
        self.clear()

    def clear(self) -> None:
        """Drop all requests, free their memory, and forget what drafts are made of."""
        self._free()
        cost = pass_cost(self._vlm.model.config.get_text_config(), self._vlm.device.type)
        self._drafter = Drafter(cost)

    def _free(self) -> None:
        self.requests: list[DecodeRequest] = []
        self._branches: list[Branch] = []
        self._cache: ForestCache | None = None
        self._logits = torch.empty(0)

    @property
    def live(self) -> int:
        """Number of answers that are still being decoded."""
        return sum(len(branch.rows) for branch in self._branches if not branch.ended)

    def add(self, requests: Sequence[DecodeRequest]) -> None:
        """Prefill the prompts of requests, each with a branch for all of its `sampling.n` answers.

        Of a prompt that begins like one that is kept, or like another of these, the rest alone is computed.
        """
        self.requests += requests
        fresh, others = self._prefixes.split(requests)
        self._prefill_whole(fresh)
        longest = max((len(request.prompt.ids) for request in others), default=0)
        for left, request in zip(range(len(others), 0, -1), others, strict=True):
            if self._cache is not None:
                self._cache.reserve(left, longest)
            if found := self._prefixes.find(request.prompt):
                self._prefill_rest(request, *found)
            else:
                self._prefill_whole([request])

    def _prefill_whole(self, requests: Sequence[DecodeRequest]) -> None:
        device = self._vlm.device
        for chunk in _by_tokens(requests, PREFILL_TOKENS):
            trunks = pack([Tree(prompt=r.prompt, branches=()) for r in chunk], self._chat.patches)
            layout = trunks.layout
            plan = RecordingPlan(attention.make_plan(self._vlm.attention, layout, device), layout, device)
            self._prefill(chunk, trunks, plan)
            for request, trunk in zip(chunk, layout.trunks, strict=True):
                self._prefixes.keep(request.prompt, plan.layers, trunk.start, trunk.stop)

    def _prefill_rest(self, request: DecodeRequest, prefix: Prefix, tokens: int) -> None:
        """Compute a prompt behind its first tokens, which a kept prompt has, too."""
        prompt = request.prompt
        whole = pack([Tree(prompt=prompt, branches=())], self._chat.patches)
        rest = pack([Tree(prompt=rest_of(prompt, tokens), branches=())], self._chat.patches)
        rest = replace(rest, positions=whole.positions[:, tokens:])
        plan = ContinuingPlan(prefix, tokens, whole.layout, self._vlm.device)
        self._prefill([request], rest, plan)
        self._prefixes.keep(prompt, plan.layers, 0, len(prompt.ids))

    def _prefill(self, requests: Sequence[DecodeRequest], trunks: Pack, plan: Prefill) -> None:
        """Compute the prompts in a pack, or the rest of one, and open a branch for each."""
        trunks = trunks.to(self._vlm.device)
        images = image_inputs(self._vlm, trunks)
        states, routes = self._computed(trunks.ids, trunks.positions, plan=plan, **images)
        logits = self._vlm.logits(states[[trunk.stop - 1 for trunk in trunks.layout.trunks]])
        cache = ForestCache.prefilled(plan)
        for request, trunk in zip(requests, trunks.layout.trunks, strict=True):
            self._open(request, start=int(trunks.positions[:, trunk.start : trunk.stop].max()) + 1)
            request.routes = b"".join(routes[trunk.start : trunk.stop])
        if self._cache is None:
            self._cache, self._logits = cache, logits
        else:
            self._cache.append(cache)
            self._logits = torch.cat([self._logits, logits])

    def _open(self, request: DecodeRequest, *, start: int) -> None:
        sampling, prompt = request.sampling, request.prompt
        branch = Branch(request=request, start=start)
        for index in range(sampling.n):
            number = prompt.repeat * sampling.n + index
            seed = rollout_seed(sampling.seed, request.step, prompt.problem_id, number)
            detokenizer = Detokenizer(self._chat.text, request.stops)
            branch.rows.append(Row(index=index, seed=seed, branch=branch, detokenizer=detokenizer))
        request.rows += branch.rows
        self._branches.append(branch)
        if prompt.earlier:
            ids = self._chat.text_ids(prompt.earlier)
            self._drafter.recall(ids[: sampling.max_new_tokens], request.number)

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
        """Choose the next tokens of every answer, then compute the logits after them; returns how many ended.

        An answer gets one token, and further ones as long as it says what the draft of its branch says.
        """
        live = self.live
        chosen = self._choose()
        branches, sources, query = [], [], 0
        for source, branch in enumerate(self._branches):
            if not branch.ended:
                kept = self._walk(branch, query, *chosen)
                branches += kept
                sources += [source] * len(kept)
            query += 1 + len(branch.draft)
        order = settled(sources)
        self._branches = [branches[element] for element in order]
        left = self.live
        if left < live:
            self._drop_ended()
        if self._branches:
            self._advance([sources[element] for element in order], most=left)
        return live - left

    def _choose(self) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens (Q, M) that the answers of each query's branch say after it, and their logprobs."""
        owners = [branch for branch in self._branches for _ in range(1 + len(branch.draft))]
        seeds = np.zeros((len(owners), max(len(branch.rows) for branch in owners)), np.int64)
        counters = np.zeros((len(owners), 1), np.int64)
        groups: dict[tuple[float, float, tuple[int, ...]], list[int]] = {}
        query = 0
        for branch in self._branches:
            after = query + 1 + len(branch.draft)
            seeds[query:after, : len(branch.rows)] = [row.seed for row in branch.rows]
            counters[query:after, 0] = range(len(branch.ids), len(branch.ids) + after - query)
            sampling = branch.request.sampling
            key = sampling.temperature, sampling.top_p, sampling.banned_ids
            groups.setdefault(key, []).extend(range(query, after))
            query = after
        device = self._vlm.device
        draws = uniform(torch.from_numpy(seeds).to(device), torch.from_numpy(counters).to(device))
        ids = torch.empty(draws.shape, dtype=torch.long, device=device)
        logprobs = torch.empty(draws.shape, device=device)
        for (temperature, top_p, banned), queries in groups.items():
            group = slice(None) if len(groups) == 1 else queries  # all: a view, no copy of the logits
            ids[group], logprobs[group] = choose(
                self._logits[group],
                draws[group],
                temperature=temperature,
                top_p=top_p,
                banned=torch.tensor(banned, dtype=torch.long, device=device),
            )
        return ids.tolist(), logprobs.tolist()

    def _walk(
        self, branch: Branch, query: int, ids: list[list[int]], logprobs: list[list[float]]
    ) -> list[Branch]:
        """Let the answers of a branch, whose first query is `query`, say what they chose.

        Returns the branches that go on.
        """
        live: list[Branch] = []
        draft, fed, rows = branch.draft, branch.fed, branch.rows
        columns = list(range(len(rows)))
        for place in range(len(draft) + 1):
            tokens, numbers = ids[query + place], logprobs[query + place]
            branch.routes += fed[place : place + 1]
            saying: dict[int, list[int]] = {}
            for column in columns:
                saying.setdefault(tokens[column], []).append(column)
            drafted = draft[place] if place < len(draft) else None
            # Those who say what was drafted come last: they go on in this branch, and may part later.
            ordered = sorted(saying, key=lambda token: token == drafted)
            likely = self._likeliest(branch, query + place)
            for token in ordered:
                columns = saying[token]
                first = columns[0]
                if not math.isfinite(numbers[first]):
                    self._require_numbers(query + place)
                parting = token != ordered[-1]
                one = branch.parted([rows[column] for column in columns]) if parting else branch
                if not parting:
                    branch.rows = [rows[column] for column in columns]
                one.take(token, numbers[first], likely)
                self._drafter.learn(one.ids, branch.request.number)
                if parting and not one.ended:
                    live.append(one)
            if branch.ended or token != drafted:
                break
        return live if branch.ended else [branch, *live]

    def _require_numbers(self, query: int) -> None:
        """Raise ModelError where a query's logits are no numbers to choose a token by."""
        logits = self._logits[query]
        if bool(logits.isnan().any()) or not bool(logits.isfinite().any()):
            fix = "its weights are damaged, or training has spoilt them: take another model or checkpoint"
            raise ModelError("the model computes NaN instead of probabilities", fix=fix)

    def _likeliest(self, branch: Branch, query: int) -> Likeliest:
        """The most likely tokens after a query, if the branch's request wants them."""
        count, temperature = branch.request.num_likeliest, branch.request.sampling.temperature
        return likeliest(self._logits[query], temperature=temperature, count=count) if count else ()

    def _drop_ended(self) -> None:
        """Drop requests whose answers have all ended; after the last one free all memory."""
        self.requests = [r for r in self.requests if not r.finished]
        if not self.requests:
            self._free()

    def _advance(self, sources: Sequence[int], *, most: int) -> None:
        """Compute the logits after the newest tokens of all branches, which go on from these rows of cache.

        There will be at most `most` branches.
        """
        assert self._cache is not None, "branches were added before"
        device = self._vlm.device
        lengths = [len(branch.ids) - 1 for branch in self._branches]
        if not self._cache.recurrence.states:  # which cannot go back behind tokens that were wrong
            for branch in self._branches:
                branch.draft = self._drafted(branch)
        self._cache.arrange(sources, max(lengths), most=most)
        self._cache.begin_pass(lengths, [1 + len(branch.draft) for branch in self._branches], device)
        tokens, positions = list[int](), list[int]()
        for branch, length in zip(self._branches, lengths, strict=True):
            tokens += [branch.ids[-1], *branch.draft]
            first = branch.start + length
            positions += range(first, first + 1 + len(branch.draft))
        inputs = torch.tensor([tokens, positions], device=device)
        states, routes = self._computed(inputs[0], inputs[1].expand(3, -1), plan=self._cache)
        self._logits = self._vlm.logits(states)
        query = 0
        for branch in self._branches:
            after = query + 1 + len(branch.draft)
            branch.fed = routes[query:after]
            query = after

    def _drafted(self, branch: Branch) -> list[int]:
        """What the answers of a branch may say next, up to before the last token that they can."""
        sampling = branch.request.sampling
        return self._drafter.draft(
            branch.ids,
            branch.request.number,
            branches=len(self._branches),
            most=sampling.max_new_tokens - len(branch.ids) - 1,
            never=sampling.stop_ids,
        )


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
