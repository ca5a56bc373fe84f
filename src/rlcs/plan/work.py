"""Counts operations of passes over trees: matrix products, visible attention, logits of answers.

Letters: P trunk tokens, R answer tokens, G answers. With the trunk once the language model sees
P + G R tokens; a trainer that repeats the prompt gives it G (P + R), and the vision tower G images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlcs.engines.cache import head_size
from rlcs.plan.shapes import Tower


@dataclass(frozen=True, kw_only=True, slots=True)
class Trees:
    """`count` trees a step of `trunk` tokens with `patches` image patches and `group` answers of `answer`."""

    count: int
    trunk: int
    patches: int
    group: int
    answer: int

    @property
    def tokens(self) -> int:
        """The tokens of one tree."""
        return self.trunk + self.group * self.answer


def language(text: Any, trunk: int, lengths: Sequence[int]) -> float:
    """Operations of one forward pass over a tree: P + sum(R) tokens, logits of answers only."""
    hidden, heads = text.hidden_size, text.num_attention_heads
    size = head_size(text)
    projections = 2 * hidden * heads * size + 2 * hidden * text.num_key_value_heads * size
    layer = projections + 3 * hidden * text.intermediate_size
    tokens = trunk + sum(lengths)
    pairs = _causal(trunk) + sum(n * trunk + _causal(n) for n in lengths)
    per_layer = 2.0 * layer * tokens + 4.0 * heads * size * pairs
    logits = 2.0 * hidden * text.vocab_size * sum(lengths)
    return float(text.num_hidden_layers * per_layer + logits)


def vision(tower: Tower, patches: int) -> float:
    """Operations of the vision tower on one image: blocks (windows or the whole image), then the mergers."""
    hidden, depth = tower.hidden, tower.depth
    block = 4 * hidden * hidden + (3 if tower.window else 2) * hidden * tower.intermediate
    full = depth - tower.windowed
    pairs = patches * (full * patches + tower.windowed * min(patches, tower.window))
    merged = hidden * tower.merge**2
    mergers = tower.mergers * (merged * merged + merged * tower.output) * patches / tower.merge**2
    return float(2 * (patches * (tower.pixels * hidden + depth * block) + mergers) + 4 * hidden * pairs)


def _causal(tokens: int) -> float:
    return tokens * (tokens + 1) / 2
