"""One name for a model everywhere: runs, stages, finished models, checkpoints, and what is refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rlcs as api
from conftest import SMALL_STUDY, rlcs, seal
from rlcs.data import puzzles
from rlcs.data.run_data import load_run_data
from rlcs.errors import CheckpointError, ModelError, RlcsError, RunFolderError, UserError
from rlcs.evals.run import _weights_stamp
from rlcs.generation import open_sampler
from rlcs.model import loading
from rlcs.model.source import BUILTIN, find_source, origin_of
from rlcs.pipeline.study import Study
from rlcs.plan.sizes import sizes_of
from rlcs.progress import Output
from rlcs.publish.export import Export, export
from rlcs.recipe.loading import dump, load_recipe
from rlcs.recipe.schema import Model
from rlcs.records import Request, Sampling
from rlcs.signals import StopFlag
from rlcs.storage import read_json, write_json

SMALL = [
    *SMALL_STUDY,
    "grpo.steps=3",
    "grpo.optimizer.lr=0.001",
    "grpo.reward.accuracy=0",
    "grpo.max_new_tokens=8",
    "eval.max_new_tokens=8",
    "data.test=builtin:puzzles?split=test&count=4&seed=3",
    "study.arms=[base, sft_grpo]",
    "grpo.keep_steps=[2]",
    "sft.keep_steps=[3]",
    "validation.grpo_every=1",
    "validation.problems=4",
]  # fmt: skip


ODD = Path(__file__).with_name("odd_reward.py")
"""A reward that differs even among the answers of a random model."""


def trained(folder, source, *more):
    words = [f"model.name={source}", *SMALL, f"grpo.reward.functions={{{ODD}:odd: 1}}", *more]
    recipe = load_recipe("quickstart", words).recipe
    data = load_run_data(recipe.study, recipe.data, decode_limit=10**7, validation=recipe.validation)
    Study(recipe, folder, data=data, output=Output(quiet=True), stop=StopFlag()).run()
    return folder


@pytest.fixture(scope="module")
def run(random_model_folder, tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "mine", random_model_folder)


def refused(name, kind=RlcsError, **options):
    with pytest.raises(kind) as caught:
        find_source(str(name), **options)
    return str(caught.value)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


# --- names ------------------------------------------------------------------------------------------


def test_every_name_of_a_run_s_models(run, monkeypatch):
    main = str(run / "sft_grpo" / "final")
    for name in (run, f"{run}/", run / "sft_grpo", run / "sft_grpo" / "final", f"{run}@3"):
        assert find_source(str(name)).weights == main, name
    for name in (run / "sft", run / "sft" / "final"):
        assert find_source(str(name)).weights == str(run / "sft" / "final")
    step = run / "sft_grpo" / "checkpoints" / "step-000002"
    for name in (f"{run}@2", f"{run}/sft_grpo@2", f"{run}/sft_grpo/final@2", step):
        found = find_source(str(name))
        assert (found.checkpoint, found.step, found.arm) == (step, 2, "sft_grpo"), name
    assert find_source(str(run), arm="sft", step=3) == find_source(f"{run}/sft@3")
    assert find_source(str(run), arm="base").weights == read_recipe(run).model.name
    monkeypatch.chdir(run / "sft")
    assert find_source("final").weights == find_source(".").weights == str(run / "sft" / "final")
    assert find_source("checkpoints/step-000003").step == 3
    monkeypatch.chdir(run.parent)
    assert find_source("mine/sft").weights == "mine/sft/final"
    assert find_source("mine@2").checkpoint == Path("mine/sft_grpo/checkpoints/step-000002")


def read_recipe(run):
    return load_recipe(str(run / "recipe.yaml")).recipe


def test_other_models_stay_what_they_are(random_model_folder, tmp_path):
    assert find_source(str(random_model_folder)).weights == str(random_model_folder)
    assert find_source("Qwen/Qwen2.5-VL-3B-Instruct").weights == "Qwen/Qwen2.5-VL-3B-Instruct"
    for name in BUILTIN:
        assert (Path(find_source(name).weights) / "config.json").is_file()
    odd = tmp_path / "release@2"
    shutil.copytree(random_model_folder, odd)
    assert find_source(str(odd)).weights == str(odd), "a folder may be called so"


def test_what_is_no_model_says_what_there_is(run, random_model_folder, tmp_path, monkeypatch):
    message = refused(f"{run}@7", RunFolderError)
    assert "no checkpoint of step 7 of sft_grpo is kept" in message
    assert f"{run}/sft@3" in message and f"{run}/sft_grpo@2" in message and f"{run}/sft," in message
    assert "is not trained and has no steps" in refused(run, arm="base", step=2)
    assert "no finished model of the arm grpo" in refused(run, arm="grpo")
    assert "only a run has arms and steps" in refused("builtin", step=3)
    assert "only a run has arms and steps" in refused(f"{random_model_folder}@3")
    assert "given twice" in refused(f"{run}@2", UserError, step=2)
    assert f"did you mean {run}?" in refused(run.with_name("mime"), ModelError)
    assert "did you mean builtin-hybrid?" in refused("builtin-hybird", ModelError)
    assert f"name one of: {run}" in refused(run.parent, ModelError)
    monkeypatch.chdir(run.parent.parent)
    near = f"{run.parent.name}/mien"  # it could be a hub id, but a run of nearly that name is here
    assert "did you mean" in refused(near, ModelError)
    for name in ("nowhere", "./a/b", "/no/such", "a/b/c", "~nobody-of-this-name/mine", "a\0b"):
        assert "there is no such folder" in refused(name, ModelError), name
    adapters = tmp_path / "adapter"
    write_json(adapters / "adapter_config.json", {})
    assert f"the whole model is in {tmp_path}" in refused(adapters, ModelError)


def test_a_mistyped_part_of_a_run_is_no_hub_id(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    for part in ("base", "stf@3", "recipe.yaml", "sft/checkpoints", "models/step-000002", "eval/sft"):
        message = refused(f"{run.name}/{part}", ModelError)
        assert "the run has no such model" in message and f"name one of: {run.name}/sft," in message, part
    monkeypatch.chdir(run)
    assert find_source("Qwen/Qwen2.5-VL-3B-Instruct").weights == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_links_into_a_run_are_its_models(run, tmp_path):
    for name, target in (("run", "."), ("stage", "sft"), ("step", "sft/checkpoints/step-000003")):
        (tmp_path / name).symlink_to(run / target)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert find_source(f"{tmp_path}/run/sft@3").step == 3
    for name in ("stage@3", "stage/final@3", "step"):
        found = find_source(f"{tmp_path}/{name}")
        assert (found.arm, found.step) == ("sft", 3), name
    assert "there is no such folder" in refused(tmp_path / "loop", ModelError)


def test_an_unfinished_run_says_what_it_has(run, tmp_path):
    begun = tmp_path / "begun"
    shutil.copytree(run, begun)
    (begun / "sft_grpo" / "done.json").unlink()
    message = refused(begun)
    assert "no finished model of the arm sft_grpo" in message and f"name one of: {begun}/sft," in message
    assert find_source(f"{begun}@2").step == 2 and find_source(f"{begun}/sft").arm == "sft"
    for stage in ("sft", "sft_grpo"):
        shutil.rmtree(begun / stage)
    assert "no stage has finished or saved a checkpoint" in refused(begun)
    assert "no stage has finished" in refused(f"{begun}@2")


def test_runs_that_name_each_other_end(run, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(run, mine, ignore=shutil.ignore_patterns("models"))
    recipe = read_recipe(run)
    own = recipe.model.model_copy(update={"name": str(mine)})
    (mine / "recipe.yaml").write_text(dump(recipe.model_copy(update={"model": own})))
    with pytest.raises(ModelError, match="name each other"):
        origin_of(str(mine))


def test_seeds_are_listed(run, tmp_path):
    for seed in (0, 1):
        shutil.copytree(run, tmp_path / f"seed-{seed}")
    shutil.copy(run / "recipe.yaml", tmp_path)
    for name in (tmp_path, f"{tmp_path}@2"):
        message = refused(name, RunFolderError)
        assert "a model for each of 2 seeds" in message and "seed-0, seed-1" in message
    assert find_source(f"{tmp_path}/seed-1@2").step == 2


# --- the model of a checkpoint ----------------------------------------------------------------------


def test_a_checkpoint_s_model_is_what_its_stage_would_have_ended_with(run, random_model_folder, tmp_path):
    shorter = trained(tmp_path / "shorter", random_model_folder, "grpo.steps=2")
    made = Path(loading.resolve(f"{run}@2"))
    assert made == run / "sft_grpo" / "models" / "step-000002"
    final = shorter / "sft_grpo" / "final"
    assert same(weights(made), weights(final)) and not same(
        weights(made), weights(run / "sft_grpo" / "final")
    )
    names = {path.name for path in made.iterdir()} - {"made_of.json"}
    assert names == {path.name for path in final.iterdir()}
    for name in names - {"model.safetensors"}:
        assert (made / name).read_text() == (final / name).read_text(), name
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert loading.resolve(f"{run}@2") == str(made), "made once"
    assert (made / "model.safetensors").stat().st_mtime_ns == before


def test_a_checkpoint_that_was_replaced_or_removed(run, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(run, mine)
    stage = mine / "sft_grpo"
    made = Path(loading.resolve(f"{mine}@2"))
    before = weights(made)
    shutil.rmtree(stage / "checkpoints")
    assert loading.resolve(f"{mine}@2") == str(made), "the model stays when training prunes the checkpoint"
    assert f"{stage}@2" in refused(f"{mine}@1")
    shutil.copytree(run / "sft" / "checkpoints" / "step-000003", stage / "checkpoints" / "step-000002")
    path = stage / "checkpoints" / "step-000002" / "state.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 2', 1))
    seal(path.parent)
    loading.resolve(f"{mine}@2")
    assert not same(weights(made), before)


def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(run, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(run, mine, ignore=shutil.ignore_patterns("models"))
    folder = mine / "sft_grpo" / "checkpoints" / "step-000002"
    (folder / "optimizer.safetensors").unlink()  # is not read
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        loading.resolve(f"{mine}@2")
    assert not list((mine / "sft_grpo").glob("models/*"))
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert Path(loading.resolve(f"{mine}@2"), "config.json").is_file()


def test_adapters_are_merged_into_a_checkpoint_s_model(random_model_folder, tmp_path):
    words = [
        "lora.rank=2",
        "sft.freeze=[vision_tower]",
        "sft.optimizer.lr=0.01",
        "sft.optimizer.schedule=constant",
    ]
    words += ["study.arms=[base, sft]", "validation.grpo_every=0", "validation.problems=200"]
    run = trained(tmp_path / "long", random_model_folder, *words)
    words += ["sft.epochs=1.5", "sft.keep_steps=[]"]
    shorter = trained(tmp_path / "short", random_model_folder, *words)
    assert read_json(shorter / "sft" / "done.json")["step"] == 3
    made = Path(loading.resolve(f"{run}@3"))
    assert same(weights(made), weights(shorter / "sft" / "final"))
    for name in ("chat_template.jinja", "processor_config.json", "config.json"):  # the run's own prompt
        assert (made / name).read_text() == (shorter / "sft" / "final" / name).read_text(), name
    assert same(
        load_file(made / "adapter" / "adapter_model.safetensors"),
        load_file(shorter / "sft" / "final" / "adapter" / "adapter_model.safetensors"),
    )


def test_a_run_folder_that_cannot_be_written_says_what_to_do(run, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    shutil.copytree(run, mine, ignore=shutil.ignore_patterns("models"))
    (mine / "sft_grpo" / "models").write_text("in the way")
    with pytest.raises(RunFolderError, match=r"(?s)cannot be written here.*rlcs export .*@2 --out"):
        loading.resolve(f"{mine}@2")
    export(Export(model=f"{mine}@2", out=tmp_path / "out"))  # which needs no place in the run
    assert same(weights(tmp_path / "out"), weights(loading.resolve(f"{run}@2")))


# --- wherever a model is named ------------------------------------------------------------------------


def test_a_run_s_models_answer_from_python_and_in_a_recipe(run):
    assert api.load(str(run)).ask(None, "2 + 2?").text is not None
    assert same(
        dict(loading.load(Model(name=f"{run}@2")).model.state_dict()),
        dict(loading.load(Model(name=loading.resolve(f"{run}@2"))).model.state_dict()),
    )
    vlm, _ = api.load_policy(f"{run}/sft")
    assert vlm.model.config.model_type == "qwen2_5_vl"
    assert sizes_of(Model(name=f"{run}@2")).total == sizes_of(Model(name=str(run))).total


def test_a_run_is_a_teacher_or_a_judge(run):
    """Whatever samples from a model that rlcs loads goes through `open_sampler`."""
    [problem] = puzzles.load("puzzles", split="train", count=1, seed=3)
    with open_sampler(f"{run}@2", Sampling(temperature=0.0, max_new_tokens=4)) as sampler:
        [sample] = sampler.samples([Request.of(problem)])
    assert sample.tokens and not sample.error


def test_a_run_starts_from_another_run(run, tmp_path):
    shutil.copytree(run, tmp_path / "mine", ignore=shutil.ignore_patterns("models"))
    next_run = trained(tmp_path / "next", f"{tmp_path}/mine@2", "study.arms=[base, grpo]")
    base = find_source(str(next_run), arm="base")
    assert loading.weights_of(base) == str(tmp_path / "mine" / "sft_grpo" / "models" / "step-000002")
    assert origin_of(str(next_run)) == read_recipe(run).model.name
    with pytest.raises(RunFolderError, match="no checkpoint of step 9"):
        trained(tmp_path / "no", f"{run}@9", "study.arms=[base, grpo]")


def test_the_commands_take_a_run_and_a_step(run, tmp_path):
    done = rlcs("generate", f"{run}@2", "2 + 2?", "--max-tokens", "4", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["tokens"] <= 4, done.stderr
    done = rlcs("export", run, "--step", "3", "--arm", "sft", "--out", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "model"), weights(loading.resolve(f"{run}/sft@3")))
    for verb in (["generate", f"{run}@9", "2?"], ["export", run, "--step", 9, "--out", tmp_path / "no"]):
        done = rlcs(*verb)
        assert done.returncode == 2 and f"{run}/sft_grpo@2" in done.stderr, done.stderr
    looked = rlcs("look", "quickstart", f"model.name={run}@2")
    assert looked.returncode == 0, looked.stderr
    for name in (run, run / "sft"):  # the run's recipe has the same data
        assert replace(looked, stderr="") == replace(rlcs("look", name), stderr="")
    done = rlcs("publish", run, "me/mine", "--dry-run")
    assert done.returncode == 0 and "files would go to me/mine" in done.stdout, done.stderr
    assert "do not name" not in done.stderr, "its card names the repository"
    assert "no exported folder" in rlcs("publish", run.parent, "me/mine", "--dry-run").stderr


def test_an_answer_of_other_weights_is_not_taken_for_one_of_these(run):
    stamps = {_weights_stamp(name) for name in (f"{run}@2", str(run), f"{run}/sft", f"{run}/sft@3")}
    assert len(stamps) == 4 and None not in stamps
    assert _weights_stamp("Qwen/Qwen2.5-VL-3B-Instruct") is None


def test_the_card_of_a_checkpoint_claims_no_result_of_another_model(run, tmp_path):
    export(Export(model=str(run), step=2, out=tmp_path / "a"))
    text = (tmp_path / "a" / "README.md").read_text()
    assert "**A checkpoint.** It is the model after step 2 of RL after SFT" in text
    assert "## Results" not in text and "No measurement came with this export" in text
    row = [json.loads(line) for line in (run / "sft_grpo" / "validation.jsonl").open()][2]
    assert row["step"] == 2
    assert f"In validation at that step {row['accuracy']:.1%} of 4 problems" in text
    export(Export(model=str(run), out=tmp_path / "b"))
    text = (tmp_path / "b" / "README.md").read_text()
    assert "A checkpoint." not in text and "## Results" in text


def test_the_card_of_the_best_model_says_how_it_was_chosen(run, tmp_path):
    best = tmp_path / "best"
    shutil.copytree(run, best)
    done = best / "sft_grpo" / "done.json"
    write_json(done, {**read_json(done), "step": 2, "rule": "best_pass_1"})
    export(Export(model=str(best), out=tmp_path / "a"))
    text = (tmp_path / "a" / "README.md").read_text()
    assert re.search(r"after step 2 of the last stage \(RL after SFT\), the best in validation", text)
    assert "the step was chosen by that score, which is therefore too high" in text and "## Results" in text
