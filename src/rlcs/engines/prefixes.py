"""Keeps what the model computed of prompts, for later ones that begin alike.

That is the next turn of a conversation, whose prompt begins with the one before it, and another question
about the same images. What is computed of a prompt's first tokens and images does not depend on what follows
them. What recurrent layers keep cannot go back to an earlier token, so nothing is kept of models with some.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from rlcs.engines.branches import DecodeRequest
from rlcs.engines.cache import Sources
from rlcs.engines.slots import KeyValue, Slots
from rlcs.engines.states import RowRecurrence
from rlcs.model.layout import PATH, Layout, Scope, Sight
from rlcs.records import Prompt

LEAST_TOKENS = 128
"""Shorter beginnings are computed anew, with other prompts at once."""
LEAST_SHARE = 0.5
"""So are shorter shares of a prompt."""
MOST_SCORES = 1 << 24
"""Pairs of a token of the rest and a token that it may see; attention to the rest takes memory for all."""
_RUN = 256

Key = tuple[tuple[int, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A prompt, and the keys and values (K, L, D) of its tokens by layer."""

    prompt: Prompt
    layers: Mapping[int, KeyValue]

    @property
    def key(self) -> Key:
        """What tells it from others: its tokens and its images."""
        return self.prompt.ids, tuple(ref.sha256 for ref in self.prompt.images)


class Prefixes:
    """The prompts that were used last, in at most so much memory."""

    def __init__(self, most_bytes: int) -> None:
        """None is kept yet; with 0 bytes none ever is."""
        self._most, self._bytes = most_bytes, 0
        self._kept: OrderedDict[Key, Prefix] = OrderedDict()

    def clear(self) -> None:
        """Forget all: the weights may have changed."""
        self._kept.clear()
        self._bytes = 0

    def find(self, prompt: Prompt) -> tuple[Prefix, int] | None:
        """What a prompt has in common with one that is kept, and how many tokens; None if that is little."""
        best, most = None, 0
        for prefix in self._kept.values():
            if (common := in_common(prefix.prompt, prompt)) > most:
                best, most = prefix, common
        if best is None or not _is_much(most, prompt):
            return None
        self._kept.move_to_end(best.key)
        return best, most

    def split(self, requests: Sequence[DecodeRequest]) -> tuple[list[DecodeRequest], list[DecodeRequest]]:
        """Requests whose prompts are computed whole, and those that go on from a kept one or from these."""
        if not self._most:
            return list(requests), []
        whole: list[DecodeRequest] = []
        others: list[DecodeRequest] = []
        for request in requests:
            earlier = (each.prompt for each in whole if len(each.prompt.ids) >= LEAST_TOKENS)
            begins = any(_is_much(in_common(prompt, request.prompt), request.prompt) for prompt in earlier)
            (others if begins or self.find(request.prompt) else whole).append(request)
        return whole, others

    def keep(self, prompt: Prompt, layers: Mapping[int, KeyValue], start: int, stop: int) -> None:
        """Keep a prompt, whose keys and values are those of tokens `start` to `stop` of `layers`.

        It takes the place of those that it goes on from. Those that were not used for longest leave.
        """
        if not self._most or len(prompt.ids) < LEAST_TOKENS:
            return
        parts = {layer: (key[:, start:stop], value[:, start:stop]) for layer, (key, value) in layers.items()}
        size = _num_bytes(parts)
        if size > self._most:
            return
        new = Prefix(prompt, parts)
        for key, old in list(self._kept.items()):
            if key == new.key or in_common(old.prompt, prompt) == len(old.prompt.ids):
                self._remove(key)
        while self._bytes + size > self._most:
            self._remove(next(iter(self._kept)))
        copies = {layer: (key.clone(), value.clone()) for layer, (key, value) in parts.items()}
        self._kept[new.key] = Prefix(prompt, copies)
        self._bytes += size

    def _remove(self, key: Key) -> None:
        self._bytes -= _num_bytes(self._kept.pop(key).layers)


