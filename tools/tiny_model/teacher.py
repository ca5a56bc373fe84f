"""The larger model of a built-in family: a teacher that reasons, for on-policy distillation.

It begins as the shipped model and computes the same: a new layer after each of its own adds nothing yet, and
the new columns of every feed-forward network are not read yet. Then it learns right answers with reasoning.
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from rlcs.data import puzzles
from rlcs.model.source import find_source
from tools.tiny_model.learn import Course, train
from tools.tiny_model.lessons import demonstrations
from tools.tiny_model.sight import reasoning_accuracy

PER_LAYER = 2
"""Layers of the teacher for each one of the shipped model; its feed-forward networks are as much wider."""
NEW = ("o_proj.weight", "down_proj.weight")
"""What a new layer adds its results by: zero at first."""


def grown(model: Qwen2_5_VLForConditionalGeneration, *, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A model that computes the same with twice the layers, and twice the width inside them."""
    config = copy.deepcopy(model.config)
    text = config.text_config
    text.num_hidden_layers *= PER_LAYER
    text.intermediate_size *= PER_LAYER
    text.layer_types = [kind for kind in text.layer_types for _ in range(PER_LAYER)]
    torch.manual_seed(seed)
    larger = Qwen2_5_VLForConditionalGeneration(config)
    smaller = model.state_dict()
    with torch.no_grad():
        for name, weight in larger.state_dict().items():
            before, marker, after = name.partition(".layers.")
            if not marker or "visual" in before:
                weight.copy_(smaller[name])
                continue
            number, _, rest = after.partition(".")
            old, is_new = divmod(int(number), PER_LAYER)
            if is_new:
                if rest.endswith(NEW):
                    weight.zero_()
            else:
                _copy_corner(smaller[f"{before}{marker}{old}.{rest}"], weight, zero=rest.endswith(NEW))
    larger.generation_config = copy.deepcopy(model.generation_config)
    return larger


def _copy_corner(small: Tensor, large: Tensor, *, zero: bool) -> None:
    if zero:
        large.zero_()
    large[tuple(slice(size) for size in small.shape)] = small


def make_teacher(
    out: Path, *, seed: int, steps: int, report: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """Grow the shipped model, teach it to reason, measure, and write its folder; returns the scores."""
    started = time.monotonic()
    folder = find_source("builtin").weights
    processor = AutoProcessor.from_pretrained(folder)
    model = grown(Qwen2_5_VLForConditionalGeneration.from_pretrained(folder), seed=seed)
    model.model.visual.requires_grad_(False)  # it sees well
    course = Course(families=puzzles.families(), rate=0.5, packed=True, draw=demonstrations)
    train(model, processor, seed=seed, steps=steps, course=course, batch_size=16, report=report)
    report(f"{model.num_parameters():,} parameters, {(time.monotonic() - started) / 60:.0f} minutes")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return reasoning_accuracy(model, processor)
