"""The built-in models: Qwen's format, tree rows equal to plain ones, and what the shipped weights see."""

import hashlib
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
)
from transformers import Qwen2_5_VLProcessor as Processor

from rlcs.data import puzzles
from rlcs.model.families import FAMILIES
from rlcs.model.source import find_source
from rlcs.recipe.schema import Prompts
from tools import tiny_model
from tools.tiny_model import learn
from tools.tiny_model.lessons import demonstrations, lessons
from tools.tiny_model.teacher import grown

Model = Qwen2_5_VLForConditionalGeneration | Qwen3_5ForConditionalGeneration
SHIPPED = {"qwen2_5_vl": "builtin", "qwen3_5": "builtin-hybrid"}
"""Names of the shipped models, by family."""
SUMS = {
    "qwen2_5_vl": "6b4375cc105d31c7e0f86e996bd5de68e60b0652222a9e1269963e2e7b0b971d",
    "qwen3_5": "76a634c7b22ecf0905872318f0555ecd4d535679fdabb2eb05391d2b425d5290",
}
"""SHA-256 of their weights: the studies in docs/results.md began with these."""


@pytest.fixture(scope="module")
def processor() -> Processor:
    return tiny_model.build_processor(tiny_model.corpus(size=300))


def small(family: str, **sizes: int) -> tuple[Model, Processor]:
    _, build_processor, build_model = tiny_model.FAMILIES[family]
    processor = build_processor(tiny_model.corpus(size=300))
    return build_model(processor, hidden=64, vision_hidden=32, vision_layers=1, **sizes), processor


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request: pytest.FixtureRequest) -> tuple[Model, Processor]:
    folder = find_source(SHIPPED[request.param]).weights
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def test_the_tokenizer_knows_qwens_special_tokens(processor: Processor) -> None:
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids(list(tiny_model.SPECIAL))
    assert ids == list(range(len(tokenizer) - len(tiny_model.SPECIAL), len(tokenizer)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert [tokenizer.encode(name) for name in tiny_model.SPECIAL] == [[i] for i in ids]
    assert 400 < len(tokenizer) < 540


def test_words_and_digits_are_single_tokens(processor: Processor) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer.tokenize("red triangle, none") == ["red", "Ġtriangle", ",", "Ġnone"]
    assert tokenizer.tokenize("12+3=15") == ["1", "2", "+", "3", "=", "1", "5"]
    assert tokenizer.decode(tokenizer.encode("Größe: 3 × 4 <b>\n")) == "Größe: 3 × 4 <b>\n"


def test_the_template_renders_as_qwens_does(processor: Processor) -> None:
    picture = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}
    chat = [{"role": "system", "content": "S"}, picture, {"role": "assistant", "content": "3"}]
    user = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many?<|im_end|>\n"
    assert processor.apply_chat_template([picture], tokenize=False, add_generation_prompt=True) == (
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{user}<|im_start|>assistant\n"
    )
    assert processor.apply_chat_template(chat, tokenize=False) == (
        f"<|im_start|>system\nS<|im_end|>\n{user}<|im_start|>assistant\n3<|im_end|>\n"
    )
    assert "Picture 1: <|vision_start|>" in processor.apply_chat_template(
        [picture], tokenize=False, add_vision_id=True
    )


@pytest.mark.parametrize("family", SHIPPED)
def test_images_keep_their_size(family: str) -> None:
    processor = AutoProcessor.from_pretrained(find_source(SHIPPED[family]).weights)
    image = next(lesson.image for lesson in lessons(puzzles.families(), 0) if lesson.image)
    seen = processor.image_processor([image], return_tensors="pt")
    assert seen["image_grid_thw"].tolist() == [[1, image.height // 14, image.width // 14]]


def plain_loss(model: Model, processor: Processor, chosen: list[tuple[str | None, object]]) -> float:
    """The mean over separate examples, rendered by the chat template, through the model as it is."""
    total, count = torch.zeros(()), 0
    for system, lesson in chosen:
        for question, response in lesson.pairs:
            content = [{"type": "image"}] if lesson.image else []
            content.append({"type": "text", "text": question})
            chat = [{"role": "system", "content": system}] if system is not None else []
            chat.append({"role": "user", "content": content})
            text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            images = [lesson.image] if lesson.image else None
            plain = processor(text=[f"{text}{response}<|im_end|>"], images=images, return_tensors="pt")
            logits = model(**plain).logits[0].log_softmax(-1)
            ids = plain["input_ids"][0]
            start = len(ids) - len(processor.tokenizer.encode(f"{response}<|im_end|>"))
            picked = logits[start - 1 : -1].gather(1, ids[start:, None])
            total, count = total - picked.sum(), count + len(picked)
    return total.item() / count


@pytest.mark.parametrize(
    ("family", "packed"), [("qwen2_5_vl", False), ("qwen2_5_vl", True), ("qwen3_5", True)]
)
def test_trees_have_the_loss_of_plain_prompts(family: str, packed: bool) -> None:
    """With the system prompt of the recipes, and with none: what the template then inserts."""
    model, processor = small(family, layers=4)
    some = list(islice(lessons(puzzles.families(), 4), 4))
    with torch.no_grad():
        plain = plain_loss(model, processor, list(zip((Prompts().system, None) * 2, some, strict=True)))
        if packed:
            FAMILIES[family].install(model)
        systems = (Prompts().system, FAMILIES[family].default_system) * 2
        batch = learn.Collator(model, processor, packed=packed)(list(zip(systems, some, strict=True)))
        assert learn.batch_loss(model, batch).item() == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("family", SHIPPED)
def test_training_learns_and_repeats(family: str) -> None:
    def run() -> list[float]:
        course = tiny_model.Course(families=puzzles.families())
        model, processor = small(family, layers=1)
        return tiny_model.train(model, processor, seed=0, steps=8, course=course, batch_size=4)

    losses = run()
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert losses == run()


@pytest.mark.parametrize(("family", "name"), SHIPPED.items())
def test_the_shipped_models_are_small_and_as_they_were_made(family: str, name: str) -> None:
    folder = Path(find_source(name).weights)
    weights = (folder / "model.safetensors").read_bytes()
    assert len(weights) < 5_700_000
    assert hashlib.sha256(weights).hexdigest() == SUMS[family]
    assert "Captions" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_hybrid_model_is_one(shipped: tuple[Model, Processor]) -> None:
    kinds = shipped[0].config.text_config.layer_types
    hybrid = isinstance(shipped[0], Qwen3_5ForConditionalGeneration)
    assert kinds == ["linear_attention"] * 3 * hybrid + ["full_attention"] * (1 if hybrid else 4)


@pytest.mark.parametrize("family", puzzles.families(), ids=lambda family: family.name)
def test_the_shipped_models_see_held_out_scenes(shipped: tuple[Model, Processor], family: object) -> None:
    assert tiny_model.caption_accuracy(*shipped, family, count=60) >= 0.97  # type: ignore[arg-type]


def test_the_shipped_models_answer_in_a_box_and_are_weak_at_several_steps(
    shipped: tuple[Model, Processor],
) -> None:
    scores = tiny_model.measure(*shipped, count=40)
    assert scores["direct answers in a box"] == 1.0
    assert 0.03 < scores["direct answers, all"] < 0.45  # the study's questions are new to it


def test_the_teacher_begins_as_the_shipped_model_and_learns_to_reason() -> None:
    folder = find_source("builtin").weights
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    larger = grown(model, seed=0)
    assert larger.num_parameters() > 2.3 * model.num_parameters()
    shown = list(islice(demonstrations(puzzles.families(), 4), 3))
    problems = puzzles.load("puzzles", split="train", count=60, seed=9)
    words = {problem.question.split()[0] for problem in problems}
    assert all(question.split()[0] in words for lesson in shown for question, _ in lesson.pairs)
    assert all("\n" in text and text.endswith("}") for lesson in shown for _, text in lesson.pairs)
    batch = learn.Collator(model, processor, packed=False)([(Prompts().system, each) for each in shown])
    with torch.no_grad():
        assert torch.allclose(learn.batch_loss(larger, batch), learn.batch_loss(model, batch), rtol=1e-5)
    course = tiny_model.Course(families=puzzles.families(), rate=0.5, packed=True, draw=demonstrations)
    larger.model.visual.requires_grad_(False)
    before = larger.model.visual.patch_embed.proj.weight.clone()
    losses = tiny_model.train(larger, processor, seed=0, steps=4, course=course, batch_size=2)
    assert losses[-1] < losses[0] and torch.equal(before, larger.model.visual.patch_embed.proj.weight)
