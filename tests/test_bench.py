"""The bench measures what it says: limits are arithmetic, lengths are forced, ratios are peer over ours."""

import json
import multiprocessing
import subprocess
import sys
import threading

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Qwen2_5_VLConfig

from bench import adapters, charts, limit, ours, pairs, table
from bench.meter import Measured, Meter
from bench.pairs import Options, Pair
from bench.shapes import (
    HYBRID,
    LONGEST_ANSWER,
    WARM_UP_TRUNK,
    Case,
    Shape,
    grpo_settings,
    make_case,
    trained_case,
    wide_model,
)
from bench.works import WORKS, checking, grading, rollouts, rows_of, sweeps, vllm
from bench.works import loading as reading
from rlcs.engines.vllm.weights import WeightsFolder
from rlcs.grading.pool import GradePool
from rlcs.model import loading
from rlcs.model.layout import dense_mask, layout_of
from rlcs.plan.skeleton import measure
from rlcs.recipe.execution import Lora
from rlcs.recipe.schema import Model
from tools import tiny_model

SHAPE = Shape(name="check", says="built-in model", model="built-in", prompts=2, group=3)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return make_case(SHAPE, tmp_path_factory.mktemp("bench"), 1, cpu_time=True)


def test_limit_counts_the_matrix_products_that_torch_counts():
    model = wide_model(tiny_model.build_processor(tiny_model.corpus(100)))
    text, tokens = model.config.text_config, 7
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        states = model.model.language_model(input_ids=torch.arange(tokens)[None]).last_hidden_state
        model.lm_head(states)
    products = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    attention = 4.0 * text.hidden_size * text.num_hidden_layers * tokens * (tokens + 1) / 2
    assert limit.language(measure("wide", model.config), 0, [tokens]) == products + attention


def test_limit_counts_the_pairs_that_are_visible_in_the_mask():
    trunk, lengths = 5, [3, 4]
    layout = layout_of([(trunk, lengths)])
    sizes = measure("defaults", Qwen2_5_VLConfig())
    size = sizes.hidden * sizes.layers.total()
    no_pairs = limit.language(sizes, trunk, lengths) - 4.0 * size * int(dense_mask(layout).sum())
    apart = limit.language(sizes, trunk + 7, []) - 4.0 * size * 12 * 13 / 2
    assert no_pairs == pytest.approx(apart + 2.0 * sizes.head * 7)


def test_sharing_is_worth_more_the_longer_the_prompt(case: Case):
    config = Qwen2_5_VLConfig.from_pretrained(case.folder)
    short = limit.limit_of(case, config)
    longer = {name: trunk * 4 for name, trunk in case.trunks.items()}
    stretched = limit.limit_of(_with(case, trunks=longer), config)
    assert 1 < short.exact < stretched.exact < SHAPE.group
    assert short.padded >= short.exact


def test_the_hybrid_shape_is_one_of_gated_delta_nets(tmp_path):
    shape = Shape(name="h", says="", model=HYBRID, prompts=1, group=3, trunk=90, side=112, answers=(9, 9))
    made = make_case(shape, tmp_path, 1)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.text_config.layer_types.count("linear_attention") == 6
    assert set(made.trunks.values()) == {WARM_UP_TRUNK, 90}
    assert 1 < limit.limit_of(made, config).exact < 3


def test_a_trained_model_s_answers_are_as_long_as_it_makes_them(random_model_folder):
    shape = Shape(name="t", says="", model="trained", prompts=2, group=2)
    made = trained_case(shape, str(random_model_folder), 1, cpu_time=True)
    assert made.folder == str(random_model_folder) and made.steps == 2
    assert all(1 <= length <= LONGEST_ANSWER for lengths in made.lengths.values() for length in lengths)
    here, there = multiprocessing.Pipe()
    here.send(False), here.send(False)
    ours.main(there, made)  # which asserts that the answers of its steps are so long
    assert here.recv() == "ready" and isinstance(here.recv(), Measured)


def _with(case: Case, **changes: object) -> Case:
    return Case(**{name: getattr(case, name) for name in Case.__slots__} | changes)  # type: ignore[arg-type]


def test_an_update_as_adapters_is_measured_beside_a_merged_one(tmp_path, random_model_folder, capsys):
    written = {}
    for way in ("merged", "adapter"):
        plain = loading.load(Model(name=str(random_model_folder)), device=torch.device("cpu"))
        vlm = loading.prepare(plain, Lora(rank=4), (), seed=0)
        published = WeightsFolder(tmp_path / way, as_adapters=way == "adapter")
        found = adapters.measure(vlm, published, 2, None)
        assert len(found.written) == len(found.publish_s) == 2 and min(found.publish_s) > 0
        written[way] = found.written[-1]
        adapters.report(way, 1, found)
    assert written["adapter"] < written["merged"] / 4
    assert f"{written['merged'] / 1e6:.1f} MB written" in capsys.readouterr().out


