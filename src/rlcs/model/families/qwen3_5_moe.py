"""The mixtures of experts of Qwen3.5 and Qwen3.6."""

from rlcs.model.families.qwen3_5 import Qwen35


class Qwen35Moe(Qwen35):
    """Qwen3.5 and Qwen3.6 with experts, and one that computes every token, through a gate of its own."""

    model_type = "qwen3_5_moe"
    experts = r"\.mlp\.(experts|shared_expert)\."
    router = r"\.mlp\.(gate|shared_expert_gate)\."
