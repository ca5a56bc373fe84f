"""How well the built-in model sees, and what it makes of questions that are new to it."""

import random
import re
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from rlcs.data import puzzles
from rlcs.data.puzzles.family import Family, boxed, draw_scene
from tools.tiny_model.build import SYSTEM
from tools.tiny_model.lessons import DESCRIBE

if TYPE_CHECKING:
    from PIL.Image import Image


@torch.inference_mode()
def answer(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    pairs: Sequence[tuple["Image", str]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 100,
) -> list[str]:
    """Greedy responses to (image, question) pairs under the recipe's system prompt."""
    model.eval()
    system = {"role": "system", "content": SYSTEM}
    responses: list[str] = []
    for start in range(0, len(pairs), batch_size):
        images, questions = zip(*pairs[start : start + batch_size], strict=True)
        chats = []
        for question in questions:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            chats.append([system, {"role": "user", "content": content}])
        texts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = processor(
            text=texts, images=list(images), padding=True, padding_side="left", return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        responses += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return responses


def caption_accuracy(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, family: Family, *, count: int
) -> float:
    """Share of cells, bars or sides named rightly, in their place, in captions of held-out scenes."""
    rng = random.Random(f"captions|{family.name}")
    scenes = [draw_scene(family, rng, 1 + i % 3, "test") for i in range(count)]
    texts = answer(model, processor, [(family.paint(scene), DESCRIBE) for scene in scenes])
    right = total = 0
    for scene, text in zip(scenes, texts, strict=True):
        truth, claims = _parts(family.caption(scene)), _parts(text)
        right += sum(claim == part for claim, part in zip(claims, truth, strict=False))
        total += max(len(truth), len(claims))
    return right / total


def _parts(caption: str) -> list[str]:
    return re.split(r", |\n|\*", caption.strip())


def measure(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, *, count: int = 300
) -> dict[str, float]:
    """How well the model sees, and how weakly it answers questions in several steps at once.

    `count` is the number of held-out scenes, and of problems, of each family.
    """
    from PIL import Image

    scores: dict[str, float] = {}
    for family in puzzles.families():
        scores[f"captions, {family.name}"] = caption_accuracy(model, processor, family, count=count)
    problems = puzzles.load("puzzles", split="test", count=len(puzzles.families()) * count, seed=0)
    pairs = [(Image.open(BytesIO(p.images[0].data or b"")), p.question) for p in problems]
    texts = [text.strip() for text in answer(model, processor, pairs)]
    by_group: dict[str, list[bool]] = {}
    for problem, text in zip(problems, texts, strict=True):
        right = text == boxed(problem.answer)
        for group in ("all", str(problem.metadata["family"]), f"level {problem.metadata['level']}"):
            by_group.setdefault(f"direct answers, {group}", []).append(right)
    scores |= {group: sum(some) / len(some) for group, some in sorted(by_group.items())}
    in_box = sum(re.fullmatch(r"\\boxed\{[^{}]+\}", text) is not None for text in texts)
    return scores | {"direct answers in a box": in_box / len(texts)}


def reasoning_accuracy(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, *, count: int = 900
) -> dict[str, float]:
    """The share of `count` held-out problems that the model answers rightly at the end of its reasoning."""
    from PIL import Image

    problems = puzzles.load("puzzles", split="test", count=count, seed=0)
    pairs = [(Image.open(BytesIO(p.images[0].data or b"")), p.question) for p in problems]
    texts = answer(model, processor, pairs, max_new_tokens=128)
    by_level: dict[str, list[bool]] = {}
    for problem, text in zip(problems, texts, strict=True):
        right = text.strip().endswith(boxed(problem.answer))
        by_level.setdefault(f"reasoning, level {problem.metadata['level']}", []).append(right)
    return {level: sum(some) / len(some) for level, some in sorted(by_level.items())}
