"""Weights in fewer bits, in the format that stock transformers and vLLM recognise: compressed-tensors.

Rounded to the nearest of 16 or 256 steps, a scale for every group of inputs; no data is needed. Answers are
computed in the precision of what stays whole.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlcs.errors import ModelError, UserError
from rlcs.model.lora import KEPT_WHOLE

BITS = {"int8": 8, "int4": 4}
"""Bits of a weight by the names of the forms."""
GROUP = 32
"""Inputs that share a scale: few, because nothing is calibrated, and a divisor of the widths of the families
that rlcs trains, also where vLLM splits a 7B over 8 GPUs."""


def check(form: str) -> None:
    """Raises UserError where the form is unknown or the package is missing, before a model is loaded."""
    if form not in BITS:
        raise UserError(f"no quantised form {form!r}", where="--quantise", fix=f"use {', '.join(BITS)}")
    if find_spec("compressed_tensors") is None:
        what = "quantised weights need the package compressed-tensors"
        raise UserError(what, where="--quantise", fix="pip install 'rlcs[quantise]', or leave --quantise out")


def save(model: Any, form: str, out: Path) -> None:
    """Quantise the language model's linear layers, in place, and write weights and configuration into `out`.

    The vision tower, the embeddings and the head stay whole. Raises ModelError.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    if hasattr(model.config, "quantization_config"):
        raise ModelError("the model is quantised already", where="--quantise", fix="export the whole model")
    args = QuantizationArgs(num_bits=BITS[form], strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    whole = [f"re:.*{part}.*" for part in KEPT_WHOLE]
    apply_quantization_config(model, QuantizationConfig(config_groups={"linear": scheme}, ignore=whole))
    for name, layer in model.named_modules():
        if hasattr(layer, "quantization_scheme"):
            if layer.in_features % GROUP:
                what = f"{layer.in_features} inputs are no multiple of {GROUP}"
                raise ModelError(what, where=name, fix="leave --quantise out")
            groups = layer.weight.detach().unflatten(1, (-1, GROUP))
            scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            layer.weight_scale.data.copy_(scales)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    # By pattern: the names that it read off the model are not those under which others load it.
    compressor.quantization_config.ignore = whole
    compressor.update_config(str(out))
