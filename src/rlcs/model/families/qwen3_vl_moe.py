"""Qwen3-VL's mixtures of experts (arXiv 2511.21631)."""

from rlcs.model.families.qwen3_vl import Qwen3Vl


class Qwen3VlMoe(Qwen3Vl):
    """Qwen3-VL with experts: each token is computed by the few that its layer's router chooses."""

    model_type = "qwen3_vl_moe"
    experts = r"\.mlp\.experts\."
    router = r"\.mlp\.gate\."
