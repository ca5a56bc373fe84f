"""What is told to change when memory ran out: every number computed again, by hand and by the plan."""

import re
from pathlib import Path

import pytest

from rlcs.model.chunks import LOGIT_CHUNK
from rlcs.plan.machine import GIB, Assumed, machine
from rlcs.plan.memory import Passing, token_keeps
from rlcs.plan.page import make_plan
from rlcs.plan.planner import Inputs
from rlcs.plan.shortage import PARTS, shortage_advice
from rlcs.plan.sizes import sizes_of
from rlcs.plan.stages import plan_stages
from rlcs.recipe.loading import changed, load_recipe

CHANGE = re.compile(
    r"^\s*(\S+=\S+) \(now (.+?)\): ([\w, ]+) ([\d.,]+) ([GM])B -> ([\d.,]+) ([GM])B \((.+)\)$"
)
PLACES = [
    ("single-gpu-lora-3b", "sft: update", "sft", "training"),
    ("single-gpu-lora-3b", "sft_grpo: rollout", "grpo", "sampling"),
    ("single-gpu-lora-3b", "eval base: sampling", "eval", "sampling"),
    ("single-gpu-lora-3b", "sft: sampling", "eval", "sampling"),
    ("paper-3b", "grpo: update", "grpo", "training"),
    ("paper-3b", "grpo: reference", "grpo", "training"),
    ("paper-3b", "sft: loading", "sft", "loading"),
    ("recommended-3b", "sft_grpo", "grpo", "training"),
    ("quickstart", "sft: update", "sft", "training"),
]


def card(memory=24.0):
    return machine(1, "RTX4090", memory=memory, peak=0)


def told(name, where, *overrides, on=None):
    recipe = load_recipe(name, overrides).recipe
    lines = shortage_advice(recipe, where, on or card(), trainers=1).splitlines()
    return recipe, lines[0], [CHANGE.match(line).groups() for line in lines[1:]]


@pytest.mark.parametrize(("name", "where", "stage", "work"), PLACES)
def test_every_change_needs_less_by_the_plan_and_by_the_numbers_told(name, where, stage, work):
    recipe, head, changes = told(name, where)
    sizes = sizes_of(recipe.model)

    def parts(recipe):
        inputs = Inputs(assumed=Assumed())
        plan = plan_stages(recipe, sizes, card(), inputs, trainers=1)[stage]
        return {part: plan.parts.get(part, 0.0) for part in PARTS[work]}

    before = parts(recipe)
    assert changes and head.startswith("planned for the longest prompts and answers: weights ")
    assert head.endswith("of the 24.0 GB of a device. To need less:")
    for change, _now, names, old, old_unit, new, new_unit, _why in changes:
        after = parts(changed(recipe, [change]))
        assert sum(after.values()) < sum(before.values())
        for sizes_, shown, unit in ((before, old, old_unit), (after, new, new_unit)):
            size = sum(sizes_[part] for part in names.split(", "))
            assert float(shown.replace(",", "")) == pytest.approx(
                size / (GIB if unit == "G" else 2**20), abs=0.06
            )


def test_fewer_rows_are_computed_in_tokens_and_bytes():
    local = "rollout.engine=local"
    _, head, changes = told("single-gpu-lora-3b", "sft_grpo: rollout", local)
    first = changes[0]
    # Qwen2.5-VL-3B: 36 layers, 2 key-value heads of 128, keys and values of 2 bytes.
    a_token = 36 * 2 * 128 * 2 * 2
    size = 2 * (4 * 2048 + 40 * 2048) * a_token
    why = f"keys and values: 2 x (4 prompts x 2,048 + 40 answers x 2,048 tokens) x {a_token:,} bytes"
    assert first[:3] == ("grpo.max_rows=40", "80", "rollout")
    assert first[-1] == f"{why} = {size / GIB:.1f} GB; more rounds of sampling"
    assert "rollout 13.7 GB, with libraries and fragments 25.1 GB of the 24.0 GB of a device" in head
    evals = told("single-gpu-lora-3b", "eval sft", local)[2]
    [evaluation] = [change for change in evals if "max_rows" in change[0]]
    assert (
        evaluation[0] == "eval.max_rows=20" and "(20 prompts x 2,048 + 20 answers x 2,048" in evaluation[-1]
    )


