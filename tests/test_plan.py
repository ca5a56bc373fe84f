"""`rlcs plan`: published sizes to the last parameter, work by hand, and advice that has been tried."""

import json
import re
import subprocess
import sys

import pytest
from transformers import Qwen2VLConfig, Qwen3VLConfig
from transformers.core_model_loading import revert_weight_conversion
from typer.testing import CliRunner

from rlcs.cli.main import app
from rlcs.errors import UserError
from rlcs.model.families import FAMILIES
from rlcs.model.source import BUILTIN
from rlcs.plan.data_size import Rows, rows_of
from rlcs.plan.layers import Attention
from rlcs.plan.machine import GIB, GPUS, Assumed, machine
from rlcs.plan.page import make_plan
from rlcs.plan.planner import largest_tree
from rlcs.plan.shapes import Sizes
from rlcs.plan.sizes import SIZES_FILE, sizes_of
from rlcs.plan.skeleton import PUBLISHED, measure, published, sizes_from_configuration, skeleton
from rlcs.plan.work import language, vision
from rlcs.recipe.loading import list_recipes, load_recipe, read_section
from rlcs.recipe.schema import Model
from rlcs.storage import read_json

HUB = "Qwen/Qwen2.5-VL-{}-Instruct"
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
PARAMETERS = {
    "3B": 3_754_622_976,
    "7B": 8_292_166_656,
    "32B": 33_452_718_336,
    "72B": 73_410_777_344,
}


def drafting(hidden, heads, key_values, *, mlp):
    """Parameters of Qwen3.5's layer that drafts tokens."""
    attention = 256 * (3 * hidden * heads + 2 * hidden * key_values + 2)
    return attention + mlp + 2 * hidden * hidden + 5 * hidden


def experts(hidden, width):
    """256 experts, one more for every token, and what chooses them."""
    return 257 * 3 * hidden * width + 257 * hidden


TOTALS = {
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 17_534_247_392 // 2,
    "Qwen/Qwen3-VL-32B-Instruct": 66_714_780_128 // 2,
    "Qwen/Qwen3-VL-30B-A3B-Instruct": 31_070_754_032,
    "Qwen/Qwen3-VL-235B-A22B-Instruct": 235_670_022_896,
    "Qwen/Qwen3.5-0.8B": 852_985_920,
    "Qwen/Qwen3.5-2B": 2_274_069_824 - drafting(2048, 8, 2, mlp=3 * 2048 * 6144),
    "Qwen/Qwen3.5-4B": 4_539_265_536,
    "Qwen/Qwen3.5-9B": 9_409_813_744,
    "Qwen/Qwen3.5-27B": 27_356_728_560,
    "Qwen/Qwen3.8-27B": 27_781_427_952 - drafting(5120, 24, 4, mlp=3 * 5120 * 17_408),
    "Qwen/Qwen3.5-35B-A3B": 35_107_181_936,
    "Qwen/Qwen3.6-35B-A3B": 35_951_822_704 - drafting(2048, 16, 2, mlp=experts(2048, 512)),
    "Qwen/Qwen3.5-122B-A10B": 125_086_497_008 - drafting(3072, 32, 2, mlp=experts(3072, 1024)),
    "Qwen/Qwen3.5-397B-A17B": 396_802_360_816,
    "google/gemma-4-31B-it": (62_546_177_752 - 2 * (60 + 2 * 1152)) // 2,
    "google/gemma-4-26B-A4B-it": 25_805_933_872,
}
"""Published numbers: of parameters, or of bytes of the weights in bfloat16 (of Gemma 4 with its buffers).

Some are with the layer that drafts tokens, which transformers does not load.
"""
ROUNDED = {  # billions on the model cards, of the vision part and of the whole
    "OpenGVLab/InternVL3_5-1B-HF": (0.3, 1.1),
    "OpenGVLab/InternVL3_5-2B-HF": (0.3, 2.3),
    "OpenGVLab/InternVL3_5-4B-HF": (0.3, 4.7),
    "OpenGVLab/InternVL3_5-8B-HF": (0.3, 8.5),
    "OpenGVLab/InternVL3_5-14B-HF": (0.3, 15.1),
    "OpenGVLab/InternVL3_5-38B-HF": (5.5, 38.4),
}


def planned(recipe, *overrides, gpus=8, gpu="H100", memory=None, words=()):
    assumed = read_section(Assumed, words, where="--assume")
    return make_plan(recipe, overrides, machine(gpus, gpu, memory=memory, peak=assumed.peak), assumed)


# --- published sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", PARAMETERS)
def test_published_sizes_to_the_last_parameter(size):
    sizes = sizes_of(Model(name=HUB.format(size)))
    assert sizes.total == PARAMETERS[size]
    text = published(HUB.format(size)).get_text_config()
    rows = text.vocab_size * text.hidden_size
    embeddings = rows * (1 if size == "3B" else 2)  # only the smallest ties its head to its embedding
    width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    attention = text.hidden_size * (2 * text.hidden_size + 2 * width) + text.hidden_size + 2 * width
    layer = attention + 3 * text.hidden_size * text.intermediate_size + 2 * text.hidden_size
    assert (
        sizes.parameters["language_model"] == embeddings + text.num_hidden_layers * layer + text.hidden_size
    )
    assert sizes.largest_layer == layer


