"""How much faster sharing can be: floating point operations with every prompt G times and once.

Counted are the matrix products of the language model, its causal attention, the logits of answer
tokens, and the vision tower. Letters: P prompt tokens, R answer tokens, G answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.shapes import Case


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """Operations without sharing over operations with it; `padded` also counts padding as work."""

    exact: float
    padded: float


def limit_of(case: Case, config: Any) -> Limit:
    """The theoretical ratio of a forward pass, and so of a backward pass (twice a forward) and of a step.

    Prefill and decoding of a rollout do the operations of one forward pass over the same tokens.
    """
    shared = unshared = padded = 0.0
    for step in range(1, case.steps):
        problems = case.step_problems(step)
        longest_trunk = max(case.trunks[p.id] for p in problems)
        longest_answer = max(max(case.lengths[p.id]) for p in problems)
        for problem in problems:
            trunk, patches = case.trunks[problem.id], case.patches[problem.id]
            lengths = case.lengths[problem.id]
            shared += vision(config.vision_config, patches) + language(config.text_config, trunk, lengths)
            for length in lengths:
                image = vision(config.vision_config, patches)
                unshared += image + language(config.text_config, trunk, [length])
                padded += image + language(config.text_config, longest_trunk, [longest_answer])
    return Limit(exact=unshared / shared, padded=padded / shared)


def language(text: Any, trunk: int, lengths: Sequence[int]) -> float:
    """Operations of one forward pass over a tree: P + sum(R) tokens, logits for answers alone."""
    hidden, heads = text.hidden_size, text.num_attention_heads
    size = hidden // heads
    projections = 2 * hidden * heads * size + 2 * hidden * text.num_key_value_heads * size
    layer = projections + 3 * hidden * text.intermediate_size
    tokens = trunk + sum(lengths)
    pairs = _causal(trunk) + sum(n * trunk + _causal(n) for n in lengths)
    per_layer = 2.0 * layer * tokens + 4.0 * heads * size * pairs
    logits = 2.0 * hidden * text.vocab_size * sum(lengths)
    return float(text.num_hidden_layers * per_layer + logits)


def vision(tower: Any, patches: int) -> float:
    """Operations of the vision tower on one image: blocks (windows or the whole image), then the merger."""
    hidden, depth = tower.hidden_size, tower.depth
    block = 4 * hidden * hidden + 3 * hidden * tower.intermediate_size
    embed = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2 * hidden
    window = min(patches, (tower.window_size // tower.patch_size) ** 2)
    full = len(tower.fullatt_block_indexes)
    pairs = patches * (full * patches + (depth - full) * window)
    merged = hidden * tower.spatial_merge_size**2
    merger = (merged * merged + merged * tower.out_hidden_size) * patches / tower.spatial_merge_size**2
    return float(2 * (patches * (embed + depth * block) + merger) + 4 * hidden * pairs)


def _causal(tokens: int) -> float:
    return tokens * (tokens + 1) / 2
