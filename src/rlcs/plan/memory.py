"""Counts the bytes of a training step, from the tensors that each layer keeps for its backward pass.

The counts follow the code (transformers' layers with the attention and head of rlcs, FSDP2's buffers) and
are compared with measured peaks in `tests/test_plan_memory.py`, and with whole steps of published models on
tensors without content in `tests/test_plan_placement.py`. Letters: h hidden size, i intermediate size, k
key-value width, e bytes of an activation.
"""

from collections.abc import Collection
from dataclasses import dataclass

from rlcs.model.chunks import DELTA_CHUNK, LOGIT_CHUNK
from rlcs.plan.layers import Attention, DeltaNet, Layer
from rlcs.plan.machine import FP32
from rlcs.plan.shapes import Sizes
from rlcs.plan.towers import Tower
from rlcs.recipe.section import Part

ROUTED = 40
"""Bytes of indices and shares for each expert that a token is sent to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """The input of one forward pass: tokens of the pack, tokens with a loss, image patches."""

    tokens: int
    targets: int
    patches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Passing:
    """How activations are kept: bytes of each, recomputed or not; parts that train, by adapters or not.

    `experts`: whether those of a mixture train too.
    """

    element: int
    checkpointing: bool
    trains: Collection[Part]
    adapters: bool = False
    experts: bool = True


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


def language_layer(layer: Layer, hidden: int, how: Passing) -> int:
    """Bytes that one layer of the language model keeps for each token.

    A norm keeps its input in fp32 and the normalised input (for the gradient of its weight, so not with
    adapters, which keep frozen weights), and linear layers keep what they are `fed`: h (8 + 4e) of two
    ordinary norms. The MLP keeps gate, its activation, up and their product: 4ie; so does every expert that a
    token is sent to, with its input and output.
    """
    e, trained = how.element, not how.adapters
    normalised = _normalised(layer.exact, how)
    norms = hidden * (layer.norms * (FP32 + normalised) + layer.fed * e)
    mlp = 4 * layer.dense * e + 3 * layer.side * e
    if layer.routed:
        trained = trained and how.experts
        an_expert = (1 + trained) * hidden + (3 + trained) * layer.expert
        # A shared expert keeps its output; a router that normalises does so in fp32.
        beside = FP32 if layer.router_norm else e if layer.dense else 0
        mlp += e * layer.chosen * an_expert + beside * hidden + FP32 * layer.routed + ROUTED * layer.chosen
    mixer = layer.mixer
    mixing = _attention(mixer, normalised, e) if isinstance(mixer, Attention) else _delta_net(mixer, e)
    return int(norms + mixing + mlp)


def _normalised(exact: bool, how: Passing) -> int:
    """Bytes of a number that a norm keeps to train its weight."""
    return 0 if how.adapters else FP32 if exact else how.element


def _attention(mixer: Attention, normalised: int, e: int) -> int:
    """Queries (a wide), keys, values, output, log-sum-exp: e (2a + 2k) + 4 heads; then norms and a gate."""
    keys = mixer.keys if mixer.own else 0  # those of an earlier layer are there once
    kept = e * (2 * mixer.queries + 2 * keys) + FP32 * mixer.heads
    if mixer.norms:
        kept += (mixer.queries + keys) * (FP32 + normalised) + (keys * FP32 if mixer.norms == 3 else 0)
    if mixer.doubled:  # the gate, the output in its order, their product; in fp32 a norm keeps both halves
        kept += mixer.queries * (3 * e + (e if e == FP32 else 0))
    return kept


def _delta_net(mixer: DeltaNet, e: int) -> int:
    """What `model.delta_rule` and the layer around it keep, the rule in fp32.

    Of queries, keys and values (c together, v of them values): inputs and outputs of the convolution and
    their activation, 3ce; the norm of the output and its gate, v (12 + 3e). The rule keeps queries and keys
    twice, values four times, three tensors of keys repeated for all heads of values, four matrices over the
    pairs of a chunk a head, and the state before each chunk.
    """
    together, repeated = 2 * mixer.keys + mixer.values, mixer.heads * mixer.key_size
    tokens = 4 * mixer.keys + 4 * mixer.values + 3 * repeated
    chunks = 4 * DELTA_CHUNK * mixer.heads + mixer.state / DELTA_CHUNK
    around = 3 * together * e + mixer.values * (3 * FP32 + 3 * e)
    return int(around + FP32 * (tokens + chunks))


def vision_block(tower: Tower, how: Passing) -> int:
    """Bytes that one block of the vision tower keeps for each patch.

    As `language_layer`, but in most families values are copied out of the joint (3h) projection, and on a CPU
    the outputs of windows are kept apart and joined: e 5h in place of e (2a + 2k). Layer norms keep no fp32.
    Adapters save nothing.
    """
    e, hidden = how.element, tower.hidden
    normalised = FP32 if tower.exact else e
    norms = tower.norms * (FP32 + normalised) + 2 * e if tower.rms else 2 * tower.norms * e
    heads = tower.attention_norms * (FP32 + normalised)
    attention = hidden * (tower.attention_keeps * e + heads) + FP32 * tower.heads
    return int(norms * hidden + attention + tower.mlp_keeps * tower.intermediate * e)


def token_keeps(sizes: Sizes, how: Passing) -> int:
    """Bytes that all layers of the language model and its last norm keep for each token."""
    hidden, e = sizes.hidden, how.element
    kept = 0
    for layer, count in sizes.layers.items():
        a_layer = hidden * e if how.checkpointing else language_layer(layer, hidden, how)
        normalised = _normalised(layer.exact, how)
        # Per-layer inputs are normalised for all layers at once, before the first.
        kept += count * (a_layer + (layer.side * (FP32 + normalised + e)))
    return int(kept + hidden * (FP32 + max(_normalised(layer.exact, how) for layer in sizes.layers)))


def activations(sizes: Sizes, load: Load, how: Passing) -> Activations:
    """Bytes of activations of one pack on one device."""
    hidden, vision, e = sizes.hidden, sizes.vision, how.element
    tower = "vision_tower" in how.trains
    merger = tower or "merger" in how.trains
    block = vision_block(vision, how)
    kept = load.tokens * token_keeps(sizes, how)
    kept += load.targets * hidden * e
    if merger:
        exact = FP32 if vision.rms and tower else 0  # the norm's input, for its gradient
        kept += load.patches // vision.merge**2 * vision.features * (exact + 4 * e)
    if tower:
        kept += load.patches * (
            vision.depth * (vision.hidden * e if how.checkpointing else block) + vision.pixels * e
        )
    working = max(_layer_in_passing(layer, hidden, load.tokens, how) for layer in sizes.layers)
    if tower:
        in_block = load.patches * _in_passing(vision.hidden, vision.intermediate, block, how)
        working = max(working, in_block)
    return Activations(kept=kept, head=_head(sizes, load, how), layer=working)


def _layer_in_passing(layer: Layer, hidden: int, tokens: int, how: Passing) -> int:
    """Of all tokens; and the gradient of the experts' gate and up, which is made transposed and copied."""
    learns = how.experts and not how.adapters and "language_model" in how.trains
    copied = 2 * layer.experts // 3 * how.element if learns else 0
    return tokens * _in_passing(hidden, layer.intermediate, language_layer(layer, hidden, how), how) + copied


def _in_passing(hidden: int, intermediate: int, layer: int, how: Passing) -> int:
    """Bytes of a token in a layer's backward pass: its gradients, and its activations if recomputed."""
    return (hidden + 2 * intermediate) * how.element + (layer if how.checkpointing else 0)


def _head(sizes: Sizes, load: Load, how: Passing) -> int:
    """Bytes of one chunk of logits: three fp32 tensors of its size, and the chunk's gradient of the head."""
    vocabulary = sizes.vocabulary
    rows = min(load.targets, max(1, LOGIT_CHUNK // vocabulary))
    trains = "language_model" in how.trains and not how.adapters
    return int(vocabulary * 3 * FP32 * rows + (sizes.head * how.element if trains else 0))


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
