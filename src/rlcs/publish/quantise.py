"""Quantises weights in the format compressed-tensors, which stock transformers and vLLM recognise.

Weights are rounded to the nearest of 16 or 256 steps, with a scale for every group of inputs; no data is
needed. Computation is in the precision of the weights that are not quantised.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlcs.errors import ModelError, UserError
from rlcs.model.lora import KEPT_WHOLE

BITS = {"int8": 8, "int4": 4}
"""The forms of quantised weights, with the bits of a weight."""
GROUP = 32
"""Inputs that share a scale: few, as scales are not calibrated on data, and a divisor of the widths of the
families that rlcs trains, even where vLLM splits a 7B over 8 GPUs."""


def check(form: str) -> None:
    """Raise UserError for an unknown form or a missing package, before a model is loaded."""
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
    if any(".experts." in name for name, _ in model.named_parameters()):
        what = "of a mixture of experts nearly all weights would stay whole: its experts are no linear layers"
        fix = "export the whole model, and let vLLM round it: vllm serve --quantization fp8_per_channel"
        raise ModelError(what, where="--quantise", fix=fix)
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
    # As patterns: the compressor lists module names that differ from those of the saved model.
    compressor.quantization_config.ignore = whole
    compressor.update_config(str(out))
