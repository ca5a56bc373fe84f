"""The experts that computed the tokens of an answer, in a sampler whose model is a mixture of experts."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Routes:
    """Ids of `chosen` experts in each of `layers` layers for each token, in order; zeros in a layer without.

    `data` are the ids, two bytes each, the lower first.
    """

    layers: int
    chosen: int
    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Check for whole tokens."""
        if self.layers < 1 or self.chosen < 1 or len(self.data) % self._size:
            raise ValueError(f"{len(self.data)} bytes for {self.chosen} experts in {self.layers} layers")

    @property
    def _size(self) -> int:
        return 2 * self.layers * self.chosen

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.data) // self._size

    def first(self, count: int) -> "Routes":
        """Those of the first `count` tokens."""
        return Routes(layers=self.layers, chosen=self.chosen, data=self.data[: count * self._size])

    def last(self, count: int) -> "Routes":
        """Those of the last `count` tokens."""
        start = max(0, len(self) - count) * self._size
        return Routes(layers=self.layers, chosen=self.chosen, data=self.data[start:])
