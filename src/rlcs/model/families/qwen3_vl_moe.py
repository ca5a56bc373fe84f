"""Qwen3-VL's mixtures of experts (arXiv 2511.21631)."""

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

from rlcs.model.families.qwen3_vl import Qwen3Vl


class Qwen3VlMoe(Qwen3Vl):
    """Qwen3-VL with experts: each token is computed by the few that its layer's router chooses."""

    model_type = "qwen3_vl_moe"
    experts = r"\.mlp\.experts\."
    router = r"\.mlp\.gate\."

    def save_as_published(self, model: PreTrainedModel) -> None:
        """See `Family`. Published experts are transposed; transformers reads both forms, and writes one."""
        conversions = [
            each
            for each in get_model_conversion_mapping(model, add_legacy=False)
            if isinstance(each, WeightConverter)
        ]
        for operation in (operation for each in conversions for operation in each.operations):
            if isinstance(operation, Transpose):
                operation.check_dims = False
        model._weight_conversions = conversions
