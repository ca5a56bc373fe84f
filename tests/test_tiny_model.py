"""The built-in model: Qwen's format, tree rows equal to plain ones, and what the shipped weights see."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers import Qwen2_5_VLForConditionalGeneration as Model
from transformers import Qwen2_5_VLProcessor as Processor

import rlcs
from rlcs.data import puzzles
from rlcs.recipe.schema import Prompts
from tools import tiny_model
from tools.tiny_model import learn
from tools.tiny_model.lessons import lessons

SHIPPED = Path(rlcs.__file__).parent / "builtin_model"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return tiny_model.build_processor(tiny_model.corpus(size=300))


@pytest.fixture(scope="module")
def small(processor: Processor) -> Model:
    return tiny_model.build_model(processor, hidden=64, layers=2, vision_hidden=32, vision_layers=1)


@pytest.fixture(scope="module")
def shipped() -> tuple[Model, Processor]:
    return AutoModelForImageTextToText.from_pretrained(SHIPPED), AutoProcessor.from_pretrained(SHIPPED)


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


def test_images_keep_their_size(processor: Processor) -> None:
    image = next(lesson.image for lesson in lessons(puzzles.families(), seed=0) if lesson.image)
    seen = processor.image_processor([image], return_tensors="pt")
    assert seen["image_grid_thw"].tolist() == [[1, image.height // 14, image.width // 14]]


def test_tree_rows_have_the_loss_of_plain_prompts(processor: Processor, small: Model) -> None:
    """The mean over branches of one batch of trees is the mean over separate plain examples."""
    system = Prompts().system
    assert system is not None
    some = list(islice(lessons(puzzles.families(), seed=4), 4))
    with torch.no_grad():
        packed = learn.batch_loss(
            small, learn.Collator(small, processor)([(system, lesson) for lesson in some])
        )
        total, count = torch.zeros(()), 0
        for lesson in some:
            for question, response in lesson.pairs:
                content = [{"type": "image"}] if lesson.image else []
                content.append({"type": "text", "text": question})
                chat = [{"role": "system", "content": system}, {"role": "user", "content": content}]
                text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                images = [lesson.image] if lesson.image else None
                plain = processor(text=[f"{text}{response}<|im_end|>"], images=images, return_tensors="pt")
                logits = small(**plain).logits[0].log_softmax(-1)
                ids = plain["input_ids"][0]
                start = len(ids) - len(processor.tokenizer.encode(f"{response}<|im_end|>"))
                picked = logits[start - 1 : -1].gather(1, ids[start:, None])
                total, count = total - picked.sum(), count + len(picked)
    assert packed.item() == pytest.approx(total.item() / count, rel=1e-5)


def test_training_learns_and_repeats(processor: Processor) -> None:
    def run() -> list[float]:
        course = tiny_model.Course(families=puzzles.families())
        model = tiny_model.build_model(processor, hidden=64, layers=1, vision_hidden=32, vision_layers=1)
        return tiny_model.train(model, processor, seed=0, steps=8, course=course, batch_size=4)

    losses = run()
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert losses == run()


def test_the_shipped_model_is_small(shipped: tuple[Model, Processor]) -> None:
    model, processor = shipped
    assert isinstance(model, Model) and isinstance(processor, Processor)
    assert model.num_parameters() <= 4_000_000
    assert (SHIPPED / "model.safetensors").stat().st_size < 10_000_000
    assert "Captions" in (SHIPPED / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", puzzles.families(), ids=lambda family: family.name)
def test_the_shipped_model_sees_held_out_scenes(shipped: tuple[Model, Processor], family: object) -> None:
    assert tiny_model.caption_accuracy(*shipped, family, count=60) >= 0.97  # type: ignore[arg-type]


def test_the_shipped_model_answers_in_a_box_and_is_weak_at_several_steps(
    shipped: tuple[Model, Processor],
) -> None:
    scores = tiny_model.measure(*shipped, count=40)
    assert scores["direct answers in a box"] == 1.0
    assert 0.1 < scores["direct answers, all"] < 0.45  # the study's questions are new to it
