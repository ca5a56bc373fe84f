"""Tiny random models of the families that do not ship with rlcs, with their real processors."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    GemmaTokenizer,
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

_TURN = QWEN_3_TEMPLATE[QWEN_3_TEMPLATE.index("  {%- if message.content is string -%}") :].partition(
    "  {{- '<|im_end|>\\n' -}}"
)[0]
QWEN_3_5_TEMPLATE = (
    QWEN_3_TEMPLATE.replace(_TURN, f"{{%- set said -%}}{_TURN}{{%- endset -%}}{{%- set said = said|trim -%}}")
    .replace(
        "  {{- '<|im_end|>\\n' -}}",
        """
  {%- if message.role == 'assistant' -%}
    {%- set reasoning = '' -%}
    {%- if '</think>' in said -%}
      {%- set reasoning = said.split('</think>')[0].split('<think>')[-1]|trim -%}
      {%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {%- if loop.last -%}{{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' -}}{%- endif -%}
  {%- endif -%}
  {{- said + '<|im_end|>\\n' -}}""",
    )
    .replace(
        "{{- '<|im_start|>assistant\\n' -}}",
        "{{- '<|im_start|>assistant\\n' -}}{%- if enable_thinking is defined and enable_thinking is false -%}"
        "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- else -%}{{- '<think>\\n' -}}{%- endif -%}",
    )
)
"""Renders what the own template of Qwen3.5 (from 4B) and 3.6 renders of system, user and assistant turns
without tools: texts stripped, reasoning in the last answer alone, an answer begun with `<think>`."""

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


def _qwen3_processor(tokenizer, template: str = QWEN_3_TEMPLATE) -> Qwen3VLProcessor:
    tokenizer.chat_template = template
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=SIZES, patch_size=16, **half),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=template,
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
    return kind[1](config), _qwen3_processor(tokenizer, QWEN_3_5_TEMPLATE)


GEMMA_TOKENS = {
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>",
    "boa_token": "<|audio>", "eoa_token": "<audio|>", "sot_token": "<|turn>", "eot_token": "<turn|>",
    "soc_token": "<|channel>", "eoc_token": "<channel|>", "think_token": "<|think|>",
    "video_token": "<|video|>",
}  # fmt: skip
"""The names by which Gemma 4's processor finds the special tokens of its tokenizer."""

GEMMA_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
  {%- if message.content is string -%}
    {{- message.content | trim -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == 'text' -%}{{- part.text | trim -}}
      {%- elif part.type == 'image' -%}{{- '<|image|>' -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""
"""Renders what the template of Gemma 4's E2B and E4B renders of turns without tools and thoughts (and of the
parts of a system message, which the published one takes as one text alone)."""

NO_THOUGHTS = "{%- if add_generation_prompt -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}"
"""What the templates of 26B-A4B and 31B have at their end: an answer begins without thoughts."""


def gemma_tokenizer(texts: Iterable[str], vocabulary: int = 600) -> GemmaTokenizer:
    """A tokenizer in Gemma's form, learned from `texts`: spaces are letters, and unknown ones are bytes."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    form = GemmaTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    # Gemma's own tokens never join a line's end to the next line, or the end of a word to a space.
    learner.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁\n]+|▁+|\n+"), "isolated")
    learner.normalizer = form.normalizer
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *GEMMA_TOKENS.values()]
    first += [f"<0x{byte:02X}>" for byte in range(256)]
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=first, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return GemmaTokenizer(
        vocab=learned["vocab"], merges=merges, add_bos_token=False, extra_special_tokens=GEMMA_TOKENS
    )


def gemma4(tokenizer, *, text=(), vision=(), thoughts=True) -> tuple[PreTrainedModel, Gemma4Processor]:
    """As E2B: inputs for each layer, two layers with the keys of earlier ones, a bound on logits, audio.

    Windows are shorter than an image. Patches are larger than the published ones, so that images of the
    tests have few.
    """
    tokenizer = gemma_tokenizer(tiny_model.corpus(50))
    sizes = {"num_attention_heads": 4, "head_dim": 32, "hidden_size": 128, "intermediate_size": 256}
    layers = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    text = {
        **sizes, "vocab_size": len(tokenizer), "num_hidden_layers": 4, "num_key_value_heads": 2,
        "global_head_dim": 48, "layer_types": layers, "num_kv_shared_layers": 2, "sliding_window": 40,
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": len(tokenizer),
        "use_double_wide_mlp": True, "final_logit_softcapping": 5.0, "max_position_embeddings": 4096,
        "initializer_range": 0.05, **dict(text),
    }  # fmt: skip
    vision = {**sizes, "num_key_value_heads": 4, "num_hidden_layers": 2, "hidden_size": 108, "head_dim": 24,
              "intermediate_size": 192, "patch_size": 32, "position_embedding_size": 256,
              "initializer_range": 0.05, "use_clipped_linears": True, **dict(vision)}  # fmt: skip
    audio = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32}
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in GEMMA_TOKENS.items()
           if name.split("_")[0] in ("image", "audio", "video", "boi", "eoi", "boa")}  # fmt: skip
    config = Gemma4Config(
        text_config=text, vision_config=vision, audio_config=audio if thoughts else None, **ids
    )
    template = GEMMA_TEMPLATE if thoughts else GEMMA_TEMPLATE + NO_THOUGHTS
    tokenizer.chat_template = template
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(patch_size=32, max_soft_tokens=70),
        tokenizer=tokenizer,
        video_processor=Gemma4VideoProcessor(),
        chat_template=template,
    )
    model = Gemma4ForConditionalGeneration(config)
    with torch.no_grad():  # scores are not divided by the root of the head size, so that norms learn to
        for name, parameter in model.named_parameters():
            if name.endswith("self_attn.q_norm.weight"):
                parameter.fill_(len(parameter) ** -0.5)
    return model, processor


def gemma4_moe(tokenizer, *, text=(), vision=()) -> tuple[PreTrainedModel, Gemma4Processor]:
    """As 26B-A4B: images see themselves, experts, keys that are values, answers begin without thoughts."""
    text = {
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False,
        "use_bidirectional_attention": "vision", "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64,
        **dict(text),
    }  # fmt: skip
    vision = {"use_clipped_linears": False, "standardize": True, **dict(vision)}
    return gemma4(tokenizer, text=text, vision=vision, thoughts=False)


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
    "gemma4": gemma4,
    "gemma4_moe": gemma4_moe,
    "internvl": internvl,
    "qwen2_vl": qwen2_vl,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
}
NAMED_TOKENS = {"internvl": INTERNVL_TOKENS}


def build(family: str, folder: Path, **parts: object) -> Path:
    """Write a random model of the family in Hugging Face format; `text` and `vision` change its shape."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer(tiny_model.corpus(50), **NAMED_TOKENS.get(family, {}))
    model, processor = BUILDERS[family](tokenizer, **parts)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
