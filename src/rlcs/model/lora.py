"""Attaches low-rank adapters to a model with peft, and merges them into a plain one.

peft replaces linear layers inside the model by layers that add their adapter's output. Adapters are fp32,
so that they learn in small steps, and compute in the format of their layer. The model
stays the same object, with the same parts under the same names, so that packs, engines and
attention are independent of adapters; peft's model object switches them off and saves them.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from rlcs.errors import RecipeError
from rlcs.recipe.execution import Lora

if TYPE_CHECKING:
    from peft import PeftModel

KEPT_WHOLE = [
    "visual", "vision_tower", "audio_tower",
    "multi_modal_projector", "embed_vision", "embed_audio", "lm_head",
]  # fmt: skip
"""Modules that QLoRA does not quantise: they are small, and quantising them costs the most accuracy."""


def attach(
    model: PreTrainedModel, settings: Lora, parts: Sequence[str], *, router: str | None = None, seed: int
) -> "PeftModel":
    """Put adapters into the linear layers below `parts` (patterns on names); nothing else trains then.

    A new adapter adds zero. Of a mixture of experts the `router` (a pattern, too) and the experts,
    whose weights lie in one tensor, get none. Raises RecipeError if `settings.targets` matches no
    layer, or experts.
    """
    import peft
    from peft.tuners.lora import LoraLayer

    experts = {name.rpartition(".")[2] for name, _ in model.named_parameters() if ".experts." in name}
    if refused := sorted(experts & set(settings.targets)):
        raise RecipeError(
            f"{' and '.join(refused)}: experts get no adapters",
            where="lora.targets",
            fix="leave them out, and they stay as they are; or set lora.rank=0, which trains them whole",
        )
    left_out = f"lm_head|{router}" if router else "lm_head"
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [
        n for n in linear if any(re.search(p, f"{n}.") for p in parts) and not re.search(left_out, f"{n}.")
    ]
    targets = [n for n in inside if not settings.targets or n.rpartition(".")[2] in settings.targets]
    if not targets:
        raise RecipeError(
            f"no linear layer is called {' or '.join(settings.targets)}",
            where="lora.targets",
            fix=f"there are: {', '.join(sorted({n.rpartition('.')[2] for n in inside}))}",
        )
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.rank_stabilised,
        target_modules=targets,
    )
    adapted = peft.get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for matrices in (module.lora_A, module.lora_B):
                for name in matrices:
                    matrices[name] = AdapterMatrix(matrices.get_parameter(f"{name}.weight"))
    model.disable_input_require_grads()  # peft sets it: see `checkpoint_activations`
    return adapted


class AdapterMatrix(nn.Module):
    """Multiplies by a matrix in the number format of the rows, whatever that of the matrix, which learns.

    peft copies the rows to the matrix's format instead, fp32, and keeps a copy for each adapted layer until
    the backward pass. Here layers with the same input keep that input. Gradients are added up in the matrix's
    format.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        """The matrix (outputs, inputs)."""
        super().__init__()
        self.weight = weight

    def forward(self, rows: Tensor) -> Tensor:
        """The product of each row with the matrix."""
        return nn.functional.linear(rows, self.weight.to(rows.dtype))


def four_bit(dtype: torch.dtype, device: torch.device, *, experts: bool = False) -> dict[str, Any]:
    """Arguments of `from_pretrained` to load a model in 4 bits.

    Raises RecipeError without bitsandbytes, and for a model with experts.
    """
    if experts:
        what = "of a mixture of experts nearly all weights would stay whole: its experts are no linear layers"
        raise RecipeError(what, where="lora.four_bit", fix="set lora.four_bit=false")
    if find_spec("bitsandbytes") is None:
        raise RecipeError(
            "4-bit weights need the package bitsandbytes",
            where="lora.four_bit",
            fix="pip install bitsandbytes, or set lora.four_bit=false",
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=KEPT_WHOLE,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def save(adapter: "PeftModel", folder: Path, whole: Mapping[str, Tensor]) -> None:
    """Write only the adapters, in peft's format; `whole` holds their weights by their names in the model."""
    named = {f"base_model.model.{name}": tensor for name, tensor in whole.items()}
    adapter.save_pretrained(str(folder), state_dict=named, save_embedding_layers=False)


def merged(
    adapter: "PeftModel", whole: Mapping[str, Tensor], *, reference_mode: bool = False
) -> PreTrainedModel:
    """Make a plain model on the CPU that computes the same as the adapted one, which does not change.

    `whole` are all weights of the adapted model by name. In `reference_mode` the adapters are left out. 4-bit
    weights become plain ones with the values that were used in training.
    """
    model: Any = adapter.get_base_model()
    plain = _plain(model)
    # One weight at a time: all might not fit on a GPU.
    weights = {
        name: merged_weight(model, whole, name, reference_mode=reference_mode).detach().cpu()
        for name in plain.state_dict()
    }
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def plain_names(model: PreTrainedModel) -> list[str]:
    """The names of the weights of the model without its adapters, in their order."""
    return list(_plain(model).state_dict())


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without adapters and weights."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Ours cannot be chosen before the model exists.
    config._attn_implementation = dict.fromkeys(("", "text_config", "vision_config"), "sdpa")
    with torch.device("meta"):
        plain: PreTrainedModel = type(model)(config)
    return plain


def merged_weight(
    model: nn.Module, whole: Mapping[str, Tensor], name: str, *, reference_mode: bool
) -> Tensor:
    """Compute the plain model's weight of this name, dequantised; with adapters unless `reference_mode`."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    module, _, kind = name.rpartition(".")
    layer: Any = model.get_submodule(module)
    adapted = isinstance(layer, LoraLayer)
    inner = layer.get_base_layer() if adapted else layer
    weight: Tensor = whole[f"{module}.base_layer.{kind}" if adapted else name]
    if kind == "weight" and hasattr(inner.weight, "quant_state"):
        weight = dequantize_module_weight(inner)
    if kind != "weight" or not adapted or reference_mode:
        return weight
    [adapter] = layer.active_adapters
    down, up = (whole[f"{module}.lora_{x}.{adapter}.weight"].float() for x in "AB")
    scale: float = layer.scaling[adapter]
    return (weight.float() + up @ down * scale).to(weight.dtype)
