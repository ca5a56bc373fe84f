"""Tiny random models of the families that do not ship with rlcs, with their real processors."""

import re
from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tools import tiny_model
from tools.tiny_model.build import CHAT_TEMPLATE, build_tokenizer, vision_ids

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

SIZES = {"shortest_edge": 64 * 64, "longest_edge": 448 * 448}


def _text(tokenizer, **more: object) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        **more,
    }


def qwen2_vl(tokenizer, *, text=(), vision=()) -> tuple[PreTrainedModel, Qwen2VLProcessor]:
    """Untied head, patches of 14, positions in sections."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision = {"depth": 2, "embed_dim": 96, "hidden_size": 128, "num_heads": 4, "initializer_range": 0.08,
              **dict(vision)}  # fmt: skip
    text = _text(tokenizer, rope_parameters=rope, **dict(text))
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **vision_ids(tokenizer))
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=SIZES),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    return Qwen2VLForConditionalGeneration(config), processor


def qwen3_vl(tokenizer, *, text=(), vision=()) -> tuple[PreTrainedModel, Qwen3VLProcessor]:
    """Tied head, patches of 16, interleaved positions, two deepstack layers, heads wider than hidden / 4."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 8, 8],
            "mrope_interleaved": True}  # fmt: skip
    text = _text(tokenizer, head_dim=48, rope_parameters=rope, tie_word_embeddings=True, **dict(text))
    vision = {"depth": 3, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "out_hidden_size": 128,
              "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 2],
              "initializer_range": 0.08, **dict(vision)}  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **vision_ids(tokenizer)
    )
    return Qwen3VLForConditionalGeneration(config), _qwen3_processor(tokenizer)


def _qwen3_processor(tokenizer) -> Qwen3VLProcessor:
    tokenizer.chat_template = QWEN_3_TEMPLATE
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=SIZES, patch_size=16, **half),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=QWEN_3_TEMPLATE,
    )


def qwen3_5(tokenizer, *, text=(), vision=()) -> tuple[PreTrainedModel, Qwen3VLProcessor]:
    """Two gated delta nets around an attention layer; more value than key heads; a quarter is rotated."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1],
            "mrope_interleaved": True, "partial_rotary_factor": 0.25}  # fmt: skip
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
              "linear_value_head_dim": 24}  # fmt: skip
    layers = ["linear_attention", "full_attention", "linear_attention"]
    own = {"head_dim": 32, "rope_parameters": rope, "layer_types": layers, **linear, **dict(text)}
    text = _text(tokenizer, **own)
    vision = {"depth": 2, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "out_hidden_size": 128,
              "num_position_embeddings": 256, "initializer_range": 0.08, **dict(vision)}  # fmt: skip
    config = Qwen3_5Config(text_config=text, vision_config=vision, **vision_ids(tokenizer))
    return Qwen3_5ForConditionalGeneration(config), _qwen3_processor(tokenizer)


BUILDERS = {"qwen2_vl": qwen2_vl, "qwen3_vl": qwen3_vl}


def build(family: str, folder: Path, **parts: object) -> Path:
    """Write a random model of the family in Hugging Face format; `text` and `vision` change its shape."""
    torch.manual_seed(1)
    model, processor = BUILDERS[family](build_tokenizer(tiny_model.corpus(50)), **parts)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
