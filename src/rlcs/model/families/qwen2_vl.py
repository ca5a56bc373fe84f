"""Qwen2-VL and Qwen2.5-VL (arXiv 2409.12191, 2502.13923)."""

from rlcs.model.families.qwen_vl import QwenVl

DEFAULT_SYSTEM = "You are a helpful assistant."
"""The system message that the chat templates insert when there is none."""


class Qwen2Vl(QwenVl):
    """Qwen2-VL."""

    model_type = "qwen2_vl"
    default_system = DEFAULT_SYSTEM


class Qwen25Vl(Qwen2Vl):
    """Qwen2.5-VL: most layers of its vision tower attend within windows."""

    model_type = "qwen2_5_vl"
