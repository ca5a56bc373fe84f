"""The recipe's sections on how a run is carried out: adapters, many processes, trackers."""

from typing import Annotated, Literal

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


class Parallel(Section):
    """How ranks share a model; only the time limit matters to a run without `torchrun`."""

    compute_dtype: Literal["same", "bfloat16", "float32"] = "same"
    """Number format of gathered weights and activations; `same`: that of `model.dtype`. With
    `model.dtype=float32` and `bfloat16` here, weights and optimiser stay exact and the work is fast."""
    reduce_dtype: Literal["same", "bfloat16", "float32"] = "same"
    """Number format in which gradients are summed over ranks; `same`: that of the computation."""
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after the forward pass and gather them again for the backward
    pass: less memory, half as much traffic again."""
    cpu_offload: bool = False
    """Keep each rank's weights, gradients and optimiser state in main memory, where AdamW runs too; a GPU
    holds the layers at work alone. For models that do not fit otherwise: every pass copies the weights."""
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds that a rank waits for the others before the run ends with an error."""


class Trackers(Section):
    """Metrics for other people's dashboards; none changes the run, or hurts it when it fails."""

    tensorboard: bool = False
    """Event files in RUN/STAGE/tensorboard (`pip install tensorboard`)."""
    trackio: str | None = None
    """A project of trackio, kept on this machine (`pip install trackio`)."""
    wandb: str | None = None
    """A project of Weights & Biases (`pip install wandb`); `WANDB_MODE=offline` works."""