def in_common(kept: Prompt, prompt: Prompt) -> int:
    """How many tokens of a prompt begin as the kept one does, before its own last one.

    No image is cut: some families let all of its tokens see each other.
    """
    common = _first_difference(kept.ids, prompt.ids, min(len(kept.ids), len(prompt.ids) - 1))
    images = zip(kept.spans, kept.grids, kept.images, strict=True)
    others = zip(prompt.spans, prompt.grids, prompt.images, strict=True)
    for (span, grid, ref), (other_span, other_grid, other_ref) in zip(images, others, strict=False):
        if (span, grid, ref.sha256) != (other_span, other_grid, other_ref.sha256):
            return min(common, span[0], other_span[0])
        if span[1] > common:
            return min(common, span[0])
    return min([common, *(start for start, stop in prompt.spans if start < common < stop)])


def _first_difference(a: tuple[int, ...], b: tuple[int, ...], most: int) -> int:
    """The place of the first of `most` tokens that differ, or `most`; tokens are compared many at once."""
    for start in range(0, most, _RUN):
        stop = min(start + _RUN, most)
        if a[start:stop] != b[start:stop]:
            return next(place for place in range(start, stop) if a[place] != b[place])
    return most


def _is_much(tokens: int, prompt: Prompt) -> bool:
    """Whether so many known tokens of a prompt are worth it, and its rest does not see too much at once."""
    length = len(prompt.ids)
    return tokens >= max(LEAST_TOKENS, LEAST_SHARE * length) and (length - tokens) * length <= MOST_SCORES


def _num_bytes(layers: Mapping[int, KeyValue]) -> int:
    return sum(x.numel() * x.element_size() for pair in layers.values() for x in pair)


def rest_of(prompt: Prompt, tokens: int) -> Prompt:
    """A prompt without its first tokens and their images."""
    left = [index for index, (start, _) in enumerate(prompt.spans) if start >= tokens]
    return replace(
        prompt,
        ids=prompt.ids[tokens:],
        images=tuple(prompt.images[index] for index in left),
        grids=tuple(prompt.grids[index] for index in left),
        spans=tuple((start - tokens, stop - tokens) for start, stop in (prompt.spans[i] for i in left)),
        replies=(),
    )


class ContinuingPlan:
    """A plan for the rest of a prompt whose beginning is known; keeps the keys and values of all of it."""

    def __init__(self, prefix: Prefix, tokens: int, layout: Layout, device: torch.device) -> None:
        """The first `tokens` tokens of the prompt are known; `layout` is of the whole prompt."""
        self.lengths = [layout.length]
        self.recurrence = None
        self.kept = RowRecurrence()
        self.sources = Sources()
        self.layers: dict[int, KeyValue] = {}
        self._prefix, self._tokens, self._layout = prefix, tokens, layout
        order = torch.arange(layout.length)
        self._mask = cache(
            lambda scope: Sight.of(layout, scope).visible(order[tokens:, None], order).to(device)
        )

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scope: Scope = PATH,
        scale: float | None = None,
    ) -> Tensor:
        """See `Plan`: the rest's queries over all tokens."""
        if (source := self.sources.of(layer, key)) == layer:
            known = (x[:, : self._tokens] for x in self._prefix.layers[layer])
            keys, values = (torch.cat([old, new[0]], 1) for old, new in zip(known, (key, value), strict=True))
            self.layers[layer] = keys, values
        key, value = (x[None] for x in self.layers[source])
        mask = self._mask(scope.within(self._layout))
        groups = query.shape[1] // key.shape[1]  # kernels with a mask that save memory take no groups
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    def trunks(self) -> Slots:
        """Keys and values (1, K, L, D) of the prompt."""
        return Slots({layer: (key[None], value[None]) for layer, (key, value) in self.layers.items()})