def test_our_side_answers_every_step_with_its_phases(case: Case):
    """`ours.main` asserts by itself that every answer ended at its forced length."""
    here, there = multiprocessing.Pipe()
    side = threading.Thread(target=ours.main, args=(there, case), daemon=True)
    side.start()
    assert here.recv() == "ready"
    for memory in (False, True):
        here.send(memory)
        while not here.poll(0.1):
            assert side.is_alive(), "our side has ended"
        measured: Measured = here.recv()
        assert {"rollout", "logprobs", "update", "step"} <= set(measured.seconds)
        parts = sum(measured.seconds[phase] for phase in ("rollout", "logprobs", "update"))
        assert 0 < parts <= measured.seconds["step"]
    side.join()
    assert measured.peaks["update"] > 0


def test_meter_counts_time_to_the_phase_that_is_open():
    with Meter(memory=False) as meter, meter.phase("update"):
        pass
    assert 0 <= meter.measured.seconds["update"] <= meter.measured.seconds["step"]


def page_of(bench: str, works: str) -> str:
    (begin, end), (begin_works, end_works) = table.MARKS.values()
    return f"before {begin} {bench} {end} between {begin_works} {works} {end_works} after"


def test_ratio_is_the_peers_seconds_over_ours(case: Case, tmp_path):
    def side(seconds: float) -> list[Measured]:
        phases = dict.fromkeys(("rollout", "logprobs", "update"), seconds)
        return [Measured(seconds=phases | {"step": 4 * seconds}, peaks={"update": int(seconds), "step": 1})]

    facts = {"peer_busy": 1.9, "busy": 1.8, "environment": "torch", "peer": "trl"}
    rows = table.rows_of(case, limit.Limit(exact=4.0, padded=5.0), side(2.0), side(6.0), facts)
    assert {row["ratio"] for row in rows if "seconds" in row} == {3.0}
    assert {row["share_of_limit"] for row in rows if "seconds" in row} == {0.75}
    page = tmp_path / "page.md"
    page.write_text(page_of("old", "old"), encoding="utf-8")
    table.write_docs(rows, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before ") and text.endswith(" after") and "old" not in text
    assert "| update | 6.00 s | 2.00 s | 3.0 | 75% |" in text


# --- the works besides the GRPO step ---------------------------------------------------------------


def test_sides_take_turns_and_the_ratio_is_of_their_medians():
    said = list[str]()
    seconds = iter([0, 6, 10, 12, 20, 29, 30, 33, 40, 43, 50, 51])  # of the peer, then of ours, in each round
    pair = pairs.in_turns(
        lambda: said.append("ours"), lambda: said.append("peer"), rounds=3, clock=lambda: next(seconds)
    )
    assert said == ["peer", "ours"] * 3
    assert (pair.theirs, pair.ours) == ([6, 9, 3], [2, 3, 1])
    assert (pair.ratio, pair.spread) == (3.0, (3.0, 3.0))
    alone = Pair(ours=[2.0, 4.0])
    assert (alone.seconds, alone.ratio, alone.spread) == (3.0, None, None)


def test_cpu_seconds_are_those_of_a_whole_family_of_processes():
    before = pairs.cpu_seconds()
    script = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\ninput()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as child:
        while pairs.cpu_seconds(child.pid) < 0.3:
            assert child.poll() is None
        assert pairs.cpu_seconds() - before >= 0.25
        child.communicate(b"\n")


def test_rows_measured_anew_take_the_place_of_old_ones_and_stand_in_the_page(tmp_path):
    facts = {"environment": "torch", "load_before": 0.5}
    a, b = Pair(ours=[2.0, 2.0], theirs=[3.0, 5.0]), Pair(ours=[1.5])
    old = [
        pairs.row(work="sft", shape=shape, phase="epoch", peer="trl", pair=a) | facts for shape in ("x", "y")
    ]
    new = [pairs.row(work="sft", shape="y", phase="epoch", peer="", pair=b, exponent=0.51) | facts]
    rows = table.merged(old, new)
    assert [(row["shape"], row["ratio"]) for row in rows] == [("x", 2.0), ("y", None)]
    table.write(rows, tmp_path / "rows.json")
    page = tmp_path / "page.md"
    page.write_text(page_of("old", "old"), encoding="utf-8")
    table.write_docs(table.read(tmp_path / "rows.json"), page)
    text = page.read_text(encoding="utf-8")
    assert "old" not in text and text.startswith("before ") and text.endswith(" after")
    assert "| x | epoch | trl | 4 s | 2 s | 2.00 | 1.50 to 2.50 |  |" in text
    assert "| y | epoch | alone |  | 1.5 s |  |  | exponent 0.51 |" in text


def test_the_chart_shows_ratios_and_how_a_step_grows(tmp_path):
    pair, alone = Pair(ours=[2.0, 2.0], theirs=[3.0, 5.0]), Pair(ours=[1.5])
    rows = [
        {"work": "grpo step", "shape": "long", "phase": phase, "peer": "trl 1", "ratio": ratio}
        for phase, ratio in (("rollout", 2.0), ("step", 3.0), ("memory of step", 4.0))
    ]
    rows.append(pairs.row(work="sft", shape="x", phase="epoch", peer="trl 1, padded", pair=pair))
    for size, seconds in ((16, 3.0), (8, 1.5)):
        one = Pair(ours=[seconds])
        rows.append(pairs.row(work="sweeps", shape=f"group {size}", phase="step", peer="", pair=one))
    rows.append(pairs.row(work="sweeps", shape="trunk 50", phase="step", peer="", pair=alone))
    assert charts.ratios(rows) == [
        ("grpo step, long\nagainst trl 1", 3.0, None),
        ("sft, x, epoch\nagainst trl 1", 2.0, (1.5, 2.5)),
    ]
    assert charts.sweeps(rows) == {"group": [(8.0, 1.5), (16.0, 3.0)]}
    for name, shown in (("all", rows), ("no sweep", rows[:4])):
        charts.draw(shown, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 1000 and picture.getextrema()[0] != (255, 255)


@pytest.mark.parametrize("name", sorted(WORKS.keys() - {"sft"}))
def test_every_work_can_be_chosen(name):
    assert callable(rows_of(name))


def test_generate_writes_answers_as_long_as_ours():
    options = Options(cpu_time=True)
    work = rollouts.make_work(options, count=3, group=2)
    lengths = [len(rollout.ids) for group in rollouts.ours(work) for rollout in group]
    model = rollouts.peer_model(options)
    [long, short] = rollouts.theirs(model, work.sampling, rollouts.prepared(work, lengths, size=4))
    [end] = work.sampling.stop_ids
    prompt = max(len(prompt.ids) for prompt in work.prompts[:2])
    found = [row[prompt:].tolist().index(end) + 1 for row in long]
    prompt = len(work.prompts[2].ids)
    found += [row[prompt:].tolist().index(end) + 1 for row in short]
    assert found == lengths


def test_the_answers_that_are_graded_have_the_verdicts_that_are_known():
    answers = grading.made_answers(3 * len(grading.FORMS))
    assert len(set(answers)) == len(answers) and {each.right for each in answers} == {True, False}
    with GradePool() as pool:
        assert grading.agreement(grading.by_rlcs(pool, answers), answers) == 1.0
    assert grading.agreement([False] * len(answers), answers) < 0.5


def test_a_check_of_rows_is_timed_with_its_memory(tmp_path):
    path = checking.write(tmp_path / "rows.jsonl", 10)
    answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    assert answers[1].startswith("\\frac{") and answers[3].endswith("\\pi") and answers[2] in "ABC"
    seconds, peak = checking.measured(("data", "check", str(path)), cache=tmp_path)
    assert 0 < seconds < 60 and 10 * 2**20 < peak < 2**30


def test_both_readers_see_all_images_of_a_file(tmp_path):
    path = reading.write(tmp_path / "rows.parquet", 20)
    for decode in (False, True):
        assert reading.ours(path, decode=decode) == reading.theirs(path, decode=decode) == 20 * 112 * 112


@pytest.mark.parametrize("sweep", sweeps.SWEEPS, ids=lambda sweep: sweep.name)
def test_a_recipe_takes_every_value_of_a_sweep(sweep, tmp_path):
    for value in (min(sweep.values), max(sweep.values)):
        case = make_case(sweep.shape(value), tmp_path / str(value), 1)
        assert grpo_settings(case).group_size == case.shape.group >= 2


def test_growth_is_an_exponent():
    assert sweeps.exponent([1, 2, 4, 8], [3.0 * size**1.5 for size in (1, 2, 4, 8)]) == pytest.approx(1.5)
    [group, *_] = sweeps.SWEEPS
    seconds = {value: Pair(ours=[0.5 * value], theirs=[value] if value > 1 else []) for value in group.values}
    rows = sweeps.rows_of(group, seconds, "trl")
    assert (rows[-1]["exponent"], rows[-1]["peer_exponent"], rows[-1]["times_group_8"]) == (1.0, 1.0, 4.0)
    assert {sweep.name: sweep.shape(7) for sweep in sweeps.SWEEPS}["answers"].answers == (7, 7)


def test_clients_measure_a_server_and_without_vllm_there_are_no_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RLCS_VLLM", str(tmp_path))
    assert vllm.rows(Options()) == [] and "RLCS_VLLM" in capsys.readouterr().out
    with vllm.server(Options(), vllm=None) as served:
        replies = vllm.answered(served, clients=2, requests=1)
    assert len(replies) == 2 and all(each.tokens > 0 and each.first_s > 0 for each in replies)