def test_smaller_packs_and_recomputed_activations_are_computed_layer_by_layer():
    recipe, _, changes = told("single-gpu-lora-3b", "sft: update", "model.gradient_checkpointing=false")
    by_key = {change[0].partition("=")[0]: change for change in changes}
    sizes = sizes_of(recipe.model)
    how = Passing(element=2, checkpointing=False, trains=recipe.lora.parts, adapters=True)
    kept = token_keeps(sizes, how)
    packs = by_key["sft.pack_tokens"]
    assert packs[:2] == ("sft.pack_tokens=4096", "8192")
    assert f"4,096 tokens x {kept:,} bytes = {4096 * kept / GIB:.1f} GB" in packs[-1]
    recomputed = by_key["model.gradient_checkpointing"]
    assert recomputed[1] == "false" and "keeps 4,096 bytes in each of 36 layers" in recomputed[-1]
    assert "a third more time" in recomputed[-1]
    assert list(by_key).index("model.gradient_checkpointing") < list(by_key).index("sft.pack_tokens")
    # The head computes so many logits at once, however large a pack is.
    assert LOGIT_CHUNK * 3 * 4 == 0.75 * GIB


def test_a_pack_that_one_tree_fills_is_made_smaller_by_shorter_or_fewer_answers():
    _, _, changes = told("paper-3b", "grpo: update")
    keys = [change[0] for change in changes]
    assert "grpo.pack_tokens=4096" not in keys
    [shorter] = [change for change in changes if change[0] == "grpo.max_new_tokens=1024"]
    assert "(2,048 + 10 x 1,024) tokens x 159,744 bytes = 1.8 GB of the largest tree" in shorter[-1]
    assert shorter[-1].endswith("other results")


def test_vllm_beside_the_trainer_takes_its_share():
    _, head, changes = told("single-gpu-lora-3b", "grpo: rollout", "rollout.engine=vllm_colocated",
                            "rollout.memory_share=0.7")  # fmt: skip
    assert "rollout 16.8 GB" in head
    assert changes[0][0] == "rollout.memory_share=0.6" and changes[0][-1].startswith("0.6 x 24.0 GB")


def test_a_cpu_and_an_unknown_place():
    _, head, changes = told("quickstart", "sft: update", on=machine(0, "H100", memory=None, peak=0))
    assert "of main memory" in head and not any("cpu_offload" in change[0] for change in changes)
    recipe = load_recipe("quickstart").recipe
    assert shortage_advice(recipe, "cold start: sampling", card(), trainers=1) == ""
    nothing = shortage_advice(
        recipe, "eval base: loading", machine(0, "H100", memory=None, peak=0), trainers=1
    )
    assert nothing.endswith("No key makes it less: take a smaller model, or more memory")


PAGE = Path(__file__).parent.parent / "docs/how-to/out-of-memory.md"


def test_the_example_in_the_documentation_is_what_the_plan_says():
    page = PAGE.read_text(encoding="utf-8")
    row = r"^\| (`.+`|nothing else) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (yes|no) \|$"
    rows = re.findall(row, page, re.MULTILINE)
    assert len(rows) == 6
    for words, *peaks, fits in rows:
        overrides = [] if words == "nothing else" else words.strip("`").split()
        plan = make_plan("single-gpu-lora-3b", ["rollout.engine=local", *overrides], card(), Assumed())
        assert [f"{stage.peak / GIB:.1f}" for stage in plan.stages.values()] == peaks, words
        assert plan.fits == (fits == "yes"), words
    whole = make_plan("recommended-3b", [], card(), Assumed()).stages
    assert f"{whole['sft'].peak / GIB:.1f} GB in SFT and {whole['grpo'].peak / GIB:.1f} GB in GRPO" in page
    recipe = load_recipe("single-gpu-lora-3b", ["rollout.engine=local"]).recipe
    head, first, *_ = shortage_advice(recipe, "sft_grpo: rollout", card(), trainers=1).splitlines()
    assert head in page and first.strip() in page
    assert f"x 36,864 bytes = {2 * (8 * 2048 + 80 * 2048) * 36864 / GIB:.1f} GB of keys and values" in page
    assert f"8,192 x 151,936 x 4 = {8192 * 151936 * 4 / GIB:.1f} GB" in page
