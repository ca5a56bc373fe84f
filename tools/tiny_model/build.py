"""A real Qwen2.5-VL and its processor, built small and from nothing."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from rlcs.data import puzzles
from rlcs.model.families.qwen2_vl import DEFAULT_SYSTEM
from rlcs.recipe.schema import Prompts
from tools.tiny_model.lessons import lessons

Model = TypeVar("Model", bound=PreTrainedModel)

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
"""Qwen2.5-VL's special tokens, in its order."""

_END, _PAD = "<|im_end|>", "<|endoftext|>"

CHAT_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- for message in messages -%}
  {%- if loop.first and message.role != 'system' -%}
    {{- '<|im_start|>system\\nDEFAULT_SYSTEM<|im_end|>\\n' -}}
  {%- endif -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
        {%- set seen.images = seen.images + 1 -%}
        {%- if add_vision_id -%}{{- 'Picture ' ~ seen.images ~ ': ' -}}{%- endif -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part.type == 'video' or 'video' in part -%}
        {%- set seen.videos = seen.videos + 1 -%}
        {%- if add_vision_id -%}{{- 'Video ' ~ seen.videos ~ ': ' -}}{%- endif -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- elif 'text' in part -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""".replace("DEFAULT_SYSTEM", DEFAULT_SYSTEM)
"""Renders exactly what Qwen2.5-VL's own template renders."""


SYSTEM = Prompts().system or DEFAULT_SYSTEM
"""The system prompt of recipes that name none."""


def corpus(size: int = 1200) -> Iterator[str]:
    """Text that the tokenizer learns its words from: lessons, problems, the teacher's reasoning."""
    for _ in range(100):
        yield from (DEFAULT_SYSTEM, SYSTEM, "system\n", "user\n", "assistant\n")
    for lesson in islice(lessons(puzzles.families(), -1), size):
        for pair in lesson.pairs:
            yield from pair
    for problem in puzzles.load("puzzles", split="train", count=size, seed=-1):
        yield from (problem.question, puzzles.teach(problem, seed=-1, wrong_share=0.0))


def build_tokenizer(
    texts: Iterable[str], vocabulary: int = 600, template: str = CHAT_TEMPLATE, **named: str
) -> Qwen2Tokenizer:
    """A byte-level BPE in Qwen's own form (digits one by one), learned from `texts`.

    At most `vocabulary` tokens, fewer when every word of the texts is a token before that;
    Qwen's special tokens come after them, then those that are attributes of the tokenizer by `named`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    qwen = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    words = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    tokenizer = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate((*words, *SPECIAL, *named.values()))},
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token=_END,
        pad_token=_PAD,
        additional_special_tokens=list(SPECIAL),
        model_max_length=4096,
        **named,
    )
    tokenizer.chat_template = template
    return tokenizer


def build_processor(texts: Iterable[str]) -> Qwen2_5_VLProcessor:
    """A Qwen2.5-VL processor that leaves images from 56 x 56 to 448 x 448 pixels their size."""
    tokenizer = build_tokenizer(texts)
    sizes = {"min_pixels": 56 * 56, "max_pixels": 448 * 448}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    processor: Qwen2_5_VLProcessor,
    *,
    seed: int = 0,
    hidden: int = 128,
    layers: int = 4,
    vision_hidden: int = 96,
    vision_layers: int = 2,
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL with random weights.

    The initial standard deviation is about 1/sqrt(hidden): with the 0.02 made for wide models so
    narrow a one hardly learns to see.
    """
    tokenizer = processor.tokenizer
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "initializer_range": 0.08,
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": vision_hidden,
        "intermediate_size": 3 * vision_hidden,
        "num_heads": 4,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": list(range(vision_layers)),
        "initializer_range": 0.08,
    }
    return random_model(tokenizer, text, vision, seed=seed)


def vision_ids(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """The fields of a Qwen-VL configuration that name the ids around and in place of images."""
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {field: int(tokenizer.convert_tokens_to_ids(name)) for field, name in names.items()}


def random_model(
    tokenizer: Qwen2Tokenizer, text: dict[str, object], vision: dict[str, object], *, seed: int
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL with a tied head and random weights, of these sizes of its two parts."""
    config = Qwen2_5_VLConfig(
        text_config=text | ends(tokenizer),
        vision_config=vision,
        tie_word_embeddings=True,
        **vision_ids(tokenizer),
    )
    torch.manual_seed(seed)
    return stops(Qwen2_5_VLForConditionalGeneration(config))


def ends(tokenizer: Qwen2Tokenizer) -> dict[str, object]:
    """The fields of a text model with a tied head that name the ids at the end of turns."""
    end, pad = (tokenizer.convert_tokens_to_ids(name) for name in (_END, _PAD))
    return {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}


def stops(model: Model) -> Model:
    """The same model, whose generation stops at the ends of turns and at padding."""
    text = model.config.text_config
    model.generation_config.update(
        eos_token_id=[text.eos_token_id, text.pad_token_id], pad_token_id=text.pad_token_id
    )
    return model
