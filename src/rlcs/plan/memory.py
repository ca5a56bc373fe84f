"""Counts the bytes of a training step, from the tensors that each layer keeps for its backward pass.

The counts follow the code (transformers' layers with the attention and head of rlcs, FSDP2's buffers) and
are compared with measured peaks in `tests/test_plan_memory.py`, and with whole steps of published models on
tensors without content in `tests/test_plan_placement.py`. Letters: h hidden size, i intermediate size, k
key-value width, e bytes of an activation.
"""

from collections.abc import Collection
from dataclasses import dataclass

from rlcs.engines.cache import head_size
from rlcs.model.policy import LOGIT_CHUNK
from rlcs.plan.machine import FP32
from rlcs.plan.shapes import Sizes
from rlcs.recipe.section import Part


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """The input of one forward pass: tokens of the pack, tokens with a loss, image patches."""

    tokens: int
    targets: int
    patches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Passing:
    """How activations are kept: bytes of each, recomputed or not, parts that train, by adapters or not."""

    element: int
    checkpointing: bool
    trains: Collection[Part]
    adapters: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes that stay until the backward pass has used them (`kept`), and those of a part at work.

    The head works while all is kept and no layer has been passed; then one `layer` after the other.
    """

    kept: int
    head: int
    layer: int

    @property
    def working(self) -> int:
        """Bytes of the part that needs most."""
        return max(self.head, self.layer)


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """Bytes of a sharded model besides shards: gathered weights, and gradients that are not yet sharded.

    `gathered`: the root's weights, and those of a layer in its backward pass with the next one's. `layer`: a
    layer's gradients while they are made, and the ones before while they are summed over ranks. The root's
    gradients are summed last, when nothing is gathered any more: `waiting` is what there is of them until
    then, `root` what they take when they are summed, `root_shard` the result.
    """

    gathered: float = 0.0
    layer: float = 0.0
    waiting: float = 0.0
    root: float = 0.0
    root_shard: float = 0.0


def language_layer(sizes: Sizes, how: Passing) -> int:
    """Bytes that one layer of the language model keeps for each token.

    Two norms keep their input in fp32, the normalised input and their output: h (8 + 4e); attention
    keeps queries (a wide), keys, values, output and log-sum-exp: e (2a + 2k) + 4 heads, and where queries
    and keys are normalised those norms (a + k) (4 + 2e); the MLP keeps gate, its SiLU, up and their
    product: 4ie. With adapters frozen weights keep neither normalised inputs
    nor their own, but adapters keep theirs: the outputs of both norms, and the tensors named last.
    """
    text, element = sizes.text, how.element
    hidden, heads, size = text.hidden_size, text.num_attention_heads, head_size(text)
    width = (heads + text.num_key_value_heads) * size
    attention = 2 * element * width + FP32 * heads
    attention += width * (FP32 + 2 * element) if sizes.normed_heads else 0
    if not how.adapters:
        return int(hidden * (2 * FP32 + 4 * element) + attention + 4 * text.intermediate_size * element)
    return int(hidden * (2 * FP32 + 2 * element) + attention + 4 * text.intermediate_size * element)


def vision_block(sizes: Sizes, how: Passing) -> int:
    """Bytes that one block of the vision tower keeps for each patch.

    As `language_layer`, but values are copied out of the joint (3h) projection, and on a CPU the outputs of
    windows are kept apart and joined: e 5h in place of e (2a + 2k). Layer norms (in families without
    windows) keep no fp32. Adapters save nothing.
    """
    tower, element = sizes.vision, how.element
    norms = tower.hidden * ((2 * FP32 if tower.window else 0) + 4 * element)
    attention = 5 * tower.hidden * element + FP32 * tower.heads
    return int(norms + attention + tower.mlp_keeps * tower.intermediate * element)


def token_keeps(sizes: Sizes, how: Passing) -> int:
    """Bytes that all layers of the language model and its last norm keep for each token."""
    text, element = sizes.text, how.element
    layer = text.hidden_size * element if how.checkpointing else language_layer(sizes, how)
    norm = FP32 + (0 if how.adapters else element)
    return int(text.num_hidden_layers * layer + text.hidden_size * norm)


def activations(sizes: Sizes, load: Load, how: Passing) -> Activations:
    """Bytes of activations of one pack on one device."""
    text, vision, e = sizes.text, sizes.vision, how.element
    tower = "vision_tower" in how.trains
    merger = tower or "merger" in how.trains
    layer, block = language_layer(sizes, how), vision_block(sizes, how)
    kept = load.tokens * token_keeps(sizes, how)
    kept += load.targets * text.hidden_size * e
    if merger:
        exact = FP32 if vision.window and tower else 0  # the norm's input, for its gradient
        kept += load.patches * vision.mergers * vision.hidden * (exact + 4 * e)
    if tower:
        kept += load.patches * (
            vision.depth * (vision.hidden * e if how.checkpointing else block) + vision.pixels * e
        )
    working = load.tokens * _in_passing(text.hidden_size, text.intermediate_size, layer, how)
    if tower:
        in_block = load.patches * _in_passing(vision.hidden, vision.intermediate, block, how)
        working = max(working, in_block)
    return Activations(kept=kept, head=_head(sizes, load, how), layer=working)


def _in_passing(hidden: int, intermediate: int, layer: int, how: Passing) -> int:
    """Bytes of a token in a layer's backward pass: its gradients, and its activations if recomputed."""
    return (hidden + 2 * intermediate) * how.element + (layer if how.checkpointing else 0)


def _head(sizes: Sizes, load: Load, how: Passing) -> int:
    """Bytes of one chunk of logits: three fp32 tensors of its size, and the chunk's gradient of the head."""
    vocabulary = sizes.text.vocab_size
    rows = min(load.targets, max(1, LOGIT_CHUNK // vocabulary))
    trains = "language_model" in how.trains and not how.adapters
    return int(vocabulary * (3 * FP32 * rows + (sizes.text.hidden_size * how.element if trains else 0)))


def update_peak(gradients: float, held: Activations, *, packs: int, units: Units = Units()) -> float:
    """Peak of gradients and activations: with one pack the former grow while the latter shrink.

    In a sharded model also of what is gathered and not yet sharded.
    """
    before = 0.0 if packs == 1 else gradients
    head = before + held.kept + held.head + units.gathered + units.waiting
    kept = max(gradients - units.root_shard, held.kept) if packs == 1 else gradients + held.kept
    layers = kept + held.layer + units.gathered + units.layer + units.waiting
    root = (gradients - units.root_shard if packs == 1 else gradients) + units.root
    return max(head, layers, root)
