"""What decoding keeps of recurrent layers: a state and the last inputs of the convolution, by row and layer.

The prefill records both at the end of every trunk; each row begins with a copy of its trunk's.
Letters in shapes: T trunks, B live rows, C channels, K taps of the convolution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rlcs.model.delta_rule import by_token
from rlcs.model.layout import Layout
from rlcs.model.recurrence import PathRecurrence


class TrunkRecurrence(PathRecurrence):
    """Recurrence over packed trunks that keeps what their rows go on from."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """`layout` is of trunks alone."""
        super().__init__(layout, device, wanted=range(len(layout.segments)))
        self._trunks = layout.segments
        self.kept = RowRecurrence()

    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        """See `Recurrence`."""
        count = weight.shape[-1] - 1
        before = torch.cat([x.new_zeros(count, x.shape[1]), x])  # trunks shorter than the taps follow zeros
        lasts = [before[t.stop : t.stop + count].clone() for t in self._trunks]
        for last, trunk in zip(lasts, self._trunks, strict=True):
            last[: max(0, count - len(trunk))] = 0
        self.kept.inputs[layer] = torch.stack(lasts)
        return super().convolve(layer, x, weight)

    def recur(self, layer: int, inputs: Sequence[Tensor]) -> Tensor:
        """See `Recurrence`."""
        output, states = self.run(inputs)
        self.kept.states[layer] = torch.stack(states)
        return output


@dataclass(kw_only=True, slots=True)
class RowRecurrence:
    """Recurrence of one more token in each row, by layer: `states` (B, ...) and `inputs` (B, K - 1, C)."""

    states: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        """See `Recurrence`; x is (B, C)."""
        window = torch.cat([self.inputs[layer], x[:, None]], 1)
        self.inputs[layer] = window[:, 1:]
        return nn.functional.conv1d(window.transpose(1, 2), weight.unsqueeze(1), groups=len(weight))[..., 0]

    def recur(self, layer: int, inputs: Sequence[Tensor]) -> Tensor:
        """See `Recurrence`; inputs are (B, ...)."""
        output, self.states[layer] = by_token(inputs, self.states[layer])
        return output

    def rows(self, chosen: Tensor) -> "RowRecurrence":
        """What rows with these indices go on from."""
        return self._each(lambda x, _: x[chosen], self)

    def append(self, other: "RowRecurrence") -> "RowRecurrence":
        """These rows, then those of another."""
        return self._each(lambda x, y: torch.cat([x, y]), other)

    def _each(self, change: Callable[[Tensor, Tensor], Tensor], other: "RowRecurrence") -> "RowRecurrence":
        return RowRecurrence(
            states={layer: change(x, other.states[layer]) for layer, x in self.states.items()},
            inputs={layer: change(x, other.inputs[layer]) for layer, x in self.inputs.items()},
        )
