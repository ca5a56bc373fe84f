"""A real Qwen3.5 and its processor, built small and from nothing: most layers are gated delta nets."""

import math
import re
from collections.abc import Iterable, Mapping

import torch
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tools.tiny_model.build import CHAT_TEMPLATE, build_tokenizer, ends, stops, vision_ids

QWEN_3_TEMPLATE = (
    re.sub(r"  \{%- if loop\.first .*?endif -%\}\n", "", CHAT_TEMPLATE, count=1, flags=re.DOTALL)
    .replace(
        "if part.type == 'image' or 'image' in part or 'image_url' in part -",
        "if message.role == 'user' and (part.type == 'image' or 'image' in part or 'image_url' in part) -",
    )
    .replace(
        "elif part.type == 'video' or 'video' in part -",
        "elif message.role == 'user' and (part.type == 'video' or 'video' in part) -",
    )
)
"""Renders what Qwen3-VL-Instruct's own template renders of system, user and assistant turns without tools:
no system turn unless there is a system message."""


def build_processor(texts: Iterable[str]) -> Qwen3VLProcessor:
    """A processor as Qwen3.5's, with patches of 14 pixels: images of 56 x 56 to 448 x 448 keep their size."""
    tokenizer = build_tokenizer(texts, template=QWEN_3_TEMPLATE)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    sizes = {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=sizes, patch_size=14, **half),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=sizes, patch_size=14, **half),
        chat_template=QWEN_3_TEMPLATE,
    )


def build_model(
    processor: Qwen3VLProcessor,
    *,
    seed: int = 0,
    hidden: int = 128,
    layers: int = 4,
    vision_hidden: int = 96,
    vision_layers: int = 2,
) -> Qwen3_5ForConditionalGeneration:
    """A Qwen3.5 with random weights; see `build.build_model` for their deviation."""
    tokenizer = processor.tokenizer
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "head_dim": 32,
        "linear_num_key_heads": hidden // 64,
        "linear_num_value_heads": hidden // 32,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.5,
        },
        "initializer_range": 0.08,
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": vision_hidden,
        "intermediate_size": 3 * vision_hidden,
        "num_heads": 4,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "num_position_embeddings": 64,
        "initializer_range": 0.08,
    }
    return random_model(tokenizer, text, vision, seed=seed)


def random_model(
    tokenizer: Qwen2Tokenizer, text: Mapping[str, object], vision: Mapping[str, object], *, seed: int
) -> Qwen3_5ForConditionalGeneration:
    """A Qwen3.5 with a tied head and random weights, of these sizes of its two parts.

    Its delta nets remember from the start: transformers' own initial decays, which no training began with,
    forget a token within one step.
    """
    config = Qwen3_5Config(
        text_config={**text, **ends(tokenizer)},
        vision_config=vision,
        tie_word_embeddings=True,
        **vision_ids(tokenizer),
    )
    torch.manual_seed(seed)
    model = Qwen3_5ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            steps = torch.empty_like(parameter).uniform_(math.log(0.001), math.log(0.1)).exp()
            parameter.data = steps + torch.log(-torch.expm1(-steps))  # the inverse of softplus
    return stops(model)
