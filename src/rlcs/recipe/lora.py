"""Low-rank adapters: what trains when the weights themselves do not."""

from typing import Annotated

from pydantic import Field, model_validator

from rlcs.recipe.section import Part, Positive, Section


class Lora(Section):
    """LoRA (arXiv 2106.09685) in both stages. Off unless `rank` is above zero.

    There is no dropout on purpose: it would make the policy that learns another one than the policy
    that sampled.
    """

    rank: Annotated[int, Field(ge=0)] = 0
    """Rank of every adapter; 0: no adapters, the weights themselves train."""
    alpha: Positive = 32
    """What an adapter adds is scaled by alpha / rank."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead, which suits high ranks (arXiv 2312.03732)."""
    parts: tuple[Part, ...] = ("language_model",)
    """Parts of the model that get adapters, less those that a stage freezes; nothing else trains."""
    targets: tuple[str, ...] = ()
    """Linear layers that get one, by the last word of their name (`q_proj`). None: all of the parts."""
    four_bit: bool = False
    """QLoRA (arXiv 2305.14314): the frozen language model in 4 bits while it trains; needs bitsandbytes."""

    @model_validator(mode="after")
    def _four_bits_need_adapters(self) -> "Lora":
        if self.four_bit and not self.rank:
            raise ValueError("four_bit keeps the weights frozen: set lora.rank, such as 16")
        return self
