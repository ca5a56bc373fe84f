"""Tiny random models of the families that do not ship with rlcs, with their real processors."""

from pathlib import Path

import torch
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tools import tiny_model
from tools.tiny_model.build import CHAT_TEMPLATE, build_tokenizer, vision_ids
from tools.tiny_model.hybrid import QWEN_3_TEMPLATE

INTERNVL_TEMPLATE = (
    QWEN_3_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n")
    .replace("<|vision_start|><|video_pad|><|vision_end|>", "<video>\\n")
    .replace("message.role == 'user' and ", "")
)
"""Renders what InternVL's own template renders; its processor puts `<img>` and `</img>` around an image."""

INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

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


def qwen3_vl(
    tokenizer, *, text=(), vision=(), kind=(Qwen3VLConfig, Qwen3VLForConditionalGeneration)
) -> tuple[PreTrainedModel, Qwen3VLProcessor]:
    """Tied head, patches of 16, interleaved positions, two deepstack layers, heads wider than hidden / 4."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 8, 8],
            "mrope_interleaved": True}  # fmt: skip
    own = {"head_dim": 48, "rope_parameters": rope, "tie_word_embeddings": True, **dict(text)}
    text = _text(tokenizer, **own)
    vision = {"depth": 3, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "out_hidden_size": 128,
              "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 2],
              "initializer_range": 0.08, **dict(vision)}  # fmt: skip
    config = kind[0](
        text_config=text, vision_config=vision, tie_word_embeddings=True, **vision_ids(tokenizer)
    )
    return kind[1](config), _qwen3_processor(tokenizer)


MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def qwen3_vl_moe(tokenizer, *, text=(), vision=()) -> tuple[PreTrainedModel, Qwen3VLProcessor]:
    """As `qwen3_vl`, with two of eight experts for each token, but in the second layer."""
    text = {**MIXTURE, "mlp_only_layers": [1], **dict(text)}
    kind = (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration)
    return qwen3_vl(tokenizer, text=text, vision=vision, kind=kind)


def _qwen3_processor(tokenizer) -> Qwen3VLProcessor:
    tokenizer.chat_template = QWEN_3_TEMPLATE
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=SIZES, patch_size=16, **half),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=QWEN_3_TEMPLATE,
    )


def qwen3_5(
    tokenizer, *, text=(), vision=(), kind=(Qwen3_5Config, Qwen3_5ForConditionalGeneration)
) -> tuple[PreTrainedModel, Qwen3VLProcessor]:
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
    config = kind[0](text_config=text, vision_config=vision, **vision_ids(tokenizer))
    return kind[1](config), _qwen3_processor(tokenizer)


def qwen3_5_moe(tokenizer, *, text=(), vision=()) -> tuple[PreTrainedModel, Qwen3VLProcessor]:
    """As `qwen3_5`, with two of eight experts for each token, and one for all tokens."""
    text = {**MIXTURE, "shared_expert_intermediate_size": 64, **dict(text)}
    kind = (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration)
    return qwen3_5(tokenizer, text=text, vision=vision, kind=kind)


def internvl(tokenizer, *, text=(), vision=()) -> tuple[PreTrainedModel, InternVLProcessor]:
    """InternVL3.5: tiles of 56 x 56 with a thumbnail, one by one positions, Qwen3 with an untied head."""
    text = {"model_type": "qwen3", "head_dim": 48, "tie_word_embeddings": False, **dict(text)}
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
              "attention_bias": True, "image_size": [56, 56], "initializer_range": 0.08,
              **dict(vision)}  # fmt: skip
    config = InternVLConfig(
        text_config=_text(tokenizer, **text),
        vision_config=vision,
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    tokenizer.chat_template = INTERNVL_TEMPLATE
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size={"height": 56, "width": 56},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=INTERNVL_TEMPLATE,
    )
    model = InternVLForConditionalGeneration(config)
    embeddings = model.model.vision_tower.embeddings
    for zero in (embeddings.cls_token, embeddings.position_embeddings):
        torch.nn.init.normal_(zero, std=0.08)
    return model, processor


BUILDERS = {
    "internvl": internvl,
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
}
UNPROVEN = {"qwen3_5": qwen3_5, "qwen3_5_moe": qwen3_5_moe}
NAMED_TOKENS = {"internvl": INTERNVL_TOKENS}


def build(family: str, folder: Path, **parts: object) -> Path:
    """Write a random model of the family in Hugging Face format; `text` and `vision` change its shape."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer(tiny_model.corpus(50), **NAMED_TOKENS.get(family, {}))
    model, processor = (BUILDERS | UNPROVEN)[family](tokenizer, **parts)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
