"""InternVL: tiles as its processor makes them, bounds on pixels, and published configurations."""

import random
from pathlib import Path

import pytest
import torch

import family_models
from conftest import draw
from rlcs.data.images import open_image
from rlcs.errors import ModelError
from rlcs.model import loading
from rlcs.model.families.internvl import InternVl
from rlcs.model.images import ImagePipeline
from rlcs.model.parity_check import agreement
from rlcs.plan.skeleton import published
from rlcs.plan.towers import tower_of
from rlcs.recipe.schema import Images, Model, Prompts
from rlcs.records import ImageRef
from rlcs.storage import read_json, write_json
from test_model_images import photo
from test_policy import CASES, make_trees

TILE = 448 * 448
DEFAULT = Images().max_pixels
BOUNDS = {"recipe": (3136, DEFAULT), "paper's RL": (262_144, DEFAULT), "published": (1, 13 * TILE),
          "narrow": (1_000_000, 1_010_000), "one tile": (1, TILE), "none": (1, 1)}  # fmt: skip
"""The published processor makes 12 tiles at most, and a thumbnail."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return family_models.build("internvl", tmp_path_factory.mktemp("internvl"))


@pytest.fixture
def processor(folder):
    """With the published size of tiles and tokens of each."""
    made = loading.load(Model(name=str(folder)), weights=False).processor
    made.image_processor.size = {"height": 448, "width": 448}
    made.image_seq_length = 256
    return made


def pipeline(processor, low=3136, high=DEFAULT):
    return ImagePipeline(
        InternVl().image_processing(processor, min_pixels=low, max_pixels=high), decode_limit=10**9
    )


def plain(processor, image):
    return processor(images=[image], text=processor.image_token, return_tensors="pt")


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
def test_the_number_of_tiles_is_the_processors_and_within_the_bounds(processor, bounds):
    images = pipeline(processor, *bounds)
    random.seed(1)
    sizes = [(random.randint(1, 6000), random.randint(1, 6000)) for _ in range(300)]
    sizes += [(448 * n + d, 448 * m + e) for n in (1, 2, 3) for m in (1, 4) for d in (-1, 0) for e in (0, 1)]
    seen = set()
    for width, height in [*sizes, (1, 1), (1, 9000), (9000, 1), (65_535, 65_535)]:
        tiles, *patches = images.grid(ImageRef(sha256="0" * 64, width=width, height=height))
        assert tiles == processor.image_processor.get_number_of_image_patches(height, width)
        assert patches == [32, 32] and tiles * TILE >= min(bounds[0], max(1, bounds[1] // TILE) * TILE)
        assert tiles == 1 or tiles * TILE <= bounds[1]
        seen.add(tiles)
    assert max(seen) == max(1, bounds[1] // TILE)
    planned = tower_of(published("OpenGVLab/InternVL3_5-8B-HF"))
    assert planned.tokens(bounds[1]) == 256 * max(seen)


@pytest.mark.parametrize("size", [(64, 48), (1, 1), (57, 1400), (1100, 900), (448, 448), (1300, 1700)])
def test_tiles_are_the_processors_bit_by_bit_also_of_the_image_that_vllm_gets(processor, size):
    images = pipeline(processor)
    ref = draw(*size) if size != (1300, 1700) else photo(*size)
    expected = plain(processor, open_image(ref))
    tiles, height, width = images.grid(ref)
    assert torch.equal(images.patches(ref), expected["pixel_values"]) and len(images.patches(ref)) == tiles
    placeholders = int((expected["input_ids"] == processor.image_token_id).sum())
    assert placeholders == tiles * height * width // images.merge_size**2
    assert images.resized(ref).size == size
    assert torch.equal(images.patches(ref), plain(processor, images.resized(ref))["pixel_values"])


def test_an_image_takes_a_quarter_of_its_tiles(processor):
    images = pipeline(processor)
    ref = draw(900, 448)
    assert images.patches(ref).nbytes == 4 * images._used == 4 * images._bytes(ref) == 4 * 3 * 3 * TILE


def test_the_picture_is_all_tiles_side_by_side_and_the_whole_image(processor):
    ref = photo(896, 448)
    picture = pipeline(processor).picture(ref)
    assert picture.size == (3 * 448, 448)
    whole = open_image(ref).convert("RGB")
    assert picture.crop((0, 0, 896, 448)).tobytes() == whole.tobytes()


def test_a_processor_with_other_arithmetic_is_refused(processor):
    processor.image_processor.do_normalize = False
    with pytest.raises(ModelError, match="computes other patches"):
        pipeline(processor)


def changed(folder: Path, target: Path, **text: object) -> Path:
    """A copy whose configuration leaves out whether the head is tied, as published ones do, with `text`."""
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = read_json(folder / "config.json")
    del config["tie_word_embeddings"]
    config["text_config"] |= text
    write_json(target / "config.json", config)
    return target


def test_the_head_is_tied_as_the_language_models_configuration_says(folder, tmp_path):
    for weights in (True, False):
        model = loading.load(Model(name=str(changed(folder, tmp_path))), weights=weights).model
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
        assert model.config.tie_word_embeddings is False
        model.tie_weights()
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    tied = loading.load(Model(name=str(changed(folder, tmp_path, tie_word_embeddings=True))), weights=False)
    assert tied.model.config.tie_word_embeddings is True


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama"])
def test_other_language_models_are_refused_before_any_weight_is_read(folder, tmp_path, kind):
    (changed(folder, tmp_path, model_type=kind) / "model.safetensors").unlink()
    for refused in (loading.load, lambda model: loading.load_chat(model, Prompts(), Images())):
        with pytest.raises(ModelError, match=f"'{kind}' is not supported\\n.*qwen2 or qwen3"):
            refused(Model(name=str(tmp_path)))


def test_qwen2_is_a_language_model_too(tmp_path):
    """That of InternVL3; it may be tied."""
    text = {"model_type": "qwen2", "head_dim": 32, "tie_word_embeddings": True}
    vlm = loading.load(Model(name=str(family_models.build("internvl", tmp_path, text=text))))
    assert type(vlm.model.model.language_model).__name__ == "Qwen2Model"
    chat = loading.make_chat(vlm)
    [found] = agreement(vlm, chat, make_trees(chat, CASES["many trees of mixed sizes"]))
    assert found.share < 0.6
