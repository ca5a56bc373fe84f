"""Gemma 4: images by token budgets, what layers see and share, bytes in its vocabulary, what is refused."""

from dataclasses import replace

import pytest
import torch

import family_models
from conftest import draw, make_problem
from rlcs.data.images import open_image
from rlcs.engines.cache import ForestCache
from rlcs.engines.local import LocalEngine
from rlcs.errors import ModelError
from rlcs.model import loading
from rlcs.model.families.gemma4 import BUDGETS, Gemma4
from rlcs.model.images import ImagePipeline
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.recipe.schema import Images, Model, Prompts
from rlcs.records import ImageRef
from rlcs.storage import read_json, write_json
from test_policy import CASES, make_trees

TOKEN = 48 * 48
"""Pixels of an image token of the published models."""
DEFAULT = Images().max_pixels


@pytest.fixture(scope="module", params=["gemma4", "gemma4_moe"])
def random_model_folder(request, tmp_path_factory):
    return family_models.build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def processor(random_model_folder):
    """With the published size of patches."""
    made = loading.load(Model(name=str(random_model_folder)), weights=False).processor
    made.image_processor.patch_size = 16
    return made


def pipeline(processor, most=DEFAULT):
    made = Gemma4().image_processing(processor, min_pixels=1, max_pixels=most)
    return ImagePipeline(made, decode_limit=10**9)


@pytest.mark.parametrize(
    ("most", "budget"),
    [(DEFAULT, 280), (70 * TOKEN, 70), (140 * TOKEN - 1, 70), (10**9, 1120), (1, 70)],
)
def test_the_largest_budget_within_the_bound_on_pixels_is_taken(processor, most, budget, caplog):
    images = pipeline(processor, most)
    assert budget in BUDGETS and processor.image_processor.max_soft_tokens == budget
    assert processor.image_seq_length == budget, "and saved with the processor"
    assert ("at least 161280" in caplog.text) == (most < 70 * TOKEN)
    for width, height in ((1, 1), (640, 480), (4000, 100), (33, 2000), (1, 10**6), (65_535, 3)):
        _, rows, columns = images.grid(ImageRef(sha256="0" * 64, width=width, height=height))
        assert rows % 3 == columns % 3 == 0 and 0 < rows * columns // 9 <= budget


@pytest.mark.parametrize("size", [(64, 48), (1, 1), (57, 1400), (1100, 900), (960, 672)])
def test_patches_are_the_processors_bit_by_bit_also_of_the_image_that_vllm_gets(processor, size):
    images, ref = pipeline(processor), draw(*size)
    for image in (open_image(ref), images.resized(ref)):
        expected = processor.image_processor(images=[image], return_tensors="pt")
        made = images.patches(ref)
        assert torch.equal(made, expected["pixel_values"][0, : len(made)])
        assert len(made) == 9 * int(expected["num_soft_tokens_per_image"][0])


def test_the_picture_is_what_the_model_sees(processor):
    ref = draw(960, 672)
    assert pipeline(processor).picture(ref).tobytes() == open_image(ref).tobytes()


def test_a_processor_with_other_arithmetic_is_refused(processor):
    processor.image_processor.rescale_factor = 1 / 127
    processor.image_processor.do_normalize = True
    with pytest.raises(ModelError, match="computes other patches"):
        pipeline(processor)


def test_the_budget_is_written_where_vllm_reads_it(vlm, tmp_path):
    loading.make_chat(vlm, images=Images(max_pixels=10**8))
    loading.save(vlm, tmp_path)
    assert read_json(tmp_path / "config.json")["vision_config"]["default_output_length"] == 1120


@pytest.mark.parametrize("changed", [{"vision_config": None}, {"text_config": "all"}])
def test_models_that_see_nothing_or_write_nothing_are_refused(random_model_folder, tmp_path, changed):
    for path in random_model_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = read_json(tmp_path / "config.json")
    if changed.get("text_config"):
        config["text_config"]["use_bidirectional_attention"] = "all"
    else:
        config |= changed
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ModelError, match=r"no vision tower, or writes no answers[\s\S]*choose E2B"):
        loading.load(Model(name=str(tmp_path)))


def test_keys_that_layers_share_are_kept_once(vlm, chat, monkeypatch):
    kept = []
    begin = ForestCache.begin_pass
    monkeypatch.setattr(ForestCache, "begin_pass", lambda cache, *a: kept.append(cache) or begin(cache, *a))
    prompts = [chat.prompt(make_problem("p"))]
    LocalEngine(vlm, chat, max_rows=2).sample(prompts, chat.sampling(max_new_tokens=3, n=2))
    modes = vlm.model.config.text_config.kv_sharing_modes
    own = [index for index, mode in enumerate(modes) if mode != "reuse"]
    assert kept and all(list(cache.rows.layers) == list(cache.trunks.layers) == own for cache in kept)
    assert {cache.sources[len(modes) - 1] for cache in kept} == {own[-1]}


def test_images_see_themselves_where_the_model_says_so_and_windows_end(vlm, chat):
    """What the proofs of packs would not notice, were it without effect here."""
    packed = pack(make_trees(chat, CASES["one tree"]), chat.patches)
    text = vlm.model.config.text_config

    def moved(layout=packed.layout, window=text.sliding_window):
        layers = vlm.model.model.language_model.layers
        for layer in layers:
            if layer.self_attn.is_sliding:
                layer.self_attn.sliding_window = window
        with torch.no_grad():
            return score(vlm, replace(packed, layout=layout)).logprobs

    right = moved()
    blind = moved(layout=replace(packed.layout, images=()))
    assert torch.equal(blind, right) != (text.use_bidirectional_attention == "vision")
    assert (moved(window=10**6) - right).abs().max() > 1e-3


def test_logits_are_bounded_in_training_and_in_sampling_alike(vlm, chat):
    states = 1000 * torch.randn(3, vlm.model.config.text_config.hidden_size)
    assert vlm.softcap == 5.0 and vlm.logits(states).abs().max() <= 5.0
    packed = pack(make_trees(chat, CASES["one tree"]), chat.patches)
    fused = score(replace(vlm, fused_loss=True), packed)
    torch.testing.assert_close(fused.logprobs, score(vlm, packed).logprobs, rtol=1e-5, atol=1e-5)


def test_the_bytes_of_tokens_are_those_of_the_text(chat):
    text = " Ünïcode ½ 数学 é <0x41>"
    assert b"".join(map(chat.token_bytes, chat.text_ids(text))) == text.encode()


def test_an_answer_begins_without_thoughts_where_the_template_says_so(vlm, chat):
    shown = "".join(map(chat.token, chat.prompt(make_problem("p", sizes=())).ids))
    says_so = "thought" in vlm.processor.chat_template
    assert shown.endswith("<|turn>model\n<|channel>thought\n<channel|>" if says_so else "<|turn>model\n")


def test_blanks_around_a_system_prompt_are_lost_as_in_the_template(vlm):
    chat = loading.make_chat(vlm, prompts=Prompts(system="  Think.\n"))
    shown = "".join(map(chat.token, chat.prompt(make_problem("p", sizes=())).ids))
    assert shown.startswith("<bos><|turn>system\nThink.<turn|>\n")
