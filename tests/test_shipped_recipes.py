"""The recipes for real models: the paper's values one by one, and one step on layers of the real shape."""

import json
from itertools import pairwise

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from conftest import draw, make_problem
from rlcs.data.loading import load
from rlcs.model import attention, loading
from rlcs.model.chat import default_system
from rlcs.model.chat_format import CHATML
from rlcs.model.families import FAMILIES
from rlcs.model.families.qwen2_vl import DEFAULT_SYSTEM
from rlcs.model.packing import pack
from rlcs.model.vlm import Vlm
from rlcs.plan.skeleton import published
from rlcs.recipe.loading import differences, load_recipe
from rlcs.recipe.schema import Recipe
from rlcs.recipe.table import summary_rows
from rlcs.records import Demonstration
from rlcs.records.trees import Branch, Tree
from rlcs.train import sft
from rlcs.train.learning import make_objective
from rlcs.train.losses import sft_loss
from rlcs.train.trainer import Batch, Trainer
from tools import tiny_model

PAPER = {
    "prompt.system": "Please reason step by step, and put your final answer within \\boxed{}.",
    "prompt.rl_system": DEFAULT_SYSTEM,
    "prompt.max_tokens": 2048,
    "images.min_pixels": 3136,
    "images.rl_min_pixels": 262_144,
    "images.max_pixels": 1_204_224,
    "data.cold_start": "WaltonFuture/Multimodal-Cold-Start?response=answer",
    "data.rl": "WaltonFuture/Multimodal-RL-Data",
    "data.test": "hiyouga/geometry3k",
    "model.gradient_checkpointing": True,
    "sft.epochs": 3,
    "sft.batch_size": 64,
    "sft.freeze": ("vision_tower",),
    "sft.loss_average": "token",
    "sft.save_every": 20,
    "sft.keep_checkpoints": 2,
    "sft.optimizer.lr": 1e-5,
    "sft.optimizer.schedule": "cosine",
    "sft.optimizer.warmup_steps": 0,
    "sft.optimizer.betas": (0.9, 0.95),
    "sft.optimizer.weight_decay": 0.1,
    "sft.optimizer.max_grad_norm": 1.0,
    "grpo.steps": 2 * (31_818 // 512),
    "grpo.prompts_per_step": 512,
    "grpo.group_size": 10,
    "grpo.optimizer_steps": 512 // 128,
    "grpo.temperature": 0.7,
    "grpo.top_p": 0.99,
    "grpo.max_new_tokens": 2048,
    "grpo.advantage": "grpo",
    "grpo.loss": "grpo",
    "grpo.clip_low": 0.2,
    "grpo.clip_high": 0.3,
    "grpo.clip_dual": 3.0,
    "grpo.loss_average": "micro_batch",
    "grpo.old_logprobs": "policy",
    "grpo.dynamic_sampling": 0,
    "grpo.freeze": (),
    "grpo.save_every": 5,
    "grpo.keep_checkpoints": 7,
    "grpo.kl.kind": "k3",
    "grpo.kl.coefficient": 0.01,
    "grpo.optimizer.lr": 1e-6,
    "grpo.optimizer.schedule": "constant",
    "grpo.optimizer.warmup_steps": 0,
    "grpo.optimizer.betas": (0.9, 0.999),
    "grpo.optimizer.weight_decay": 0.01,
    "grpo.optimizer.max_grad_norm": 1.0,
    "grpo.reward.allow_fallbacks": False,
    "eval.temperature": 0.5,
    "seed": 1,
}


@pytest.mark.parametrize("size", ["3", "7"])
def test_paper_recipes_say_every_value_themselves(size):
    """Spelled out in the file, so that a changed default of ours does not change the paper."""
    resolved = load_recipe(f"paper-{size}b")
    assert resolved.recipe.model.name == f"Qwen/Qwen2.5-VL-{size}B-Instruct"
    for key, value in PAPER.items():
        found = resolved.recipe
        for name in key.split("."):
            found = getattr(found, name)
        assert found == value, key
        assert resolved.provenance[key].startswith("recipes/paper-7b.yaml"), key


def test_recommended_differs_from_the_paper_in_its_quirks_alone():
    paper, ours = load_recipe("paper-7b").recipe, load_recipe("recommended-7b").recipe
    assert {key for key, _, _ in differences(paper, ours)} == {
        "name",
        "prompt.rl_system",
        "images.rl_min_pixels",
        "grpo.top_p",
        "grpo.loss_average",
        "grpo.freeze",
        "grpo.dynamic_sampling",
        "eval.temperature",
    }
    small = load_recipe("recommended-3b").recipe
    assert {key for key, _, _ in differences(ours, small)} == {"name", "model.name"}


def test_recipes_for_newer_models_differ_in_what_the_model_asks_for():
    """Images of other tokens and longer answers; and on one GPU what `single-gpu-lora-3b` has."""
    names = ("8xgpu-7b", "qwen3vl-8b", "qwen3_5-9b", "qwen3_5-4b")
    recipes = {name: load_recipe(name).recipe for name in names}
    changed = [
        {key for key, _, _ in differences(recipes[first], recipes[second])} - {"name", "model.name"}
        for first, second in pairwise(names)
    ]
    images = {"images.min_pixels", "images.max_pixels"}
    lengths = {"grpo.group_size", "grpo.max_new_tokens", "eval.max_new_tokens", "eval.max_rows"}
    assert changed[:2] == [images | lengths, {"eval.max_rows", "prompt.thinking"}]
    whole, one_gpu = (load_recipe(name).recipe for name in ("recommended-3b", "single-gpu-lora-3b"))
    small = {key for key, _, _ in differences(whole, one_gpu)}
    assert changed[2] - small == set(), "as on one GPU with 3B"
    assert {recipes[name].images.max_pixels // 32**2 for name in names[1:]} == {1536}


ROOM = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (3.755e9, 36_864, 0),
    "Qwen/Qwen2.5-VL-7B-Instruct": (8.293e9, 57_344, 0),
    "Qwen/Qwen3-VL-8B-Instruct": (8.767e9, 147_456, 0),
    "Qwen/Qwen3.5-9B": (9.410e9, 32_768, 51_511_296),
    "Qwen/Qwen3.5-4B": (4.539e9, 32_768, 51_511_296),
}
"""Parameters, and in bfloat16 the bytes of a token's keys and values and of a row's states."""


@pytest.mark.parametrize(
    ("name", "gpus", "memory"),
    [
        ("single-gpu-lora-3b", 1, 24),
        ("paper-3b", 1, 80),
        ("recommended-3b", 1, 80),
        ("paper-7b", 4, 80),
        ("recommended-7b", 4, 80),
        ("8xgpu-7b", 4, 80),
        ("multi-node", 4, 80),
        ("qwen3vl-8b", 4, 80),
        ("qwen3_5-9b", 4, 80),
        ("qwen3_5-4b", 1, 80),
    ],
)
def test_a_measurement_finds_room_beside_the_model(name, gpus, memory):
    """By the local engine: the model whole in bfloat16, its float32 shard, and every row at its limit."""
    recipe = load_recipe(name).recipe
    model, token, state = ROOM[recipe.model.name]
    weights = model * (2 + (4 / gpus if recipe.model.dtype == "float32" else 0))
    tokens = recipe.prompt.max_tokens + recipe.eval.max_new_tokens
    row = 2 * (token * tokens + 2 * state)  # twice while it is copied; the prompt has a state too
    beside = 2e9 + 1.5e9  # prefilling, and what a process holds before any model
    room = 0.95 * memory * 2**30 - weights - beside
    assert recipe.eval.max_rows * row < room < 256 * row


def test_the_paper_s_data_is_read_as_the_paper_reads_it(tmp_path):
    """One set has worked responses under `answer`, the other gold answers."""
    recipe = load_recipe("paper-7b").recipe
    (tmp_path / "one.png").write_bytes(draw(56, 56).data)
    rows = {"cold": "Twice two, so \\boxed{4}.", "rl": "4"}
    for name, answer in rows.items():
        row = {"problem": "<image>How many?", "answer": answer, "images": ["one.png"]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    options = recipe.data.cold_start.partition("?")[2]
    cold = load(
        f"{tmp_path / 'cold.jsonl'}?{options}", recipe.data, decode_limit=10**6, role="cold_start"
    ).rows[0]
    assert cold.response == rows["cold"] and cold.problem.answer == "4"
    assert (
        load(str(tmp_path / "rl.jsonl"), recipe.data, decode_limit=10**6, role="rl").rows[0].problem.answer
        == "4"
    )


def test_rl_can_have_a_system_prompt_of_its_own(vlm):
    prompts = Recipe(prompt={"system": "Train.", "rl_system": "Reinforce."}).prompt
    problem = make_problem("words")
    for rl, word in ((False, "Train."), (True, "Reinforce.")):
        chat = loading.make_chat(vlm, prompts, rl=rl)
        assert [w in chat.text(chat.prompt(problem).ids) for w in ("Train.", "Reinforce.")].count(True) == 1
        assert word in chat.text(chat.prompt(problem).ids)
    assert default_system(vlm.processor, CHATML) == "Train.", "a saved model carries the prompt of all stages"


def test_rl_can_have_a_smallest_image_of_its_own(vlm):
    recipe = Recipe(images={"min_pixels": 3136, "rl_min_pixels": 112 * 112})
    problem = make_problem("small", sizes=((56, 56),))
    tokens = [
        sum(
            end - start
            for start, end in loading.make_chat(vlm, recipe.prompt, recipe.images, rl=rl)
            .prompt(problem)
            .spans
        )
        for rl in (False, True)
    ]
    assert tokens == [4, 16]
    assert dict(summary_rows(recipe))["image size in RL"].startswith("12,544 to")


# --- a step on layers of the real shape -----------------------------------------------------------


def real_layers():
    """Qwen2.5-VL-3B's layers, random: one of the language model, a windowed and a full block of the tower.

    The vocabulary is cut from 151,936 to 8,192 words: whole, the embedding's weights, gradients and
    AdamW's state alone would take 5 GB. So it is 172M parameters; the test takes 3.5 GB at most.
    """
    processor = tiny_model.build_processor(tiny_model.corpus(50))
    words = {word: processor.tokenizer.convert_tokens_to_ids(word) for word in tiny_model.SPECIAL}
    config = published("Qwen/Qwen2.5-VL-3B-Instruct")
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.layer_types, text.vocab_size = 1, ["full_attention"], 8192
    text.bos_token_id, text.eos_token_id = None, words["<|im_end|>"]
    vision.depth, vision.fullatt_block_indexes = 2, [1]
    config.image_token_id, config.video_token_id = words["<|image_pad|>"], words["<|video_pad|>"]
    config.vision_start_token_id = words["<|vision_start|>"]
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    attention.install(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return Vlm(
        model=model,
        processor=processor,
        family=FAMILIES["qwen2_5_vl"],
        attention="auto",
        device=torch.device("cpu"),
    )


def test_one_packed_step_of_each_stage_on_layers_of_the_real_shape():
    recipe = load_recipe("paper-3b").recipe
    vlm = real_layers()
    assert 150e6 < sum(p.numel() for p in vlm.model.parameters()) < 200e6
    chat = loading.make_chat(vlm, recipe.prompt, recipe.images)
    problems = [make_problem(name, sizes=((112, 84),)) for name in "ab"]
    demonstrations = [
        Demonstration(problem=p, response="So \\boxed{4}.", teacher="builtin") for p in problems
    ]
    loading.freeze(vlm, recipe.sft.freeze)
    trees, _ = sft.usable_trees(demonstrations, chat)
    trainer = Trainer(vlm, recipe.sft.optimizer, steps=2, max_bad_steps=1)
    taught = [
        trainer.step([Batch(pack=pack(trees, chat.patches))], _likelihood, average="token") for _ in "12"
    ]
    assert taught[1].loss < taught[0].loss and not taught[1].skipped

    branches = [
        Branch(ids=chat.response_ids(text), weights=(advantage,) * len(chat.response_ids(text)))
        for text, advantage in (("\\boxed{4}", 1.0), ("\\boxed{5}", -1.0))
    ]
    group = Tree(prompt=chat.prompt(problems[0]), branches=tuple(branches))
    loading.freeze(vlm, recipe.grpo.freeze)
    settings = recipe.grpo.model_copy(update={"kl": recipe.grpo.kl.model_copy(update={"kind": "none"})})
    trainer = Trainer(vlm, settings.optimizer, steps=1, max_bad_steps=1)
    batch = Batch(pack=pack([group], chat.patches))
    outcome = trainer.step([batch], make_objective(settings), average=settings.loss_average)
    assert outcome.grad_norm > 0 and not outcome.skipped


def _likelihood(batch, scores):
    return sft_loss(scores.logprobs, batch.pack.weights, batch.pack.sequence, "token")
