"""The bench measures what it says: limits are arithmetic, lengths are forced, ratios are peer over ours."""

import multiprocessing
import threading

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Qwen2_5_VLConfig

from bench import adapters, limit, ours, table
from bench.meter import Measured, Meter
from bench.shapes import HYBRID, WARM_UP_TRUNK, Case, Shape, make_case, wide_model
from rlcs.engines.vllm.weights import WeightsFolder
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


def test_ratio_is_the_peers_seconds_over_ours(case: Case, tmp_path):
    def side(seconds: float) -> list[Measured]:
        phases = dict.fromkeys(("rollout", "logprobs", "update"), seconds)
        return [Measured(seconds=phases | {"step": 4 * seconds}, peaks={"update": int(seconds), "step": 1})]

    facts = {"peer_busy": 1.9, "busy": 1.8, "environment": "torch", "peer": "trl"}
    rows = table.rows_of(case, limit.Limit(exact=4.0, padded=5.0), side(2.0), side(6.0), facts)
    assert {row["ratio"] for row in rows if "seconds" in row} == {3.0}
    assert {row["share_of_limit"] for row in rows if "seconds" in row} == {0.75}
    page = tmp_path / "page.md"
    page.write_text(f"before {table.BEGIN} old {table.END} after", encoding="utf-8")
    table.write_docs(rows, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before ") and text.endswith(" after") and "old" not in text
    assert "| update | 6.00 s | 2.00 s | 3.0 | 75% |" in text
