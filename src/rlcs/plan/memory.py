"""Bytes that a training step needs, from what each layer keeps for its backward pass.

The counts follow the code that runs (transformers' layers under our attention and head) and are
compared with measured peaks in `tests/test_plan_memory.py`. Letters: h hidden size, i intermediate
size, k key-value width, e bytes of an activation.
"""

from collections.abc import Collection
from dataclasses import dataclass

from rlcs.plan.shapes import Sizes
from rlcs.policy import LOGIT_CHUNK
from rlcs.recipe.section import Part

FP32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one forward pass is given: tokens of the pack, tokens with a loss, image patches."""

    tokens: int
    targets: int
    patches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Passing:
    """How activations are kept: bytes of each, recomputed or not, which parts train (by `adapters`?)."""

    element: int
    checkpointing: bool
    trains: Collection[Part]
    adapters: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """`kept` lies there until the backward pass has used it; `working` comes and goes with a layer."""

    kept: int
    working: int


def language_layer(sizes: Sizes, how: Passing) -> int:
    """Bytes that one layer of the language model keeps for each token.

    Two norms keep their input in fp32, the normalised input and their output: h (8 + 4e); attention
    keeps queries, keys, values, output and log-sum-exp: e (2h + 2k) + 4 heads; the MLP keeps gate,
    its SiLU, up and their product: 4ie. With adapters frozen weights keep neither normalised inputs
    nor their own, but each adapter (fp32) its input: as it is, or a copy in fp32.
    """
    text, element = sizes.text, how.element
    hidden, heads = text.hidden_size, text.num_attention_heads
    width = text.num_key_value_heads * (hidden // heads)
    attention = element * (2 * hidden + 2 * width) + FP32 * heads
    if not how.adapters:
        return int(hidden * (2 * FP32 + 4 * element) + attention + 4 * text.intermediate_size * element)
    copies = 2 if element == FP32 else 6  # of the inputs of q, k, v, o, gate and up
    kept = hidden * (2 + copies) + text.intermediate_size
    return int(FP32 * kept + attention + 3 * text.intermediate_size * element)


def vision_block(sizes: Sizes, how: Passing) -> int:
    """Bytes that one block of the vision tower keeps for each patch.

    As `language_layer`, but values stay inside the joint (3h) projection, and the outputs of the
    windows are kept apart and joined: e 7h in place of e (2h + 2k). With adapters no less.
    """
    vision, element = sizes.vision, how.element
    norms = vision.hidden_size * (2 * FP32 + 4 * element)
    attention = 7 * vision.hidden_size * element + FP32 * vision.num_heads
    return int(norms + attention + 4 * vision.intermediate_size * element)


def activations(sizes: Sizes, load: Load, how: Passing) -> Activations:
    """What one pack keeps, and the most that comes and goes beside it, in bytes on one device."""
    text, vision, e = sizes.text, sizes.vision, how.element
    tower = "vision_tower" in how.trains
    merger = tower or "merger" in how.trains
    layer, block = language_layer(sizes, how), vision_block(sizes, how)
    stays = (text.hidden_size * e, vision.hidden_size * e) if how.checkpointing else (layer, block)
    kept = load.tokens * (text.num_hidden_layers * stays[0] + text.hidden_size * (FP32 + e))
    kept += load.targets * text.hidden_size * e
    if merger:
        kept += load.patches * vision.hidden_size * (FP32 + 4 * e)
    if tower:
        pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        kept += load.patches * (vision.depth * stays[1] + pixels * e)
    working = [_head(sizes, load, how)]
    working.append(load.tokens * _in_passing(text.hidden_size, text.intermediate_size, layer, how))
    if tower:
        working.append(load.patches * _in_passing(vision.hidden_size, vision.intermediate_size, block, how))
    return Activations(kept=kept, working=max(working))


def _in_passing(hidden: int, intermediate: int, layer: int, how: Passing) -> int:
    """A layer's backward pass, each token: the gradients under way, and its activations if recomputed."""
    element = FP32 if how.adapters else how.element
    return (hidden + intermediate) * element + (layer if how.checkpointing else 0)


def _head(sizes: Sizes, load: Load, how: Passing) -> int:
    """One chunk of logits, with three fp32 tensors of its size, and the chunk's gradient of the head."""
    vocabulary = sizes.text.vocab_size
    rows = min(load.targets, max(1, LOGIT_CHUNK // vocabulary))
    trains = "language_model" in how.trains and not how.adapters
    return int(vocabulary * (3 * FP32 * rows + (sizes.text.hidden_size * how.element if trains else 0)))


def update_peak(gradients: float, held: Activations, *, packs: int) -> float:
    """Gradients and activations at their worst: with one pack the ones grow while the others shrink."""
    if packs == 1:
        return max(gradients, held.kept) + held.working
    return gradients + held.kept + held.working