def supported(names):
    return [name for name in names if published(name).model_type in FAMILIES]


@pytest.mark.parametrize("name", supported(TOTALS))
def test_parameters_are_those_that_were_published(name):
    sizes = sizes_of(Model(name=name))
    assert sizes.total == TOTALS[name] == sum(sizes.parameters.values())


@pytest.mark.parametrize("name", supported(ROUNDED))
def test_parameters_round_to_those_of_the_model_card(name):
    sizes = sizes_of(Model(name=name))
    vision, total = (round(number / 1e9, 1) for number in (sizes.parameters["vision_tower"], sizes.total))
    assert (vision, total) == ROUNDED[name]


@pytest.mark.parametrize(("size", "tensors"), [("3B", 824), ("7B", 729)])
def test_weights_are_named_as_in_the_published_checkpoints(size, tensors):
    config = published(HUB.format(size))
    model = skeleton(config)
    names = set(revert_weight_conversion(model, model.state_dict()))
    linear = ("weight", "bias")
    attention = {f"self_attn.{p}_proj.{k}" for p in "qkv" for k in linear} | {"self_attn.o_proj.weight"}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    layer = attention | norms | {f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    block = {f"attn.{p}.{k}" for p in ("qkv", "proj") for k in linear} | {"norm1.weight", "norm2.weight"}
    block |= {f"mlp.{p}_proj.{k}" for p in ("gate", "up", "down") for k in linear}
    merger = {f"visual.merger.mlp.{i}.{k}" for i in (0, 2) for k in linear} | {"visual.merger.ln_q.weight"}
    expected = {f"model.layers.{i}.{n}" for i in range(config.text_config.num_hidden_layers) for n in layer}
    expected |= {f"visual.blocks.{i}.{n}" for i in range(32) for n in block} | merger
    expected |= {"visual.patch_embed.proj.weight", "model.embed_tokens.weight", "model.norm.weight"}
    if size == "7B":
        expected.add("lm_head.weight")
    else:
        names.discard("lm_head.weight")  # tied: a name for the embedding, which is saved once
    assert names == expected
    assert len(expected) == tensors


@pytest.mark.parametrize("name", read_json(SIZES_FILE))
def test_the_table_holds_the_sizes_of_the_models_modules(name):
    """`python -m tools.plan_sizes` writes it anew."""
    known = sizes_of(Model(name=name))
    assert known == sizes_from_configuration(Model(name=name))
    assert known == Sizes.from_json(name, json.loads(json.dumps(known.to_json())))


def test_the_table_holds_all_published_and_built_in_models():
    assert set(read_json(SIZES_FILE)) == {*read_json(PUBLISHED), *BUILTIN}


def test_sizes_of_a_folder_are_those_of_the_loaded_model(random_model_folder, vlm):
    sizes = sizes_of(Model(name=str(random_model_folder)))
    assert sizes.total == sum(p.numel() for p in vlm.model.parameters())


def language_part(family: dict[str, object], hidden: int, intermediate: int, heads: int, **more: int):
    """The language part of a configuration."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    return {**family, **sizes, **more}


QWEN_2 = {"num_hidden_layers": 28, "rope_parameters": ROPE}
QWEN_3 = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 36}
SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
OTHERS = {
    "Qwen2-VL-2B": (
        2_208_985_600,
        Qwen2VLConfig(
            text_config=language_part(QWEN_2, 1536, 8960, 12, num_key_value_heads=2, vocab_size=151_936),
            vision_config={"hidden_size": 1536},
            tie_word_embeddings=True,
        ),
    ),
    "Qwen2-VL-7B": (
        8_291_375_616,
        Qwen2VLConfig(
            text_config=language_part(QWEN_2, 3584, 18_944, 28, num_key_value_heads=4, vocab_size=152_064),
            vision_config={"hidden_size": 3584},
        ),
    ),
    "Qwen3-VL-4B": (
        4_437_815_808,
        Qwen3VLConfig(
            text_config=language_part(QWEN_3, 2560, 9728, 32),
            vision_config=SMALL_TOWER | {"out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17]},
            tie_word_embeddings=True,
        ),
    ),
    "Qwen3-VL-8B": (
        8_767_123_696,
        Qwen3VLConfig(
            text_config=language_part(QWEN_3, 4096, 12_288, 32), vision_config={"out_hidden_size": 4096}
        ),
    ),
}
"""Published parameters and configurations of other families, as far as they decide sizes."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_planned_from_their_configuration(name, tmp_path):
    total, config = OTHERS[name]
    config.save_pretrained(tmp_path)
    plan = planned("recommended-7b", f"model.name={tmp_path}")
    assert plan.sizes.total == total == sum(plan.sizes.parameters.values())
    assert plan.stages["grpo"].parts["weights"] == 4 * total / 8


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-VL-3B-Instruct", *supported(TOTALS), *supported(ROUNDED), *OTHERS]
)
def test_operations_are_those_of_the_layers_that_there_are(name):
    """Two a weight of a linear layer and a token, and between tokens: from the model itself."""
    config = published(name) or OTHERS[name][1]
    sizes, text = measure(name, config), config.get_text_config()
    tower, tokens, patches = sizes.vision, 7, 256
    weights = {
        part: sum(n * x.inputs * x.outputs for x, n in sizes.linears.items() if x.part == part)
        for part in sizes.parameters
    }
    used = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None) or 0
    between = 0.0
    for layer, count in sizes.layers.items():
        router = 0 if layer.router_norm else layer.routed * text.hidden_size  # Gemma's is a linear layer
        chosen = 3 * text.hidden_size * layer.expert * used if layer.routed else 0
        weights["language_model"] += count * (router + chosen)
        if isinstance(layer.mixer, Attention):
            between += count * 4 * layer.mixer.queries * tokens * (tokens + 1) / 2
        else:
            heads, size, values = layer.mixer.heads, text.linear_key_head_dim, text.linear_value_head_dim
            a_head = 32 * (32 + 4 * values) + 6 * size * values
            keys = text.linear_num_key_heads * size
            inputs = 2 * keys + heads * values
            work = heads * a_head + 4 * 32 * keys + 2 * text.linear_conv_kernel_dim * inputs
            between += count * tokens * work
    assert language(sizes, tokens, []) == 2 * tokens * weights["language_model"] + between
    sees = tower.windowed * min(tower.window, patches) + (tower.depth - tower.windowed) * patches
    work = weights["vision_tower"] + weights["merger"] / tower.merge**2
    if published(name) is None or published(name).model_type != "gemma4":
        work += tower.pixels * tower.hidden  # a convolution; Gemma's is a linear layer
    assert vision(tower, patches) == 2 * patches * work + 4 * tower.hidden * patches * sees


