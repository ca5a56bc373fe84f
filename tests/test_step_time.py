"""The seconds of a step: lengths with their tail, decoding step by step, packs in step, and their sum."""

from dataclasses import replace
from statistics import fmean, pstdev

import pytest

from rlcs.plan.decoding import StepCost, decode
from rlcs.plan.lengths import group_lengths
from rlcs.plan.machine import GPUS, Assumed, machine
from rlcs.plan.measured import Rates
from rlcs.plan.page import make_plan
from rlcs.plan.passes import NO_TRAFFIC, forward_traffic, passed, rounds_of, update_traffic
from rlcs.plan.rates import speeds_of
from rlcs.plan.sizes import sizes_of
from rlcs.plan.stages import placed
from rlcs.plan.step_time import on_policy_overlap, step_time
from rlcs.plan.work import Trees, language, vision
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.schema import Model

H100 = machine(8, "H100", memory=None, peak=0)
SEVEN = "Qwen/Qwen2.5-VL-7B-Instruct"
ISSUE = Assumed(text=128, image=1272, answer=600)
"""Lengths of real images: prompts of 1,400 tokens, answers of 600."""
SERVERS = ("rollout.engine=vllm_server", "rollout.servers=4", 'rollout.devices=["4", "5", "6", "7"]')


def step_of(*overrides, assumed=ISSUE, on=H100, rates=None, recipe="8xgpu-7b"):
    return make_plan(recipe, overrides, on, assumed, rates).stages["grpo"].time


def seconds_of(step):
    found = {}
    for phase in step.phases:
        name = phase.name.partition(",")[0]
        found[name] = found.get(name, 0.0) + phase.seconds
    return found


def place_of(*overrides, on=H100, recipe="8xgpu-7b"):
    chosen = load_recipe(recipe, overrides).recipe
    return placed(chosen, sizes_of(Model(name=SEVEN)), on)[0]


# --- lengths ------------------------------------------------------------------------------------------


