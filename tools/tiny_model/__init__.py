"""Builds and pre-trains the built-in models: a real Qwen2.5-VL and a real Qwen3.5, a million parameters each.

Run `python -m tools.tiny_model --out DIR` to make the first again, with `--family qwen3_5` the second. They
learn `lessons`: captions, lists of counts, simple questions with direct answers, equations with one
operation; never a question in several steps, never reasoning. They stand where an instruct model stands
before a cold start: they see well, answer in a box, and have to be taught to think.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from rlcs.data import puzzles
from tools.tiny_model import hybrid
from tools.tiny_model.build import SPECIAL, build_model, build_processor, corpus, random_model
from tools.tiny_model.learn import Course, train
from tools.tiny_model.sight import caption_accuracy, measure

__all__ = [
    "FAMILIES", "SPECIAL", "Course", "build_model", "build_processor", "caption_accuracy", "corpus",
    "measure", "pretrain", "random_model", "train",
]  # fmt: skip

FAMILIES = {
    "qwen2_5_vl": ("Qwen2.5-VL", build_processor, build_model),
    "qwen3_5": ("Qwen3.5", hybrid.build_processor, hybrid.build_model),
}
"""Of each family of which a built-in model is: its name, and what builds a processor and a model."""


def pretrain(
    out: Path,
    *,
    family: str = "qwen2_5_vl",
    seed: int,
    steps: int,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Build, train, measure, and write a folder that `from_pretrained` loads; returns the scores.

    Counting takes longest to learn, so the second course, of 3 steps to 8 of the first, has more shapes.
    """
    started = time.monotonic()
    name, make_processor, make_model = FAMILIES[family]
    processor = make_processor(corpus())
    model = make_model(processor, seed=seed)
    shapes, bars, figures = puzzles.families()
    first = Course(families=(shapes, bars, figures))
    second = Course(families=(shapes, bars, figures, shapes), rate=0.7)
    train(model, processor, seed=seed, steps=steps, course=first, report=report)
    train(model, processor, seed=seed + 1, steps=steps * 3 // 8, course=second, report=report)
    minutes = (time.monotonic() - started) / 60
    scores = measure(model, processor)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    other = "" if family == "qwen2_5_vl" else f" --family {family}"
    command = f"python -m tools.tiny_model --out {out.name}{other} --seed {seed} --steps {steps}"
    what = f"{name} ({model.num_parameters():,} parameters, random start)"
    (out / "README.md").write_text(_card(what, command, minutes, scores), encoding="utf-8")
    return scores


def _card(what: str, command: str, minutes: float, scores: dict[str, float]) -> str:
    rows = "\n".join(f"| {name} | {100 * value:.1f}% |" for name, value in scores.items())
    return f"""---
license: apache-2.0
pipeline_tag: image-text-to-text
---

# A built-in model of rlcs

A real {what} that sees the built-in tasks and
answers simple questions about them at once. It is a base for studies of cold start and RL on a
laptop, and good for nothing else.

It was trained only on captions, lists of counts and measures, simple questions with direct answers (one
look, or two looks put together), and equations with one operation (`tools.tiny_model.lessons`), on scenes of
the train split: no question of the study in its own words, no word of reasoning. Made in
{minutes:.0f} minutes with {torch.get_num_threads()} CPU thread(s), no other data, by

    {command}

Measured on held-out scenes, greedy. *Captions*: share of cells, bars or sides named rightly in
their place. *Direct answers*: exact answers to questions in several steps
(`rlcs.data.puzzles.load("puzzles", split="test")`), which are new to the model.

| | |
|---|---|
{rows}
"""