def test_a_loaded_model_is_measured_by_its_configuration_which_stays(vlm):
    """Loading installs attention of ours, which is no attention that transformers finds by itself."""
    config = vlm.model.config
    before = config._attn_implementation, config.vision_config._attn_implementation
    parameters = sum(parameter.numel() for parameter in vlm.model.parameters())
    assert measure("loaded", config).total == parameters
    assert (config._attn_implementation, config.vision_config._attn_implementation) == before


# --- memory and work by hand ------------------------------------------------------------------------


def test_weights_gradients_and_optimiser_of_the_published_7b():
    stages = planned("recommended-7b").stages
    share = 4 * PARAMETERS["7B"] / 8  # float32 over 8 GPUs
    assert stages["grpo"].parts["weights"] == share
    assert stages["grpo"].parts["reference"] == share / 2  # in the format in which it computes
    tower = sizes_of(Model(name=HUB.format("7B"))).parameters["vision_tower"]
    assert stages["sft"].parts["gradients"] == 4 * (PARAMETERS["7B"] - tower) / 8
    assert stages["sft"].parts["optimizer"] == 2 * stages["sft"].parts["gradients"]
    less = planned("recommended-7b", "model.dtype=bfloat16").stages["sft"]
    assert less.parts["weights"] == share / 2


def test_experts_are_all_in_memory_and_may_be_frozen():
    """Of 48 layers with 128 experts of 768, 8 of them for a token."""
    model = "model.name=Qwen/Qwen3-VL-30B-A3B-Instruct"
    whole, frozen = (
        planned("recommended-7b", model, f"grpo.freeze=[vision_tower{more}]", gpus=64).stages["grpo"]
        for more in ("", ", experts")
    )
    experts, total = 48 * 128 * 3 * 2048 * 768, TOTALS["Qwen/Qwen3-VL-30B-A3B-Instruct"]
    assert whole.parts["weights"] == frozen.parts["weights"] == 4 * total / 64
    assert whole.parts["optimizer"] - frozen.parts["optimizer"] == 2 * 4 * experts / 64
    assert whole.flops < frozen.tokens * 20 * (total - experts * 120 / 128)
    assert frozen.parts["gathered"] < whole.parts["gathered"]
    assert (
        "30B-A3B-Instruct, 31,070,754,032 parameters, 3.9 G of them for a token"
        in planned("recommended-7b", model, gpus=64).to_text()
    )


def test_adapters_are_counted_layer_by_layer():
    stages = planned("single-gpu-lora-3b", "lora.rank=16", gpus=1).stages
    widths = 2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11008)  # q, o; k, v; gate, up, down
    adapters = 36 * 16 * widths
    assert stages["sft"].parts["gradients"] == 4 * adapters
    assert stages["grpo"].parts["optimizer"] == 8 * adapters
    assert stages["grpo"].parts["weights"] == 2 * PARAMETERS["3B"] + 4 * adapters
    assert stages["grpo"].parts["reference"] == 0  # the policy with its adapters off
    one = planned("single-gpu-lora-3b", "lora.rank=16", "lora.targets=[q_proj]", gpus=1).stages["sft"]
    assert one.parts["gradients"] == 4 * 36 * 16 * (2048 + 2048)
    packed = planned("single-gpu-lora-3b", "lora.rank=16", "lora.four_bit=true", gpus=1).stages["sft"]
    assert packed.parts["weights"] < 0.5 * stages["sft"].parts["weights"]  # tower, embedding: 16 bits


APART = ("rollout.engine=vllm_server", "rollout.servers=4", 'rollout.devices=["4", "5", "6", "7"]')


