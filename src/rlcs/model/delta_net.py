"""Gated delta nets that follow the paths of a pack: the linear attention of Qwen3.5 and its successors.

transformers' layer knows one sequence a row. `install` gives each such layer of a model a forward that hands
what looks back to the `recurrence` of the plan (see `model.recurrence`); without one it is transformers' own.
"""

from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class FollowsPaths(nn.Module):
    """A gated delta net of transformers with another forward; never made, but set as the class of one."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Hidden states (1, L, hidden) to outputs of the same shape."""
        plan = kwargs.pop("plan", None)
        if plan is None or plan.recurrence is None:
            output: Tensor = super().forward(hidden_states, **kwargs)
            return output
        layer: Any = self
        states = hidden_states[0]
        taps = layer.conv1d.weight[:, 0]
        mixed = plan.recurrence.convolve(layer.layer_idx, layer.in_proj_qkv(states), taps)
        sizes = [layer.key_dim, layer.key_dim, layer.value_dim]
        query, key, value = nn.functional.silu(mixed).split(sizes, -1)
        query, key = (x.unflatten(-1, (-1, layer.head_k_dim)) for x in (query, key))
        value = value.unflatten(-1, (-1, layer.head_v_dim))
        # In the format of the weights exp(A_log) may overflow, as transformers notes.
        decay = -layer.A_log.float().exp() * nn.functional.softplus(
            layer.in_proj_a(states).float() + layer.dt_bias
        )
        inputs = (query, key, value, decay, layer.in_proj_b(states).sigmoid())
        read = plan.recurrence.recur(layer.layer_idx, inputs).flatten(0, 1)
        gate = layer.in_proj_z(states).reshape(-1, layer.head_v_dim)
        result: Tensor = layer.out_proj(layer.norm(read, gate).reshape(1, len(states), -1))
        return result


def is_recurrent(config: Any) -> bool:
    """Whether some layers of a model with this configuration keep a state instead of keys and values."""
    return "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())


def install(model: PreTrainedModel) -> None:
    """Make all gated delta nets of a model follow paths."""
    for module in model.modules():
        if type(module).__name__.endswith("GatedDeltaNet") and not isinstance(module, FollowsPaths):
            module.__class__ = _following(type(module))  # type: ignore[arg-type]


@cache
def _following(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Paths{kind.__name__}", (FollowsPaths, kind), {"__module__": __name__})
