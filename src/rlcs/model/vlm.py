"""A loaded vision-language model: weights, processor, device, and calls that work when it is sharded."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlcs.distributed import ALONE, World
from rlcs.errors import ModelError
from rlcs.model.families.family import Family

if TYPE_CHECKING:
    from peft import PeftModel

T = TypeVar("T")


class ShardedModel(Protocol):
    """The root of a model whose weights lie in shards on all ranks (see `model.fsdp`)."""

    def run(self, work: Callable[[], T]) -> T:
        """Do work that calls the model; all ranks in step."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """Hold all weights on every rank, so that ranks need not keep in step; no gradients."""
        ...


@dataclass(frozen=True, kw_only=True)
class Vlm:
    """A model with its processor, ready for packs; under `torchrun` in shards (`fsdp_root`) over `world`.

    `adapter` is peft's model object for the low-rank layers inside `model`, if those train; `reference_mode`
    scores without them: the reference of GRPO. `frozen_tower` stands for the weights of a vision tower that
    does not train, and is the same object in a copy of the model; None: it trains. `fused_loss`: logprobs are
    computed by `linear_logprobs`. `router_loss` is the weight of a mixture's load balancing loss; 0: none.
    """

    model: PreTrainedModel
    processor: Any
    family: Family
    attention: str
    device: torch.device
    adapter: "PeftModel | None" = None
    reference_mode: bool = False
    frozen_tower: object | None = None
    fused_loss: bool = False
    router_loss: float = 0.0
    world: World = ALONE
    fsdp_root: ShardedModel | None = None

    @property
    def softcap(self) -> float | None:
        """The bound c of logits, which are c tanh(x / c) of what the head computes; None: there is none."""
        cap: float | None = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return cap

    def logits(self, states: Tensor) -> Tensor:
        """Logits (N, V) of hidden states (N, C), as the model's own forward computes them."""
        logits: Tensor = self.model.get_output_embeddings()(states)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def scoring(self) -> AbstractContextManager[None]:
        """Context to score in: adapters are off if `reference_mode`."""
        if self.adapter is None or not self.reference_mode:
            return nullcontext()
        return self.adapter.disable_adapter()

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable parameters by name; tied weights once."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def run(self, work: Callable[[], T]) -> T:
        """Do work that calls the model, with its weights gathered; it returns a tensor or a tuple of them.

        All ranks must call this equally often, in the same order, with or without images.
        """
        return work() if self.fsdp_root is None else self.fsdp_root.run(work)

    def gathered(self) -> AbstractContextManager[None]:
        """Hold all weights on every rank, so that ranks need not keep in step; no gradients."""
        return nullcontext() if self.fsdp_root is None else self.fsdp_root.gathered()


@torch.no_grad()
def require_alive(model: nn.Module, name: str) -> None:
    """Raise ModelError for weights that are NaN or infinite, or all zero: such a model says nothing."""
    tensors = {
        key: p
        for key, p in model.named_parameters()
        if p.dtype.is_floating_point and p.dtype.itemsize > 1 and p.numel()
    }
    largest = torch.stack([each.float() for each in torch._foreach_norm(list(tensors.values()), math.inf)])
    fix = "the files are damaged, or training has spoilt them: take another model or checkpoint"
    if not bool(largest.isfinite().all()):
        key = list(tensors)[int(largest.isfinite().logical_not().nonzero()[0])]
        raise ModelError(f"the weights {key} are not all finite", where=f"model.name={name}", fix=fix)
    matrices = [size for size, p in zip(largest.tolist(), tensors.values(), strict=True) if p.dim() >= 2]
    if matrices and not any(matrices):
        raise ModelError("all weights are zero", where=f"model.name={name}", fix=fix)