def test_gpus_that_sample_do_not_train():
    apart = planned("8xgpu-7b", *APART, gpus=8).stages["grpo"]
    assert apart.parts["weights"] == 4 * PARAMETERS["7B"] / 4
    assert apart.parts["rollout"] == 0
    beside = planned("8xgpu-7b", "rollout.memory_share=0.4").stages["grpo"]
    assert beside.parts["weights"] == 4 * PARAMETERS["7B"] / 8
    assert beside.parts["rollout"] == 0.4 * 80 * GIB
    with pytest.raises(UserError, match=r"rollout\.devices takes 4 GPUs, which leaves none of 4 to train"):
        planned("8xgpu-7b", *APART, gpus=4)


def test_servers_on_gpus_that_train_take_their_memory_all_the_time():
    shared = ("recommended-3b", "rollout.engine=vllm_server", "rollout.memory_share=0.3")
    alone = planned(*shared, "rollout.urls=[http://elsewhere]").stages["grpo"]
    assert alone.parts["rollout"] == 0
    for count, more in (
        (1, ()),  # no devices: the first GPU that it sees
        (2, ("rollout.servers=2",)),
        (1, ("rollout.servers=2", 'rollout.devices=["0,1,2,3", "4,5,6,7"]')),
        (2, ("rollout.servers=2", 'rollout.devices=["0,1,2,3,4,5,6,7", "7"]')),
    ):
        beside = planned(*shared, *more).stages["grpo"]
        assert beside.parts["weights"] == alone.parts["weights"] == 4 * PARAMETERS["3B"] / 8
        assert beside.parts["rollout"] == count * 0.3 * 80 * GIB
        assert beside.peak == pytest.approx(alone.peak + 1.05 * beside.parts["rollout"])
        assert planned(*shared, *more).stages["sft"].parts.get("rollout") is None
    twice = planned(*shared, "rollout.servers=2", 'rollout.devices=["6,7", "7"]').stages["grpo"]
    assert twice.parts["weights"] == 4 * PARAMETERS["3B"] / 6 and twice.parts["rollout"] == 0
    full = planned(*shared[:2], "rollout.servers=1")  # vLLM's own share is nearly all
    assert not full.fits and full.advice.changes == ("rollout.memory_share=0.6",)


def test_what_is_offloaded_leaves_the_gpus_for_main_memory():
    here = planned("recommended-3b").stages
    there = planned("recommended-3b", "parallel.cpu_offload=true").stages
    for stage in ("sft", "grpo"):
        moved = [here[stage].parts.get(name) for name in ("weights", "gradients", "optimizer", "reference")]
        assert there[stage].parts["offloaded"] == sum(moved) and here[stage].parts["offloaded"] == 0
        assert not any(
            there[stage].parts[name] for name in ("weights", "gradients", "optimizer", "reference")
        )
        assert there[stage].parts["gathered"] > here[stage].parts["gathered"]
    assert there["grpo"].parts["offloaded"] == (4 + 2) * PARAMETERS["3B"] / 8 + 12 * trained("3B") / 8
    assert there["grpo"].parts["rollout"] == here["grpo"].parts["rollout"]
    one = planned("recommended-3b", "model.dtype=bfloat16", "parallel.compute_dtype=same", gpus=1).stages[
        "grpo"
    ]
    moved = planned(
        "recommended-3b", "model.dtype=bfloat16", "parallel.compute_dtype=same", "parallel.cpu_offload=true",
        gpus=1,
    ).stages["grpo"]  # fmt: skip
    assert moved.parts["rollout"] == one.parts["rollout"] + 2 * PARAMETERS["3B"]  # gathered to sample


def trained(size: str) -> int:
    """Parameters that learn with the tower frozen."""
    return PARAMETERS[size] - sizes_of(Model(name=HUB.format(size))).parameters["vision_tower"]


