"""The recipe's sections on how a run is carried out: adapters, many processes, trackers."""

from typing import Literal

from pydantic import model_validator

from rlcs.errors import UserError
from rlcs.recipe.section import Part, Positive, Seconds, Section, Whole


class Lora(Section):
    """LoRA (arXiv 2106.09685) in both stages. Off unless `rank` is above zero.

    There is no dropout on purpose: the policy that is trained would differ from the one that sampled.
    """

    rank: Whole = 0
    """Rank of every adapter; 0: no adapters, the weights themselves train."""
    alpha: Positive = 32
    """The output of an adapter is scaled by alpha / rank."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead, which suits high ranks (arXiv 2312.03732)."""
    parts: tuple[Part, ...] = ("language_model",)
    """Parts of the model that get adapters, without those that a stage freezes; nothing else trains."""
    targets: tuple[str, ...] = ()
    """Linear layers that get adapters, by the last word of their name (`q_proj`). Empty: all of the parts."""
    four_bit: bool = False
    """QLoRA (arXiv 2305.14314): the frozen language model in 4 bits while it trains; needs bitsandbytes."""

    @model_validator(mode="after")
    def _four_bits_need_adapters(self) -> "Lora":
        if self.four_bit and not self.rank:
            raise ValueError("four_bit keeps the weights frozen: set lora.rank, such as 16")
        return self


class Parallel(Section):
    """How processes (ranks), of `torchrun` or started by the run itself, share a run and its model."""

    processes: Positive | Literal["auto"] = "auto"
    """Processes of this machine, each with its share of the cores, where no `torchrun` starts them. `auto`:
    on Linux without GPUs one for each physical core, eight at most and as many as fit into memory, for a
    model of up to 1 GiB that is on the disk and is sampled by the local engine; else, or with
    `OMP_NUM_THREADS` set, one. On CPUs each has a copy of the model, unless other keys here ask for shards.
    Results change by rounding alone."""
    compute_dtype: Literal["same", "bfloat16", "float32"] = "same"
    """Number format of gathered weights and activations; `same`: that of `model.dtype`. With
    `model.dtype=float32` and `bfloat16` here, weights and optimiser stay exact and the work is fast."""
    reduce_dtype: Literal["same", "bfloat16", "float32"] = "same"
    """Number format in which gradients are summed over ranks; `same`: that of the computation."""
    reference_dtype: Literal["same", "bfloat16", "float32"] = "same"
    """Number format in which the shards of GRPO's frozen reference are kept; `same`: that of the
    computation, in which they are used anyway, so that the results are the same bit for bit."""
    shard_size: Positive | None = None
    """Neighbouring ranks that share one copy of the weights and optimiser; others hold further copies, and
    only gradients pass between them. Null, or more than there are: all ranks share one. On several nodes
    the number of GPUs of a node, if a copy fits there."""
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after the forward pass and gather them again for the backward
    pass: less memory, half as much traffic again."""
    cpu_offload: bool = False
    """Keep each rank's weights, gradients and optimiser state in main memory, where AdamW runs too; a GPU
    holds only the layers in use. For models that do not fit otherwise: every pass copies the weights."""
    timeout_s: Seconds = 1800.0
    """Seconds that a rank waits for the others before the run ends with an error."""

    @property
    def of_shards(self) -> dict[str, bool]:
        """The keys that only a sharded model can have, and whether they are set."""
        keys = ("compute_dtype", "reduce_dtype", "reference_dtype", "cpu_offload")
        return {key: getattr(self, key) not in ("same", False) for key in keys}


class Trackers(Section):
    """Services that also get the metrics. None changes the run, and a run goes on when one fails."""

    tensorboard: bool = False
    """Event files in RUN/STAGE/tensorboard (`pip install tensorboard`)."""
    trackio: str | None = None
    """A project of trackio, kept on this machine (`pip install trackio`)."""
    wandb: str | None = None
    """A project of Weights & Biases (`pip install wandb`); `WANDB_MODE=offline` works."""


def ranks_per_copy(size: int, shard_size: int | None) -> int | None:
    """The number of ranks that share one copy of a model; None: all `size` of them.

    Raises UserError when `shard_size` does not divide `size`.
    """
    if shard_size is None or shard_size >= size:
        return None
    if size % shard_size:
        raise UserError(
            f"{size} ranks cannot be divided into groups of {shard_size}",
            where="parallel.shard_size",
            fix="choose the number of GPUs of one node, which divides that of all; or leave the key out",
        )
    return shard_size
