"""Counts operations of passes over trees: matrix products, visible attention, logits of answers.

Letters: P trunk tokens, R answer tokens, G answers. With the trunk once the language model sees
P + G R tokens; a trainer that repeats the prompt gives it G (P + R), and the vision tower G images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rlcs.model.chunks import DELTA_CHUNK
from rlcs.plan.layers import Attention, Mixer
from rlcs.plan.shapes import Sizes
from rlcs.plan.towers import Tower


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


def language(sizes: Sizes, trunk: int, lengths: Sequence[int]) -> float:
    """Operations of one forward pass over a tree: P + sum(R) tokens, logits of answers only.

    Of the experts those count that a token is sent to. What tokens of an image see of those after them, in
    models that have that, does not count.
    """
    tokens = trunk + sum(lengths)
    weights = sizes.between + sum(n * layer.active for layer, n in sizes.layers.items())
    meeting = sum(n * between_tokens(layer.mixer, trunk, lengths) for layer, n in sizes.layers.items())
    return float(2 * weights * tokens + meeting + 2 * sizes.head * sum(lengths))


def between_tokens(mixer: Mixer, trunk: int, lengths: Sequence[int]) -> float:
    """Operations of one layer in which tokens of a tree meet: attention, or a recurrent state in chunks."""
    if isinstance(mixer, Attention):
        seen = _seen(trunk, mixer.window)
        pairs = seen + sum(_seen(trunk + length, mixer.window) - seen for length in lengths)
        return 4.0 * mixer.queries * pairs
    # Products of pairs of keys and queries; of their inverse, and of both with values; then with the state.
    pairs = 4 * DELTA_CHUNK * mixer.keys + mixer.heads * DELTA_CHUNK**2 + 4 * DELTA_CHUNK * mixer.values
    convolution = 2 * mixer.kernel * (2 * mixer.keys + mixer.values)
    return float((pairs + 6 * mixer.state + convolution) * (trunk + sum(lengths)))


def vision(tower: Tower, patches: int) -> float:
    """Operations of the vision tower on one image: blocks (windows or the whole image), then the mergers."""
    hidden, depth = tower.hidden, tower.depth
    block = 4 * hidden * hidden + (3 if tower.gated else 2) * hidden * tower.intermediate
    full = depth - tower.windowed
    pairs = patches * (full * patches + tower.windowed * min(patches, tower.window))
    mergers = tower.merging * patches / tower.merge**2
    return float(2 * (patches * (tower.pixels * hidden + depth * block) + mergers) + 4 * hidden * pairs)


def _seen(tokens: int, window: int) -> float:
    """Pairs of tokens of a path and those that they see: all before them, or the last `window`."""
    narrow = min(tokens, window) if window else tokens
    return narrow * (narrow + 1) / 2 + (tokens - narrow) * narrow