@pytest.mark.parametrize(("name", "gpus"), [("qwen3vl-8b", 8), ("qwen3_5-9b", 8), ("qwen3_5-4b", 1)])
def test_recipes_for_newer_models_fit_80_gb(name, gpus):
    assert planned(name, gpus=gpus).fits
    assert not planned(name, gpus=max(1, gpus // 2), memory=80 if gpus > 1 else 32).fits


def test_single_gpu_recipe_fits_where_it_says():
    assert planned("single-gpu-lora-3b", gpus=1, memory=48).fits
    assert planned("single-gpu-lora-3b", gpus=1, memory=24).fits
    local = ("single-gpu-lora-3b", "rollout.engine=local")
    assert planned(*local, gpus=1, memory=48).fits
    assert planned(*local, "grpo.max_rows=40", gpus=1, memory=24).fits
    assert planned("8xgpu-7b", gpus=8).fits and planned("paper-7b", gpus=8).fits
    assert planned("8xgpu-7b", "parallel.cpu_offload=true", gpus=8, memory=48).fits
    assert not planned("8xgpu-7b", gpus=8, memory=48).fits
    few = ("grpo.max_rows=40", "eval.max_rows=40")
    assert planned("recommended-3b", "parallel.cpu_offload=true", *few, gpus=1, memory=24).fits


def test_a_measurement_is_one_whole_model_and_its_answers():
    local = ("single-gpu-lora-3b", "rollout.engine=local")
    one = planned(*local, "lora.four_bit=true", gpus=1, memory=24).stages["eval"]
    assert one.parts["weights"] == 2 * PARAMETERS["3B"]  # adapters merged, and nothing in 4 bits
    token = 2 * 2 * 36 * 2 * 128  # keys and values in bfloat16: layers, heads, width
    cache = 2 * 40 * token * (2048 + 2048)  # twice while it grows
    assert cache < one.parts["rollout"] < cache + 2 * GIB and one.fits
    more = planned(*local, "eval.max_rows=256", gpus=1, memory=24)
    assert not more.stages["eval"].fits and "eval.max_rows=32" in more.advice.changes
    spread = planned("recommended-3b", "eval.max_rows=256", gpus=8).stages["eval"]
    assert spread.parts["weights"] == 4 * PARAMETERS["3B"] / 8
    whole, cache = 2 * PARAMETERS["3B"], 2 * 32 * token * (2048 + 2048)  # of 256 problems each has 32
    assert whole + cache < spread.parts["rollout"] < whole + cache + 2 * GIB
    plain = planned("quickstart", "model.name=Qwen/Qwen2.5-VL-3B-Instruct", gpus=1).stages
    learns, answers = (plain[name].parts["weights"] for name in ("sft", "eval"))
    assert learns == 2 * answers, "float32 where weights learn, bfloat16 where they answer"
    away = planned("recommended-3b", "parallel.cpu_offload=true", gpus=8).stages["eval"]
    assert away.parts["weights"] == 0 and away.parts["offloaded"] == 4 * PARAMETERS["3B"] / 8
    assert planned("8xgpu-7b", *APART).stages["eval"].parts["rollout"] == 0
    beside = planned("recommended-3b", "rollout.engine=vllm_colocated", "rollout.memory_share=0.4", gpus=1)
    assert beside.stages["eval"].parts["rollout"] == 0.4 * 80 * GIB


def test_a_prompt_is_counted_once_for_all_of_its_answers():
    words = ("text=100", "image=400", "answer=300")
    plan = planned("recommended-3b", "grpo.group_size=10", "grpo.prompts_per_step=64", words=words).stages[
        "grpo"
    ]
    assert plan.tokens == 64 * (500 + 10 * 300)
    assert plan.repeated_tokens == 64 * 10 * (500 + 300)
    assert plan.repeated_flops > 1.5 * plan.flops


def test_operations_are_about_two_a_parameter_a_token_and_pass():
    """The usual estimate, 6 parameters tokens, without attention's share, the tower's and recomputation."""
    words = ("text=200", "image=0", "answer=100")
    images = "images.min_pixels=1"
    plan = planned("recommended-7b", images, "model.gradient_checkpointing=false", words=words).stages["sft"]
    sizes = sizes_of(Model(name=HUB.format("7B")))
    rows = sizes.head
    body = sizes.parameters["language_model"] - 2 * rows
    assert plan.tokens == 64 * 300
    assert plan.flops == pytest.approx(6 * 64 * (300 * body + 100 * rows), rel=0.01)
    again = planned("recommended-7b", images, words=words).stages["sft"]
    assert again.flops == pytest.approx(plan.flops * 4 / 3)


def test_memory_is_for_answers_at_their_limit_and_time_for_the_assumed_ones():
    recipe = load_recipe("recommended-3b").recipe
    tower, grpo, prompt = sizes_of(recipe.model).vision, recipe.grpo, recipe.prompt.max_tokens
    tree = largest_tree(
        recipe.images, tower, prompt=prompt, group=grpo.group_size, answer=grpo.max_new_tokens
    )
    assert tree.tokens == 2048 + 10 * 2048 > recipe.grpo.pack_tokens
    plan = planned("recommended-3b")
    longer = planned("recommended-3b", words=("answer=1000",))
    assert longer.stages["grpo"].peak == plan.stages["grpo"].peak
    assert longer.stages["grpo"].time.seconds > plan.stages["grpo"].time.seconds


@pytest.mark.parametrize(
    ("override", "stage"),
    [
        ("model.gradient_checkpointing=true", "sft"),
        ("sft.pack_tokens=2048", "sft"),
        ("sft.freeze=[vision_tower]", "sft"),
        ("grpo.max_rows=64", "grpo"),
        ("grpo.kl.kind=none", "grpo"),
        ("grpo.group_size=5", "grpo"),
    ],
)
def test_what_should_save_memory_does(override, stage):
    base = ["recommended-3b", "sft.freeze=[]"]
    if override != "grpo.max_rows=64":  # with all activations kept, GRPO's worst moment is not the rollout
        base.append("model.gradient_checkpointing=false")
    assert planned(*base, override).stages[stage].peak < planned(*base).stages[stage].peak


def test_more_gpus_share_memory_and_work():
    few, many = planned("paper-7b", gpus=8).stages["grpo"], planned("paper-7b", gpus=16).stages["grpo"]
    assert many.parts["optimizer"] == few.parts["optimizer"] / 2
    name = "forward and backward passes"
    [before, after] = [{p.name: p.seconds for p in stage.time.phases}[name] for stage in (few, many)]
    assert after == pytest.approx(before / 2)
    assert many.tokens == few.tokens


# --- advice ---------------------------------------------------------------------------------------


def test_advice_has_been_tried_and_nothing_in_it_is_superfluous():
    asked = ("recommended-3b", "model.gradient_checkpointing=false", "grpo.max_rows=256")
    plan = planned(*asked, gpus=1, memory=79)
    assert not plan.fits and plan.advice is not None
    changes = plan.advice.changes
    assert changes and not plan.advice.alters
    assert planned(*asked, *changes, gpus=1, memory=79).fits
    for left in range(len(changes)):
        fewer = [change for index, change in enumerate(changes) if index != left]
        assert not planned(*asked, *fewer, gpus=1, memory=79).fits
    assert plan.advice.gpus is None  # a pack is not shared between devices, so more of them do not help


def test_more_gpus_are_advised_where_they_help():
    plan = planned("recommended-3b", gpus=1, memory=60)
    assert plan.advice is not None and plan.advice.gpus is not None
    assert planned("recommended-3b", gpus=plan.advice.gpus, memory=60).fits
    assert not planned("recommended-3b", gpus=plan.advice.gpus // 2, memory=60).fits


def test_main_memory_is_advised_before_what_changes_the_result():
    asked = ("recommended-3b", "grpo.max_rows=40", "eval.max_rows=40")
    plan = planned(*asked, gpus=1, gpu="RTX4090")
    assert plan.advice is not None and not plan.advice.alters
    assert plan.advice.changes == ("parallel.cpu_offload=true",)
    assert planned("quickstart", gpus=0, memory=1).advice.changes is None  # a CPU has no other memory


def test_4_bits_are_advised_only_where_they_train():
    """Without torchrun: one GPU, one number format, nothing offloaded."""
    one = planned("single-gpu-lora-3b", "rollout.engine=local", gpus=1, memory=13).advice
    assert "lora.four_bit=true" in one.changes and "parallel.cpu_offload=true" not in one.changes
    assert "lora.four_bit=true" in one.alters
    for recipe, gpus in (("single-gpu-lora-3b", 2), ("paper-7b", 1)):
        advice = planned(recipe, gpus=gpus, memory=13).advice
        assert advice is not None and "lora.four_bit=true" not in (advice.changes or ())


def test_where_nothing_helps_it_says_so():
    plan = planned("paper-7b", gpus=1, memory=12)
    assert plan.advice is not None and plan.advice.changes is None
    assert "no change of the recipe is enough" in plan.to_text()


# --- what runs, and what it comes to ------------------------------------------------------------------


def total(*words: str) -> dict:
    done = CliRunner().invoke(app, ["plan", *words, "--json"])
    assert done.exit_code == 0, done.exception
    return json.loads(done.output)["total"]


def test_a_plan_counts_what_a_command_runs():
    order = ["measuring base", "cold start", "SFT", "measuring SFT only"]
    order += ["RL after SFT", "measuring Cold start + RL"]
    run, ablate = total("paper-7b", "--gpus", "8"), total("paper-7b", "--gpus", "8", "--command", "ablate")
    assert [stage["name"] for stage in run["stages"]] == order
    assert [stage["name"] for stage in ablate["stages"]] == [*order, "RL only", "measuring RL only"]
    hours = {stage["name"]: stage["hours"] for stage in ablate["stages"]}
    assert hours["RL only"] == hours["RL after SFT"] > hours["SFT"] > hours["measuring base"] > 0
    assert run["hours"] == pytest.approx(sum(s["hours"] for s in run["stages"]), abs=0.005)
    assert run["gpu_hours"] == pytest.approx(8 * run["hours"], abs=0.01) and not run["unknown"]
    assert ablate["hours"] == pytest.approx(
        run["hours"] + hours["RL only"] + hours["measuring RL only"], abs=0.01
    )
    thrice = total("paper-7b", "--gpus", "8", "--command", "ablate", "--seeds", "3")
    assert thrice["hours"] == pytest.approx(3 * ablate["hours"], abs=0.01)
    named = total("paper-7b", "--command", "ablate", "study.arms=[base, grpo]")
    assert named["arms"] == ["base", "grpo"] and named["teacher"] is None


def test_only_what_runs_must_fit():
    done = CliRunner().invoke(
        app, ["plan", "paper-7b", "--gpus", "8", "grpo.max_rows=512", "--command", "sft"]
    )
    assert re.search(r"^ +sft +eval$", done.output, re.M) and "It does not fit" not in done.output


@pytest.mark.parametrize(
    ("price", "shown"),
    [("2.5", "at 2.50 a GPU-hour"), ("2.50 USD", "USD at 2.50 USD a GPU-hour"), ("EUR 3", "3.00 EUR")],
)
def test_money_at_a_price(price, shown):
    words = ["recommended-3b", "--gpus", "4", "--price", price]
    done, found = CliRunner().invoke(app, ["plan", *words]), total(*words)
    assert shown in done.output and re.search(r"^total: .* hours, .* GPU-hours, ", done.output, re.M)
    assert found["cost"] == pytest.approx(
        float(re.search(r"[\d.]+", price)[0]) * found["gpu_hours"], rel=0.001
    )


def test_a_teacher_s_tokens_and_their_cost(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n' * 50)
    words = ["quickstart", f"data.cold_start={tmp_path / 'rows.jsonl'}", "teacher.max_samples=4"]
    words += ["teacher.model=m", "teacher.base_url=http://localhost:1/v1", "teacher.chain=reflection"]
    free = total(*words)
    assert free["teacher"]["requests"] == 50 * 4 * 2 and free["teacher"]["cost"] is None
    assert free["teacher"]["completion_tokens"] == 50 * 4 * 2 * 512
    assert free["unknown"] == ["cold start"], "how fast the teacher is nobody knows"
    paid = total(*words, "teacher.prompt_price=1", "teacher.completion_price=10")["teacher"]
    assert paid["cost"] == pytest.approx((paid["prompt_tokens"] + 10 * paid["completion_tokens"]) / 1e6)
    text = CliRunner().invoke(app, ["plan", *words]).output
    assert "400 requests" in text and "total: at least" in text and "without cold start" in text


def test_rows_are_counted_in_every_kind_of_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    given = tmp_path / "given.jsonl"
    given.write_text('\n{"question": "a", "response": "b"}\n\n{"question": "c", "response": "d"}')
    table = pyarrow.table({"question": ["a", "b", "c"], "answer": ["1", "2", "3"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert (rows_of(str(given), ("response",)).count, rows_of(str(given), ("response",)).answered) == (
        2,
        True,
    )
    assert not rows_of(str(given), ("worked",)).answered
    assert rows_of(str(tmp_path / "rows.parquet"), ("response",)) == Rows(count=3, basis="rows of the file")
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    shared = tmp_path / "shared.json"
    shared.write_text(json.dumps([{"conversations": turns}] * 20))
    assert rows_of(f"{shared}?part=test") == Rows(count=2, basis="rows of the file", answered=True)
    assert rows_of(f"{shared}?part=train&share=0.2").count == 16
    assert rows_of("builtin:puzzles?count=70&seed=1").count == 70 and rows_of("builtin:puzzles").count == 1000
    assert rows_of("someone/something").count is None and rows_of(str(tmp_path)).count is None
    unknown = total("quickstart", "data.cold_start=someone/something")
    assert unknown["unknown"] == ["SFT"]
    assert not total("quickstart", "data.cold_start=someone/something", "--assume", "demonstrations=99")[
        "unknown"
    ]


def test_measuring_while_training_takes_time():
    plain = total("paper-7b", "--gpus", "8")
    often = total("paper-7b", "--gpus", "8", "validation.grpo_every=10", "validation.samples=4")
    difference = {s["name"]: s["hours"] for s in often["stages"]}["RL after SFT"]
    difference -= {s["name"]: s["hours"] for s in plain["stages"]}["RL after SFT"]
    answer = plain["stages"][0]["hours"] / 601
    assert difference == pytest.approx((2 + 12) * 200 * 4 * answer, rel=0.15)


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["qickstart"], "quickstart"),
        (["paper-7b", "grpo.stps=3"], "grpo.steps"),
        (["paper-7b", "--price", "x"], "2.5"),
    ],
)
def test_a_mistyped_word_is_told_before_torch_is_loaded(words, near):
    program = (
        "import sys; from rlcs.cli.main import app; from rlcs.errors import UserError\n"
        f"try: app(['plan', *{words!r}], standalone_mode=False)\n"
        "except UserError as error: print(error, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert near in done.stdout and done.stdout.strip().endswith("False"), done.stdout + done.stderr


# --- the verb and its errors ------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_can_be_planned_without_network(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = CliRunner().invoke(app, ["plan", name, "--gpus", "8", "--memory", "80", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.output)
    size = next((n for key, n in PARAMETERS.items() if key in plan["model"]), None)
    assert size is None or plan["parameters"] == size
    assert list(plan["stages"]) == ["sft", "grpo", "eval"]
    for stage in plan["stages"]:
        assert plan["stages"][stage]["memory_gb"] > 0
        assert plan["stages"][stage]["fits"] in (True, False)
    assert plan["fits"] == all(stage["fits"] for stage in plan["stages"].values())


def test_the_text_names_what_a_person_looks_for():
    done = CliRunner().invoke(app, ["plan", "paper-7b", "--gpus", "8", "--assume", "demonstrations=51534"])
    assert done.exit_code == 0, done.output
    for words in ("8,292,166,656 parameters", "8 x H100 with 80 GB", "optimizer", "seconds a step", "2,416"):
        assert words in done.output
    assert "It does not fit" not in done.output
    assert re.search(r"^ +sft +grpo +eval$", done.output, re.M)
    assert re.search(r"^fits +yes +yes +yes$", done.output, re.M)
    done = CliRunner().invoke(app, ["plan", "paper-7b", "--gpus", "8", "grpo.max_rows=512"])
    assert "It does not fit" in done.output and "here, with: grpo.max_rows=" in done.output


@pytest.mark.parametrize("columns", [80, 120])
def test_the_page_fits_a_screen_and_explains_every_second_when_asked(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    words = ["plan", "8xgpu-7b", "--gpus", "8"]
    short, whole = (CliRunner().invoke(app, [*words, *more]).output for more in ([], ["--explain"]))
    lines = short.splitlines()
    assert lines[2] == "it fits: 69.2 GB of 80 GB at worst" and lines[3].startswith(
        "5.99 hours, 48 GPU-hours"
    )
    assert len(lines) < 40 and max(map(len, lines)) <= 108
    assert "waiting for the largest pack" not in short and "rates, guessed" not in short
    assert lines[-1].startswith("every second of a step: --explain; real rates: `rlcs doctor --gpu --out")
    page, explanation = whole[: len(short)].splitlines(), whole.partition("packed trees")[2].splitlines()
    assert page[:30] == lines[:30], "the summary stands first"
    assert max(map(len, explanation)) <= columns
    for phase in planned("8xgpu-7b").stages["grpo"].time.phases:
        assert f"{phase.name:<32}{phase.seconds:>8.1f} s" in whole


def test_a_recipe_that_does_not_fit_says_so_first():
    lines = planned("8xgpu-7b", gpus=8, memory=48).to_text().splitlines()
    assert re.fullmatch(r"it does not fit: [\d.]+ GB of 48 GB at worst; what would is at the end", lines[2])


def test_groups_that_do_not_divide_the_gpus_are_refused_as_a_run_refuses_them():
    with pytest.raises(UserError, match="12 ranks cannot be divided into groups of 8"):
        planned("8xgpu-7b", "parallel.shard_size=8", gpus=12)
    assert planned("8xgpu-7b", "parallel.shard_size=8", gpus=16).fits
    # More GPUs than were asked for are tried too; those that the groups do not divide are passed over.
    assert planned("8xgpu-7b", "parallel.shard_size=6", gpus=4, memory=16).advice is not None


def test_a_cpu_can_be_planned_for():
    plan = planned("quickstart", gpus=0)
    assert plan.fits and plan.stages["sft"].parts["weights"] == 4 * plan.sizes.total


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "-1"], "-1 GPUs"),
        (["--gpu", "H10"], "did you mean H100?"),
        (["--memory", "0"], "0 GB of memory"),
        (["--assume", "answr=3"], "did you mean answer?"),
        (
            ["--assume", "answer=many"],
            'answer should be a whole number at least 1 and at most 1,000,000,000 (got "many")',
        ),
        (
            ["--assume", "answer=0"],
            "answer should be a whole number at least 1 and at most 1,000,000,000 (got 0)",
        ),
        (["--assume", "peak"], "peak should be a number at least 0 (got null)"),
        (["--assume", "utilization=1.5"], "utilization should be a number above 0 and at most 1 (got 1.5)"),
        (["grpo.steps=-1"], "grpo.steps should be"),
        (["model.name=./nowhere"], "known without network: builtin, Qwen/Qwen2.5-VL-3B-Instruct"),
    ],
)
def test_what_cannot_be_planned_is_said(words, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = CliRunner().invoke(app, ["plan", "quickstart", *words])
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)


def test_the_table_of_gpus_is_plausible():
    for device in GPUS.values():
        assert 16 <= device.memory <= 300
        assert device.float32 < device.bfloat16
        assert machine(1, device.name.lower(), memory=None, peak=0).device == device


def test_demonstrations_in_the_steps_of_the_mixed_arm_are_counted():
    def stages(count):
        words = ["study.arms=[base, mixed]", "grpo.also.sft=0.5", "grpo.also.arms=[mixed]"]
        return planned("quickstart", *words, f"grpo.also.sft_batch_size={count}").stages

    few, many = stages(32), stages(64)
    assert few["grpo"].tokens == many["grpo"].tokens
    of_32 = few["mixed"].tokens - few["grpo"].tokens
    assert of_32 > 0 and many["mixed"].tokens - many["grpo"].tokens == 2 * of_32
    assert many["mixed"].time.seconds > few["mixed"].time.seconds > few["grpo"].time.seconds
    assert few["mixed"].peak >= few["grpo"].peak


def test_a_teacher_beside_the_policy_takes_memory():
    words = ["model.name=" + HUB.format("3B"), "grpo.also.distill=1", "grpo.also.arms=[sft_grpo]"]
    words += ["grpo.temperature=1", "model.dtype=bfloat16"]
    none = planned("quickstart", words[0], words[-1], gpus=1).stages["grpo"]
    local = planned("quickstart", *words, "grpo.teacher.model=" + HUB.format("7B"), gpus=1).stages["grpo"]
    size = PARAMETERS["7B"] * 2
    assert local.parts["teacher"] == size and local.peak - none.peak == pytest.approx(1.05 * size, rel=0.02)
    url = ["grpo.teacher.model=" + HUB.format("7B"), "grpo.teacher.base_url=http://localhost:9/v1"]
    assert planned("quickstart", *words, *url, gpus=1).stages["grpo"].peak == none.peak


def test_a_limit_of_demonstrations_is_planned_with():
    def steps(*words):
        return planned("quickstart", *words).stages["sft"].steps

    assert steps("data.max_demonstrations=64", "sft.batch_size=16", "sft.epochs=2") == 8
    assert steps("data.max_demonstrations=1000000") == steps()
