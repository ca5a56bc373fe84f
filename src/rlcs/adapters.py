"""Low-rank adapters through peft: attach them to a model, and fold them into a plain one.

peft replaces linear layers inside the model by layers that add their adapter's output. The model
stays the same object, with the same parts under the same names, so that packs, engines and
attention do not know of adapters; peft's own handle serves to switch them off and to save them.
"""

import copy
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from rlcs.errors import RecipeError
from rlcs.recipe.lora import Lora

if TYPE_CHECKING:
    from peft import PeftModel

KEPT_WHOLE = ["visual", "lm_head"]
"""Modules that QLoRA leaves in their own number format: small, and what they lose hurts most."""


def attach(model: PreTrainedModel, settings: Lora, parts: Sequence[str], *, seed: int) -> "PeftModel":
    """Put adapters into the linear layers below `parts` (patterns on names); nothing else trains then.

    A new adapter adds exactly zero. Raises RecipeError if `settings.targets` matches no layer.
    """
    import peft

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [n for n in linear if any(re.search(part, f"{n}.") for part in parts) and "lm_head" not in n]
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
    return peft.get_peft_model(model, config)


def four_bit(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs to load a model in 4 bits. Raises RecipeError without bitsandbytes."""
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


def merged(adapter: "PeftModel") -> PreTrainedModel:
    """A plain model on the CPU, without adapters, that says what the adapted one says.

    The adapted model is not touched. 4-bit weights become plain ones, as they were computed with.
    """
    from peft.utils import get_base_model_state_dict

    model: Any = adapter.get_base_model()
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    weights = get_base_model_state_dict(adapter) | _folded(model)
    wanted = plain.state_dict().keys()
    plain.load_state_dict({name: weights[name].detach().cpu() for name in wanted}, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _folded(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all linear layers, with what their adapters add."""
    from peft.utils.integrations import dequantize_module_weight

    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            own = name.removesuffix(".base_layer")
            weight = dequantize_module_weight(module).detach()
            if own != name:
                layer: Any = model.get_submodule(own)
                delta = layer.get_delta_weight(layer.active_adapters[0]).detach()
                weight = (weight.float() + delta.float()).to(weight.dtype)
            weights[f"{own}.weight"] = weight.cpu()  # one layer at a time: a GPU may have no room for all
    return weights