def test_lengths_have_the_mean_and_a_tail_up_to_the_limit():
    groups = group_lengths(512, 5, mean=600, limit=2048, spread=0.5)
    lengths = [length for group in groups for length in group]
    assert len(groups) == 512 and {len(group) for group in groups} == {5}
    assert fmean(lengths) == pytest.approx(600, abs=1) and pstdev(lengths) == pytest.approx(300, rel=0.1)
    assert max(lengths) == 2048 and sorted(lengths)[len(lengths) // 2] < 600
    assert max(group_lengths(2, 5, mean=600, limit=2048, spread=0.5)[0]) < 2048, "of few none is so long"
    assert group_lengths(3, 2, mean=900, limit=500, spread=0.5) == ((500, 500),) * 3
    assert set(sum(group_lengths(3, 2, mean=70, limit=500, spread=0), ())) == {70}
    assert groups == group_lengths(512, 5, mean=600, limit=2048, spread=0.5)


# --- decoding -----------------------------------------------------------------------------------------


def test_decoding_step_by_step_by_hand():
    cost = StepCost(weights=10.0, row=4.0, cached_token=0.1, least=0.0)
    done = decode([1, 3], cost, trunk=5, slots=8)
    # Both rows, 5 cached tokens each; then one row, of 6 and of 7.
    assert done.seconds == pytest.approx((10 + 1.0) + (10 + 0.6) + (10 + 0.7)) == done.busy
    assert done.ends == pytest.approx((11.0, 32.3))
    many = decode([1] * 3, cost, trunk=0, slots=8)
    assert many.seconds == pytest.approx(12), "three rows compute longer than the weights are read"
    waiting = decode([1, 3], StepCost(weights=1.0, row=0.0, cached_token=0.0, least=2.0), trunk=5, slots=8)
    assert (waiting.seconds, waiting.busy) == (6.0, 3.0)
    assert decode([], cost, trunk=5, slots=8).seconds == 0


def test_a_row_reads_its_state_its_experts_and_no_further_than_the_window():
    cost = StepCost(weights=1.0, row=0.0, cached_token=0.0, least=0.0)
    states = replace(cost, state=2.0)
    assert decode([1, 2], states, trunk=5, slots=8).ends == (5.0, 8.0)
    near = replace(cost, windowed_token=1.0, window=6)
    assert decode([3], near, trunk=5, slots=8).ends == (3 * 1.0 + 5 + 6 + 6,)
    some = replace(cost, experts=100.0, chosen=0.5)
    assert decode([1], some, trunk=0, slots=8).seconds == 1 + 50
    assert decode([1] * 2, some, trunk=0, slots=8).seconds == 1 + 75, "half of the other half"


def test_where_one_answer_ends_the_next_begins():
    cost = StepCost(weights=1.0, row=0.0, cached_token=0.0, least=0.0)
    assert decode([2, 4, 3], cost, trunk=0, slots=2).ends == (2.0, 4.0, 5.0)
    assert decode([2, 4, 3], cost, trunk=0, slots=1).seconds == 9.0


def test_the_longest_answer_decides():
    even = decode(
        [600] * 320, StepCost(weights=7e-3, row=0.0, cached_token=0.0, least=0.0), trunk=0, slots=320
    )
    [group] = group_lengths(1, 320, mean=600, limit=2048, spread=0.5)
    cost = StepCost(weights=7e-3, row=0.0, cached_token=0.0, least=0.0)
    real = decode(group, cost, trunk=0, slots=320)
    assert real.seconds == pytest.approx(7e-3 * max(group)) and real.seconds > 3 * even.seconds
    assert real.tail > 0.3 * real.seconds


# --- passes -------------------------------------------------------------------------------------------


def test_ranks_wait_for_the_largest_pack_of_each_round():
    place = place_of(on=machine(2, "H100", memory=None, peak=0))
    trees = Trees(count=4, trunk=100, patches=400, group=1, answer=100)
    speeds = speeds_of(H100, Assumed())
    even = rounds_of(place, [(100,)] * 4, trees, steps=1, budget=200)
    assert even.language.shape == (2, 2)
    one = passed(place, even, (3, 1), NO_TRAFFIC, speeds, share="update_share")
    work = 3 * language(place.sizes, 100, [100]) + vision(place.sizes.vision, 400)
    assert one.work == pytest.approx(2 * work / (989e12 * 0.4)) and one.waiting == 0 == one.traffic
    odd = rounds_of(place, [(100,)] * 3, trees, steps=1, budget=200)
    lone = passed(place, odd, (3, 1), NO_TRAFFIC, speeds, share="update_share")
    assert lone.waiting == pytest.approx(one.work / 4) and lone.work == pytest.approx(one.work * 3 / 4)
    assert rounds_of(place, [(100,)] * 4, trees, steps=4, budget=200).count == 4, "a round for each step"
    assert rounds_of(place, [(100,)] * 4, trees, steps=1, budget=400).count == 1


def test_traffic_hides_behind_work_but_for_what_is_outside_the_layers():
    place, total = place_of(), sizes_of(Model(name=SEVEN)).total
    outside = place.sizes.outside_layers
    forward, update = forward_traffic(place), update_traffic(place, total)
    assert forward.total == 2 * total * 7 / 8 and forward.exposed == 2 * outside * 7 / 8
    assert update.total == pytest.approx((2 * 2 + 4) * total * 7 / 8)
    kept = update_traffic(place_of("parallel.reshard_after_forward=false"), total)
    assert update.total - kept.total == pytest.approx(forward.total)
    trees = Trees(count=8, trunk=1000, patches=0, group=1, answer=1000)
    rounds = rounds_of(place, [(1000,)] * 8, trees, steps=1, budget=2000)
    link = 450e9 * 0.7
    fast = passed(place, rounds, (1, 1), forward, speeds_of(H100, Assumed()), share="forward_share")
    assert fast.traffic == pytest.approx(forward.exposed / link), "the rest takes less time than the work"
    slow = passed(
        place,
        rounds,
        (1, 1),
        forward,
        speeds_of(H100, Assumed(), Rates(device="", collective=1e9)),
        share="forward_share",
    )
    assert slow.traffic == pytest.approx(forward.total / 1e9 - slow.work)
    alone = place_of(on=machine(1, "H100", memory=None, peak=0))
    assert update_traffic(alone, total) == NO_TRAFFIC


def test_copies_on_several_machines_gather_inside_each():
    four = machine(32, "H100", memory=None, peak=0)
    flat, copies = place_of(on=four), place_of("parallel.shard_size=8", on=four)
    slow = step_of(on=four)
    fast = step_of("parallel.shard_size=8", on=four)
    assert copies.shards == 8 and flat.shards == 32
    assert seconds_of(fast)["traffic between GPUs"] < 0.5 * seconds_of(slow)["traffic between GPUs"]


# --- a step -------------------------------------------------------------------------------------------


def test_every_second_has_a_phase_a_formula_and_a_basis():
    step = step_of()
    assert step.seconds == pytest.approx(sum(phase.seconds for phase in step.phases))
    for phase in step.phases:
        assert phase.formula and phase.basis == "guessed" and 0 <= phase.busy <= phase.seconds
    assert set(seconds_of(step)) >= {
        "vLLM wakes up",
        "weights to vLLM",
        "prompts are read",
        "answers are decoded",
        "answers are graded",
        "vLLM goes to sleep",
        "old logprobs",
        "logprobs of the reference",
        "forward and backward passes",
        "activations are recomputed",
        "optimiser",
        "waiting for the largest pack",
        "traffic between GPUs",
    }


def test_masked_images_are_passes_of_their_own():
    """A pass without gradients, the tower included whatever is kept; or one more forward and backward."""
    off, once = (seconds_of(step_of(*words)) for words in ((), ("grpo.sight.coefficient=0.02",)))
    both = seconds_of(step_of("grpo.sight.coefficient=0.02", "grpo.sight.gradient=both"))
    assert "masked images" not in off
    reference = seconds_of(step_of("images.features_gb=0"))["logprobs of the reference"]
    assert reference == pytest.approx(once["masked images"], rel=0.35)
    assert both["masked images"] > 2 * once["masked images"]


def test_all_gpus_in_turns_are_faster_than_half_of_them_each():
    """7B, prompts of 1,400 tokens, 512 of them, five answers each, on eight H100."""
    turns = step_of("grpo.group_size=5")
    apart = step_of("grpo.group_size=5", *SERVERS, "rollout.memory_share=0.9")
    assert turns.seconds <= 135 < apart.seconds and turns.idle < 0.12 < apart.idle
    one_round = step_of("grpo.group_size=5", "grpo.dynamic_sampling=0")
    assert one_round.seconds <= 100 and one_round.idle <= 0.1
    plan = make_plan("8xgpu-7b", ["grpo.group_size=5"], H100, ISSUE)
    assert plan.fits and plan.start.seconds < 600
    found, without = seconds_of(turns), seconds_of(step_of("grpo.group_size=5", "images.features_gb=0"))
    tower = vision(plan.sizes.vision, 4 * 1272) * 512 / (8 * 989e12 * 0.4)
    # Three of four optimiser steps need old logprobs; of kept features the tower runs in the first pass.
    assert without["old logprobs"] == pytest.approx(0.75 * without["logprobs of the reference"])
    assert found["old logprobs"] == pytest.approx(without["old logprobs"])
    saved = without["logprobs of the reference"] - found["logprobs of the reference"]
    assert saved == pytest.approx(0.75 * tower)
    name = "forward and backward passes"
    assert without[name] - found[name] == pytest.approx(tower)


def test_dynamic_sampling_takes_a_round_for_groups_with_equal_rewards():
    one = step_of("grpo.dynamic_sampling=0")
    two = step_of("grpo.dynamic_sampling=1")
    none = step_of("grpo.dynamic_sampling=1", assumed=ISSUE.model_copy(update={"equal": 0.0}))
    assert none.seconds == pytest.approx(one.seconds)
    assert two.seconds > one.seconds + 10, "a round waits for its longest answer, however few there are"
    [again] = [phase for phase in two.phases if phase.name == "prompts are read, round 2"]
    assert "93 prompts" in again.formula  # 2 / (10 + 1) of 512


def test_the_local_engine_launches_every_layer_of_every_step():
    card = machine(1, "H100", memory=None, peak=0)
    step = make_plan("recommended-3b", ["grpo.dynamic_sampling=0"], card, Assumed()).stages["grpo"].time
    [decoded] = [phase for phase in step.phases if phase.name == "answers are decoded"]
    rounds = decoded.seconds / (36 * 2.5e-3)  # steps of 90 ms
    assert rounds == pytest.approx(round(rounds), abs=1e-6) and decoded.busy < 0.2 * decoded.seconds
    measured = Rates(device="NVIDIA H100 80GB HBM3", local_layer_s=1e-3)
    step = (
        make_plan("recommended-3b", ["grpo.dynamic_sampling=0"], card, Assumed(), measured)
        .stages["grpo"]
        .time
    )
    [faster] = [phase for phase in step.phases if phase.name == "answers are decoded"]
    assert faster.seconds < 0.5 * decoded.seconds


def test_overlap_hides_what_can_be_done_while_servers_sample():
    words = (*SERVERS, "rollout.memory_share=0.9")
    hidden = [phase for phase in step_of(*words).phases if phase.seconds < 0]
    [one] = hidden
    assert one.name == "at the same time"
    apart = step_of(*words, "grpo.overlap=none")
    assert apart.seconds == pytest.approx(step_of(*words).seconds - one.seconds)
    ahead = step_of(*words, "grpo.overlap=one_step_off")
    assert ahead.seconds < step_of(*words).seconds


def test_on_policy_overlap_by_hand():
    grpo = load_recipe("8xgpu-7b", ["grpo.prompts_per_step=4", "grpo.dynamic_sampling=0"]).recipe.grpo

    def hidden(arrivals, references, update, steps=1):
        stage = grpo.model_copy(update={"optimizer_steps": steps})
        rounds = [Arrived(arrivals)]
        return on_policy_overlap(stage, rounds, references, update)

    assert hidden([1, 2, 3, 10], 0.0, 4.0) == pytest.approx(3.0), "but for the last group"
    assert hidden([10, 10, 10, 10], 0.0, 4.0) == 0
    assert hidden([10, 1, 2, 3], 0.0, 4.0) == 0, "places are known in their order"
    assert hidden([1, 2, 3, 10], 4.0, 8.0, steps=4) == pytest.approx(5.0), (
        "three of 1 s, and 2 s of the first"
    )


class Arrived:
    """A round of which the groups have arrived by certain times."""

    def __init__(self, arrivals):
        self.arrivals, self.prefill, self.decode = arrivals, 0.0, float(max(arrivals))


def test_weights_through_a_folder_are_written_and_read():
    size, found = 2 * sizes_of(Model(name=SEVEN)).total, seconds_of(step_of())
    assert found["weights to vLLM"] == pytest.approx(size / 1e10)
    folder = seconds_of(step_of("rollout.weights=folder"))
    assert folder["weights to vLLM"] == pytest.approx(size / 0.5e9 + size / 1e9)


def test_eight_bits_are_read_in_half_the_time():
    whole, rounded = seconds_of(step_of()), seconds_of(step_of("rollout.quantization=fp8"))
    assert rounded["answers are decoded"] < 0.75 * whole["answers are decoded"]


def test_a_slow_disk_shows_in_the_checkpoint():
    slow = Rates(device="NVIDIA H100 80GB HBM3", disk_write=1e7)
    assert seconds_of(step_of(rates=slow))["checkpoint"] > 40 > 1 > seconds_of(step_of())["checkpoint"]


def test_step_time_of_sft_has_no_rollouts():
    recipe = load_recipe("8xgpu-7b").recipe
    trees = Trees(count=64, trunk=1400, patches=4 * 1272, group=1, answer=600)
    step = step_time(place_of(), recipe.sft, trees, recipe.images, speeds_of(H100, ISSUE), ISSUE)
    assert "answers are decoded" not in seconds_of(step) and "optimiser" in seconds_of(step)


# --- measured rates -------------------------------------------------------------------------------------


def test_measured_rates_replace_guesses_and_those_that_lack_are_named():
    rates = Rates(device="NVIDIA H100 80GB HBM3", update_share=0.5, wake_s=0.3)
    plan = make_plan("8xgpu-7b", [], H100, ISSUE, rates)
    step, guessed = plan.stages["grpo"].time, step_of()
    found = {phase.name: phase for phase in step.phases}
    assert found["vLLM wakes up"].seconds == 0.3 and found["vLLM wakes up"].basis == "measured"
    again, before = found["activations are recomputed"], seconds_of(guessed)["activations are recomputed"]
    assert again.seconds == pytest.approx(before * 0.4 / 0.5) and again.basis == "measured"
    assert found["logprobs of the reference"].basis == "guessed" == step.basis
    text = plan.explanation(1000)
    [measured] = [line for line in text.splitlines() if line.startswith("rates, measured: ")]
    [rest] = [line for line in text.splitlines() if line.startswith("rates, guessed: ")]
    assert measured == "rates, measured: wake_s=0.3, update_share=0.5" and "forward_share=0.4" in rest
    shown = plan.to_json()
    assert shown["rates"]["wake_s"] == {"value": 0.3, "basis": "measured"}
    assert {phase["basis"] for phase in shown["stages"]["grpo"]["step"]["phases"]} == {"measured", "guessed"}
    assert shown["basis"]["memory_gb"] == "computed"


def test_all_rates_measured_make_a_measured_step():
    names = speeds_of(H100, Assumed()).values
    rates = Rates(device="NVIDIA H100 80GB HBM3", **names)
    step = step_of(rates=rates)
    assert step.seconds == pytest.approx(step_of().seconds)
    left = {phase.name for phase in step.phases if phase.basis == "guessed"}
    assert left == {"answers are exchanged", "optimiser"}


def test_every_known_gpu_has_a_link():
    assert all(30e9 < device.link < 1e12 for device in GPUS.values())
