"""The doctor: this machine for real, and runs made ill in one way each."""

import dataclasses
import json
import os
import shutil
from collections import namedtuple

import pytest
from typer.testing import CliRunner

from conftest import seal
from rlcs.cli.main import app
from rlcs.doctor import health, machine
from rlcs.doctor.health import examine
from rlcs.errors import RunFolderError
from rlcs.model.parity_check import Agreement
from rlcs.model.source import BUILTIN
from rlcs.pipeline import seeds
from rlcs.recipe.loading import load_recipe
from rlcs.records import NO_SIGNAL, NOT_FINITE
from rlcs.report import build
from rlcs.report.load_run import read_run
from rlcs.report.stages import progress
from rlcs.signals import Stopped
from rlcs.train.health import SIGNS
from test_report import make_run, rows_of, write_rows


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("healthy") / "run", problems=40)
    (folder / "recipe.yaml").write_text(
        "name: x\nstudy:\n  arms:\n  - base\n  - sft\n  - grpo\n  - sft_grpo\nreport: {}\n"
    )
    for stage in (
        "cold_start",
        "sft",
        "sft_grpo",
        "grpo",
        *(f"eval/{arm}" for arm in ("base", "sft", "grpo", "sft_grpo")),
    ):
        (folder / stage / "done.json").write_text("{}")
    metrics = folder / "grpo" / "metrics.jsonl"
    write_rows(metrics, [row | {"boxes_per_answer": 1.0} for row in rows_of(metrics)])
    checkpoint = folder / "sft_grpo" / "checkpoints" / "step-000050"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights" * 100)
    seal(checkpoint)
    return folder


@pytest.fixture
def run(healthy, tmp_path):
    return shutil.copytree(healthy, tmp_path / "run")


def change(run, stage="sft_grpo", last=None, **values):
    """Overwrite values of a stage's metrics, in its last `last` rows or in all."""
    path = run / stage / "metrics.jsonl"
    rows = rows_of(path)
    start = 0 if last is None else len(rows) - last
    write_rows(path, [*rows[:start], *(row | values for row in rows[start:])])


def problems_of(run) -> dict[str, str]:
    found = [one for one in examine(run) if one.bad]
    assert all(one.fix for one in found)
    return {one.name: one.message for one in found}


def test_a_healthy_run_has_no_findings(healthy):
    assert problems_of(healthy) == {}


