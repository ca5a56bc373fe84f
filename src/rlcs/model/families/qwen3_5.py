"""Qwen3.5 and Qwen3.6, dense: three of four layers are gated delta nets, which `model.delta_net` computes."""

from rlcs.model.families.qwen_vl import QwenVl


class Qwen35(QwenVl):
    """Qwen3.5 and Qwen3.6, dense."""

    model_type = "qwen3_5"
