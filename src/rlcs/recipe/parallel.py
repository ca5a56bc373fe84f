"""The recipe's section on many processes: what `torchrun` starts is one run, sharded by FSDP2."""

from typing import Annotated, Literal

from pydantic import Field

from rlcs.recipe.section import Section


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