@pytest.mark.parametrize(
    ("values", "name", "message"),
    [
        ({"reward": 0.0}, "flat reward", "0 in each of the last 10 steps"),
        ({"reward": 1.0}, "flat reward", "1 in each"),
        ({"zero_variance_groups": 0.95}, "Groups with equal rewards", "95.0%, more than 80.0%"),
        ({"kl": 4.2}, "KL from the reference", "4.2 nats a token, more than 1 nats"),
        ({"truncated": 0.5}, "Answers cut at the limit", "50.0%, more than 10.0%"),
        ({"response_tokens": 5.0}, "length collapse", "to 5 tokens"),
        ({"boxes_per_answer": 3.0}, "Boxes per answer", "3.00, more than 1.50"),
        ({"no_format_share": 0.6}, "Answers without a box to read", "60.0%, more than 20.0%"),
        ({"repeated_share": 0.4}, "Answers that repeat themselves", "40.0%, more than 10.0%"),
        ({"unscored": 0.2}, "Answers that could not be graded", "20.0%, more than 5.0%"),
        ({"sampler_gap": 0.7}, "Gap between sampler and policy", "0.7 nats a token, more than 0.1 nats"),
        ({"entropy": 0.001}, "entropy collapse", "0.001 nats"),
        ({"grad_norm": 900.0}, "gradients", "900"),
        ({"skipped": NOT_FINITE}, "bad steps", "10 of 80 steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_each_illness_of_training_is_named_alone(run, values, name, message):
    change(run, last=10, **values)
    found = problems_of(run)
    assert list(found) == [f"RL after SFT: {name}"]
    assert message in found[f"RL after SFT: {name}"]


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: sign.key)
def test_doctor_and_page_agree_on_each_sign(run, sign):
    change(run, last=10, **{sign.key: 1.1 * sign.most})
    assert problems_of(run) == {f"RL after SFT: {sign.name}": sign.message(1.1 * sign.most)}
    page = build(run).read_text()
    assert page.count("! over") == 1 and page.count(f"(limit {sign.form.format(sign.most)})") == 1
    change(run, last=10, **{sign.key: 0.9 * sign.most})
    assert problems_of(run) == {}


def test_a_recipe_sets_its_own_limit_of_the_sampler_s_gap(run):
    change(run, last=10, sampler_gap=0.7)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(f"{recipe}rollout:\n  alarm: 0.8\n")
    assert problems_of(run) == {}
    (run / "recipe.yaml").write_text(f"{recipe}rollout:\n  alarm: 0.6\n")
    assert "more than 0.6 nats" in problems_of(run)["RL after SFT: Gap between sampler and policy"]


def test_flat_steps_are_not_bad_steps_and_sft_has_its_own(run):
    change(run, last=3, skipped=NO_SIGNAL)
    assert problems_of(run) == {}
    change(run, stage="sft", last=3, skipped=NOT_FINITE)
    assert list(problems_of(run)) == ["SFT: bad steps"]


def test_a_stopped_run_says_where_and_how_it_goes_on(run):
    (run / "sft_grpo" / "done.json").unlink()
    change(run, step=40)
    assert [one.message for one in examine(run) if one.name == "state"] == ["running: RL after SFT, 40 of 80"]
    (run / "logs").mkdir()
    (run / "logs" / "attempt-1.log").write_text(
        "2026 ERROR rlcs: ended by RunFolderError: cannot write 9 bytes: No space left\n"
    )
    course = next(one for one in examine(run) if one.name == "state")
    assert (
        course.message.startswith("stopped: RL after SFT, 40 of 80; ended by RunFolderError")
        and "No space" in course.message
    )
    assert course.fix == f"continue it with: rlcs run {run / 'recipe.yaml'} --out {run}"
    (run / "logs" / "attempt-1.log").write_text("2026 INFO rlcs: sft\n")
    for path in (*run.glob("*/metrics.jsonl"), *run.glob("logs/*")):
        os.utime(path, (1, 1))
    assert problems_of(run) == {"state": "stopped: RL after SFT, 40 of 80"}, "killed: no last word"


@pytest.mark.parametrize(
    ("arms", "stages"),
    [("base sft", "cold_start sft"), ("base grpo", "grpo"), ("base sft_grpo", "cold_start sft sft_grpo")],
)
def test_a_run_of_fewer_arms_is_done_when_its_own_stages_are(run, arms, stages):
    listed = "".join(f"  - {arm}\n" for arm in arms.split())
    (run / "recipe.yaml").write_text(f"name: x\nstudy:\n  arms:\n{listed}report: {{}}\n")
    for stage in ("cold_start", "sft", "sft_grpo", "grpo"):
        if stage not in stages.split():
            shutil.rmtree(run / stage)
    for arm in ("sft", "grpo", "sft_grpo"):
        if arm not in arms.split():
            shutil.rmtree(run / "eval" / arm)
    assert problems_of(run) == {}
    for stage in stages.split():
        shutil.rmtree(run / stage)
    waiting = [one.key for one in progress(read_run(run)) if one.state == "waiting"]
    assert waiting == stages.split(), "and the live page shows no stage that never comes"


def test_torn_checkpoints_and_leftovers(run):
    folder = run / "sft_grpo" / "checkpoints"
    shutil.copytree(folder / "step-000050", folder / "step-000060")
    (folder / "step-000060" / "model.safetensors").write_bytes(b"weights" * 50)
    (folder / "step-000070.tmp-123").mkdir()
    (folder / "step-000040.bad").mkdir()
    told = [one.message for one in examine(run) if one.name == "checkpoint" and one.bad]
    assert "step-000060 is torn: the file has 350 bytes instead of 700" in told[1]
    assert "set aside" in told[0] and "left of a killed save" in told[2]
    assert any("step-000050 verified" in one.message for one in examine(run))


def test_a_full_disk(run, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(health.shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1 << 20))
    assert list(problems_of(run)) == ["disk"]


def test_two_stages_worse_than_one(run):
    path = run / "eval" / "sft_grpo" / "predictions.jsonl"
    write_rows(path, [row | {"correct": False} for row in rows_of(path)])
    assert "points worse than" in problems_of(run)["result"]


def test_a_study_of_seeds_names_the_seed(healthy, tmp_path):
    for seed in (0, 1):
        shutil.copytree(healthy, tmp_path / f"seed-{seed}")
    change(tmp_path / "seed-1", last=10, unscored=0.5)
    assert list(problems_of(tmp_path)) == ["seed-1: RL after SFT: Answers that could not be graded"]


def test_a_study_of_seeds_that_stopped_in_the_first_goes_on_with_all(run, tmp_path, monkeypatch):
    def stopped(recipe, folder, **_):
        shutil.copytree(run, folder)
        raise Stopped("as asked")

    parent = tmp_path / "study"
    (run / "sft_grpo" / "done.json").unlink()
    (run / "logs").mkdir()
    (run / "logs" / "attempt-1.log").write_text("2026 ERROR rlcs: ended by Stopped: as asked\n")
    monkeypatch.setattr(seeds, "Study", stopped)
    with pytest.raises(Stopped):
        seeds.run_seeds(load_recipe("quickstart").recipe, parent, 3, data=None, output=None, stop=None)
    assert [path.name for path in parent.glob("seed-*")] == ["seed-0"]
    course = next(one for one in examine(parent) if one.name == "state")
    assert f"rlcs ablate --seeds 3 {parent / 'recipe.yaml'} --out {parent}" in course.fix


def test_torn_and_odd_files_do_not_stop_the_doctor(run):
    with (run / "sft_grpo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 81, "rew')
    (run / "sft_grpo" / "checkpoints" / "step-000050" / "manifest.json").write_text("[]")
    (run / "summary.json").write_text("{")
    assert "torn" in problems_of(run)["checkpoint"]


def test_the_command_line(run, tmp_path):
    told = CliRunner().invoke(app, ["doctor", str(run)])
    assert told.exit_code == 0 and "ok state: every stage is done" in told.output
    change(run, last=10, unscored=0.5)
    told = CliRunner().invoke(app, ["doctor", str(run)])
    assert told.exit_code == 1 and "   -> see why in rollouts/: correct what fails" in told.output
    rows = json.loads(CliRunner().invoke(app, ["doctor", str(run), "--json"]).output)["findings"]
    assert [row["name"] for row in rows if row["fix"]] == ["RL after SFT: Answers that could not be graded"]
    with pytest.raises(RunFolderError, match="no run is here"):
        examine(tmp_path / "nowhere")


def test_this_machine_for_real():
    found = {one.name: one for one in machine.checks()}
    assert {
        name: one.message for name, one in found.items() if one.bad and name not in ("memory", "disk")
    } == {}
    of_models = {f"{path}, {name}" for path in ("packing", "sampler") for name in BUILTIN}
    assert of_models | {"grader"} <= set(found)
    facts = machine.facts()
    assert facts["torch"][0].isdigit() and "cores" in facts["processor"] and "GiB" in facts["memory"]


def test_a_fast_path_that_disagrees_is_found(monkeypatch):
    real = machine.score

    def off(*words):
        scores = real(*words)
        return dataclasses.replace(scores, logprobs=scores.logprobs - 0.5)

    monkeypatch.setattr(machine, "agreement", lambda *words: [Agreement(gap=0.5, limit=1e-4)])
    monkeypatch.setattr(machine, "_grader", lambda: (_ for _ in ()).throw(OSError("no processes here")))
    monkeypatch.setattr(machine, "score", off)
    found = {one.name: one for one in machine.checks()}
    assert found["packing, builtin"].bad and "0.5 nats" in found["packing, builtin-hybrid"].message
    assert found["sampler, builtin"].bad and "model.attention=dense" in found["sampler, builtin-hybrid"].fix
    assert found["grader"].bad and "no processes here" in found["grader"].message
