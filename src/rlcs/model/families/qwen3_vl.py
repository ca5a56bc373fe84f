"""Qwen3-VL (arXiv 2511.21631): some layers of the tower feed the language model's first layers too."""

from rlcs.model.families.qwen_vl import QwenVl


class Qwen3Vl(QwenVl):
    """Qwen3-VL, dense."""

    model_type = "qwen3_vl"
    vision_tower = r"^model\.visual\.(?!merger\.|deepstack_merger_list\.)"
    merger = r"^model\.visual\.(merger|deepstack_merger_list)\."
