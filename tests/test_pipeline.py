"""The whole study through the command line, on a random model: stages, resume, refusals, exit codes."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import warm
from conftest import SMALL_STUDY, rlcs
from loopback_server import LoopbackServer
from rlcs.cli.train import _arm_lines
from rlcs.data import run_data
from rlcs.distributed import join_world
from rlcs.errors import DataError, ModelError, OutOfMemory, RecipeError, RunFolderError, UserError
from rlcs.evals import arms as evaluation
from rlcs.generation import SampleLog
from rlcs.model import loading
from rlcs.pipeline import run_folder, seeds, study
from rlcs.pipeline.study import engine_needs
from rlcs.recipe.arms import COMMAND_ARMS
from rlcs.recipe.loading import load_recipe
from rlcs.records import Grade, Problem, Sample, StopReason
from rlcs.signals import StopFlag
from rlcs.storage import append_jsonl
from test_distributed import environment, free_port

SMALL = [
    *SMALL_STUDY,
    "sft.save_every=1",
    "grpo.steps=2",
    "grpo.optimizer_steps=1",
    "grpo.max_new_tokens=8",
    "grpo.save_every=1",
    "eval.max_new_tokens=8",
    "trackers.tensorboard=true",
]


def data_of(recipe) -> run_data.RunData:
    return run_data.load_run_data(recipe.study, recipe.data, decode_limit=recipe.images.decode_limit)


@pytest.fixture(scope="module")
def finished(random_model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = rlcs("quickstart", f"model.name={random_model_folder}", *SMALL, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "RL clip" in done.stdout and "Cold start + RL" in done.stdout  # the choices, before the start
    assert str(folder / "report" / "index.html") in done.stdout
    return folder


def test_a_run_leaves_everything_it_promises(finished):
    for name in (
        "recipe.yaml",
        "data_checks.json",
        "cold_start/kept.jsonl",
        "cold_start/rejected.jsonl",
        "cold_start/stats.json",
        "sft/metrics.jsonl",
        "sft/final/model.safetensors",
        "sft_grpo/rollouts/step-000002.jsonl",
        "sft_grpo/rollouts/problems.jsonl",
        "report/rollouts.html",
        "sft_grpo/checkpoints/step-000001/manifest.json",
        "grpo/final/config.json",
        "eval/sft_grpo/predictions.jsonl",
        "report/index.html",
        "logs/attempt-1.log",
    ):
        assert (finished / name).is_file(), name
    asked = [json.loads(line) for line in (finished / "sft_grpo/rollouts/problems.jsonl").open()]
    assert len({row["id"] for row in asked}) == len(asked) == 6
    assert all(
        (finished / "sft_grpo/rollouts" / image["path"]).stat().st_size
        for row in asked
        for image in row["images"]
    )
    assert len(list((finished / "grpo" / "tensorboard").glob("events.*"))) == 1
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["arms"]) == {"base", "sft", "grpo", "sft_grpo"}
    for scores in summary["arms"].values():
        assert scores["n"] == 20 and 0 <= scores["low"] <= scores["accuracy"] <= scores["high"] <= 1
    assert summary["seconds"]["sft"] > 0 and summary["recipe"]["grpo"]["clip_high"] == 0.3


def test_the_study_on_the_built_in_hybrid_model(tmp_path):
    """Every stage and arm; the engine is compared with the trainer before RL by the run itself."""
    out = tmp_path / "hybrid"
    done = rlcs("quickstart", "model.name=builtin-hybrid", *SMALL_STUDY, "grpo.steps=1", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "the engine computes what the trainer does" in done.stdout + done.stderr
    assert set(json.loads((out / "summary.json").read_text())["arms"]) == set(COMMAND_ARMS["quickstart"])
    trained = AutoConfig.from_pretrained(out / "sft_grpo" / "final").text_config
    assert trained.layer_types.count("linear_attention") == 3


def test_the_same_command_again_does_nothing_twice(finished, random_model_folder):
    before = (finished / "sft" / "final" / "model.safetensors").stat().st_mtime_ns
    # As of an attempt that was killed at its end: no engine is opened any more, which would remove them.
    weights_for_vllm = finished / "rollout" / "weights" / "0123abcd-4" / "model.safetensors"
    weights_for_vllm.parent.mkdir(parents=True)
    weights_for_vllm.touch()
    for command in (["quickstart"], ["run", "quickstart"], ["sft", "quickstart"]):
        again = rlcs(*command, f"model.name={random_model_folder}", *SMALL, "--out", finished)
        assert again.returncode == 0
        assert set(json.loads((finished / "summary.json").read_text())["arms"]) == set(
            COMMAND_ARMS["quickstart"]
        )
    assert (finished / "sft" / "final" / "model.safetensors").stat().st_mtime_ns == before
    assert "sft 1/" not in again.stdout
    assert not weights_for_vllm.exists()


def test_another_recipe_in_the_same_folder_is_refused(finished, random_model_folder):
    words = ["run", "quickstart", f"model.name={random_model_folder}", *SMALL, "grpo.clip_high=0.4"]
    refused = rlcs(*words, "--out", finished)
    assert refused.returncode == 2
    assert "grpo.clip_high was 0.3, is 0.4" in refused.stderr and "choose another --out" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("more", [[], ["lora.rank=2", "model.gradient_checkpointing=true"]])
@pytest.mark.parametrize("sharded", [False, True])
def test_one_model_at_a_time_is_in_memory(random_model_folder, tmp_path, monkeypatch, sharded, more):
    """The trial, two stages and three arms: each model is gone when the next one is loaded."""
    born, alive, load = [], [], loading.load

    def counting(*args, **options):
        if not options.get("weights", True):
            return load(*args, **options)  # a structure, without any memory
        alive.append(sum(model() is not None for model in born))
        vlm = load(*args, **options)
        born.append(weakref.ref(vlm.model))
        return vlm

    monkeypatch.setattr(loading, "load", counting)
    words = [f"model.name={random_model_folder}", *SMALL, "study.arms=[base, sft, sft_grpo]", *more]
    recipe = load_recipe("quickstart", words).recipe
    data, output = data_of(recipe), study.Output(quiet=True)
    for name, value in environment(0, 1, free_port()).items() if sharded else ():
        monkeypatch.setenv(name, value)
    gc.disable()  # a collection by chance would free FSDP's circles too
    try:
        with join_world(timeout_s=60) as world:
            study.Study(
                recipe, tmp_path / "run", data=data, output=output, stop=StopFlag(), world=world
            ).run()
    finally:
        gc.enable()
    assert alive == [0] * 6


def test_engines_are_opened_with_what_the_recipe_asks_for(tmp_path, monkeypatch):
    words = ["rollout.engine=vllm_server", "lora.rank=4", "parallel.compute_dtype=bfloat16"]
    words += ["grpo.group_size=9", "grpo.max_rows=7", "grpo.max_new_tokens=50", "eval.max_new_tokens=60"]
    words += ["prompt.max_tokens=100", "images.decode_limit=5000000", "study.preflight=off"]
    chosen = load_recipe("quickstart", words).recipe
    needs = []

    def opened(given, folder):
        needs.append((given, folder))
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "open_engines", opened)
    given = {"data": data_of(chosen), "output": study.Output(quiet=True), "stop": StopFlag()}
    with pytest.raises(KeyboardInterrupt):
        study.Study(chosen, tmp_path / "run", **given).run()
    assert needs == [(engine_needs(chosen), tmp_path / "run" / "rollout")]
    assert (needs[0][0].max_tokens, needs[0][0].max_rows, needs[0][0].adapter_rank) == (160, 9, 4)


def test_one_stage_alone_and_the_rest_later(random_model_folder, tmp_path):
    words, out = [f"model.name={random_model_folder}", *SMALL], tmp_path / "run"
    alone = rlcs("sft", "quickstart", *words, "--out", out)
    assert alone.returncode == 0, alone.stderr
    assert f"model    {out / 'sft' / 'final'}" in alone.stdout
    assert {path.name for path in (out / "eval").iterdir() if path.is_dir()} >= {"base", "sft"}
    assert not (out / "sft_grpo").exists() and (out / "report" / "index.html").is_file()
    trained = (out / "sft" / "final" / "model.safetensors").stat().st_mtime_ns
    more = rlcs("run", "quickstart", *words, "--out", out)
    assert more.returncode == 0, more.stderr
    assert (out / "sft" / "final" / "model.safetensors").stat().st_mtime_ns == trained
    assert set(json.loads((out / "summary.json").read_text())["arms"]) == {"base", "sft", "sft_grpo"}
    assert not (out / "grpo").exists(), "RL alone is the other commands'"
    joined = rlcs(
        "grpo", "quickstart", *words, "data.cold_start=builtin:puzzles?count=12&seed=1", "--out", out
    )
    assert joined.returncode == 0, joined.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["arms"]) == set(summary["recipe"]["study"]["arms"]) == set(COMMAND_ARMS["quickstart"])
    assert summary["counts"] == {"cold_start": 10, "rl": 12, "test": 20}


def test_a_folder_has_the_arms_of_every_command(tmp_path):
    """`rlcs sft`, then `rlcs grpo`, then `rlcs sft` again: each does its own, and none takes an arm away."""
    for asked, held in (
        ("base, sft", ("base", "sft")),
        ("base, grpo", ("base", "sft", "grpo")),
        ("base, sft", ("base", "sft", "grpo")),
    ):
        recipe = load_recipe("quickstart", [f"study.arms=[{asked}]"]).recipe
        assert run_folder.claim(tmp_path / "run", recipe).study.arms == held
        assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).recipe.study.arms == held
        append_jsonl(tmp_path / "run" / "eval" / "base" / "predictions.jsonl", [{"id": "1"}])


def test_what_is_cheap_is_known_first(random_model_folder, tmp_path):
    """The base is measured before anything is trained, SFT before RL begins; a named arm is what runs."""
    words = [f"model.name={random_model_folder}", *SMALL]
    done = rlcs("run", "quickstart", *words, "--quiet", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "logs" / "attempt-1.log").read_text()
    begun_or_measured = re.findall(r"INFO rlcs: (sft|sft_grpo|grpo|eval \w+):", lines)
    assert begun_or_measured == ["eval base", "sft", "eval sft", "sft_grpo", "eval sft_grpo"]
    two = rlcs("quickstart", *words, "study.arms=[base, sft]", "--out", tmp_path / "two")
    assert two.returncode == 0 and not (tmp_path / "two" / "grpo").exists(), two.stderr


def test_a_run_with_results_may_go_on_with_other_limits_of_its_graders(tmp_path):
    def recipe(*words):
        given = ["weight=1", "model=j", "base_url=http://a/v1", "max_requests=9", *words]
        return load_recipe("quickstart", [f"grpo.reward.judge.{word}" for word in given]).recipe

    out, before = tmp_path / "run", recipe()
    run_folder.claim(out, before)
    append_jsonl(out / "eval" / "base" / "predictions.jsonl", [{"id": "1"}])
    limits = ["max_requests=null", "max_wait_s=9", "concurrency=2", "request_timeout_s=7", "max_retries=5"]
    after = recipe(*limits, "base_url=http://b/v1", "key_env=OTHER")
    reward = after.grpo.reward.model_copy(update={"deadline_s": 9.0, "workers": 2})
    after = after.model_copy(update={"grpo": after.grpo.model_copy(update={"reward": reward})})
    run_folder.claim(out, after)
    assert load_recipe(str(out / "recipe.yaml")).recipe == after
    assert run_folder.recipe_hash(after) == run_folder.recipe_hash(before)
    for word in ("scale=zero_to_one", "model=k", "template={response}", "weight=2"):
        assert run_folder.recipe_hash(recipe(word)) != run_folder.recipe_hash(before)
        with pytest.raises(RunFolderError, match=rf"judge\.{word.split('=')[0]} was"):
            run_folder.claim(out, recipe(*limits, word))


def test_a_run_may_go_on_with_less_memory(tmp_path):
    def recipe(*words):
        return load_recipe("quickstart", words).recipe

    out, before = tmp_path / "run", recipe()
    run_folder.claim(out, before)
    append_jsonl(out / "eval" / "base" / "predictions.jsonl", [{"id": "1"}])
    less = ["sft.pack_tokens=1024", "grpo.pack_tokens=1024", "grpo.max_rows=8", "eval.max_rows=8"]
    less += ["model.gradient_checkpointing=true", "rollout.memory_share=0.3", "parallel.cpu_offload=true"]
    after = recipe(*less, "parallel.reshard_after_forward=true")
    run_folder.claim(out, after)
    assert load_recipe(str(out / "recipe.yaml")).recipe == after
    assert run_folder.recipe_hash(after) == run_folder.recipe_hash(before)
    for word in ("grpo.max_new_tokens=9", "lora.rank=2", "images.max_pixels=99999"):
        with pytest.raises(RunFolderError, match="another recipe"):
            run_folder.claim(out, recipe(word))
    # There the loss is a mean of packs.
    by_pack = "grpo.loss_average=micro_batch"
    assert run_folder.recipe_hash(recipe(by_pack)) != run_folder.recipe_hash(recipe(by_pack, less[1]))


def test_a_start_that_came_to_nothing_may_be_corrected(tmp_path, random_model_folder):
    def recipe(*words):
        return load_recipe("quickstart", [*SMALL, "study.arms=[base, sft]", *words]).recipe

    out, typed = tmp_path / "run", recipe(f"model.name={tmp_path / 'nowhere'}")
    given = {"data": data_of(typed), "output": study.Output(quiet=True), "stop": StopFlag()}
    with pytest.raises(ModelError, match="nowhere"):
        study.Study(typed, out, **given).run()
    assert not (out / "cold_start").exists(), "the base is measured first"
    # Answers of a teacher are good for any model, but of this teacher alone.
    append_jsonl(out / "cold_start" / "samples.jsonl", [{"id": "1"}])
    meant = f"model.name={random_model_folder}"
    with pytest.raises(RunFolderError, match=r"teacher\.wrong_share was"):
        run_folder.claim(out, recipe(meant, "teacher.wrong_share=0.5"))
    (out / "eval").mkdir(exist_ok=True)
    (out / "eval" / "problems.jsonl").write_text("{}\n")
    run_folder.claim(out, recipe(meant))
    assert load_recipe(str(out / "recipe.yaml")).recipe.model.name == str(random_model_folder)
    assert not (out / "eval" / "problems.jsonl").exists()
    append_jsonl(out / "eval" / "base" / "predictions.jsonl", [{"id": "1"}])
    with pytest.raises(RunFolderError, match=r"model\.name was"):
        run_folder.claim(out, typed)


def test_a_reward_function_that_is_not_there_claims_no_folder(tmp_path):
    with pytest.raises(RecipeError, match="cannot read"):
        run_folder.claim(
            tmp_path / "run", load_recipe("quickstart", ["grpo.reward.functions={no.py:f: 1}"]).recipe
        )
    assert not (tmp_path / "run").exists()


def test_only_what_the_arms_need_is_read():
    missing = ["data.rl=missing.jsonl", "study.arms=[base, sft]", "data.cold_start=builtin:puzzles?count=5"]
    sources = data_of(load_recipe("quickstart", missing).recipe)
    assert len(sources.cold_start) == 5 and not sources.rl


def test_rl_alone_starts_from_the_model_as_it_is(random_model_folder, tmp_path):
    words = [f"model.name={random_model_folder}", *SMALL, "data.cold_start=missing.jsonl"]
    done = rlcs("grpo", "quickstart", *words, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert f"model    {tmp_path / 'run' / 'grpo' / 'final'}" in done.stdout
    assert not (tmp_path / "run" / "sft").exists() and not (tmp_path / "run" / "cold_start").exists()
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    exported = rlcs("export", tmp_path / "run", "--out", tmp_path / "model")
    assert exported.returncode == 0, exported.stderr
    assert "without a cold start" in (tmp_path / "model" / "README.md").read_text().lower()


def test_a_trained_model_is_a_hugging_face_folder(finished):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(finished / "sft_grpo" / "final")
    processor = AutoProcessor.from_pretrained(finished / "sft_grpo" / "final")
    assert model.config.model_type == "qwen2_5_vl"
    assert processor.image_processor.size["longest_edge"] == 1_204_224


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "quickstart", "grpo.clip_hihg=0.4"], "clip_high"),
        (["run", "nosuch"], "nosuch"),
        (["run", "quickstart", "data.rl=missing.jsonl"], "missing.jsonl"),
        (["run", "quickstart", "model.name=./nowhere"], "model.name=./nowhere"),
        (["data", "check", "missing.parquet"], "missing.parquet"),
        (["look", "quickstart", "--row", "99999"], "there is no row 99999"),
        (["recipes", "copy", "nosuch", "x.yaml"], "quickstart"),
    ],
)
def test_wrong_input_gets_a_sentence_and_exit_code_2(words, message, tmp_path):
    failed = rlcs(*words, cwd=tmp_path)
    assert failed.returncode == 2, failed.stderr
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "->" in failed.stderr, "the message says what to do"


def test_attention_that_cannot_train_here_is_refused_before_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    failed = rlcs("run", "quickstart", *SMALL, "model.attention=flex", "--out", tmp_path / "run")
    assert failed.returncode == 2 and "Traceback" not in failed.stderr, failed.stderr
    assert "model.attention=flex: FlexAttention has no backward pass on a CPU" in failed.stderr
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_too_long_are_named_before_the_run(tmp_path):
    rows = [{"question": "short?", "answer": "1"}, {"question": "long " * 300, "answer": "2", "id": "wordy"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert rlcs("data", "check", "rows.jsonl", cwd=tmp_path).returncode == 0
    named = rlcs("data", "check", "rows.jsonl", "--recipe", "quickstart", cwd=tmp_path)
    assert named.returncode == 2 and "1 rows can be used, 1 cannot" in named.stdout
    assert "(id wordy): the prompt has" in named.stdout and "the limit is 256" in named.stdout


def test_a_killed_run_goes_on_and_ends_like_an_unbroken_one(finished, random_model_folder, tmp_path):
    folder = tmp_path / "killed"
    words = ["quickstart", f"model.name={random_model_folder}", *SMALL, "--out", str(folder)]
    command = [sys.executable, "-W", "ignore", "-m", "rlcs", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for landmark in (
        "sft/checkpoints/step-000001",
        "sft_grpo/checkpoints/step-000001",
        "eval/base/predictions.jsonl",
    ):
        process = warm.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (folder / landmark).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert rlcs(*words).returncode == 0
    for name in ("sft/final", "sft_grpo/final", "grpo/final"):
        ours = (folder / name / "model.safetensors").read_bytes()
        assert ours == (finished / name / "model.safetensors").read_bytes(), name
    for arm in ("base", "sft", "grpo", "sft_grpo"):
        ours = (folder / "eval" / arm / "predictions.jsonl").read_text()
        assert ours == (finished / "eval" / arm / "predictions.jsonl").read_text()


def test_ctrl_c_saves_and_says_how_to_go_on(random_model_folder, tmp_path):
    folder = tmp_path / "stopped"
    words = [
        "run",
        "quickstart",
        f"model.name={random_model_folder}",
        *SMALL,
        "--out",
        str(folder),
        "sft.epochs=99",
    ]
    process = warm.Popen(
        [sys.executable, "-W", "ignore", "-m", "rlcs", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (folder / "sft" / "checkpoints" / "step-000002").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped as asked" in errors and "the same command continues" in errors


def test_seeds_are_averaged_and_kept_apart(tmp_path):
    def arm(accuracy):
        return {"accuracy": accuracy, "low": 0.0, "high": 1.0, "n": 100, "unscored": 3}

    alike = {"name": "n", "recipe": {}, "versions": {}}
    one = alike | {"arms": {"base": arm(0.2), "sft_grpo": arm(0.6)}, "seconds": {"sft": 2.0}}
    two = alike | {"arms": {"base": arm(0.4), "sft_grpo": arm(0.8)}, "seconds": {"sft": 3.0}}
    summary = seeds.averaged({0: one, 1: two})
    assert summary["arms"]["sft_grpo"]["accuracy"] == pytest.approx(0.7)
    assert summary["arms"]["sft_grpo"]["low"] == pytest.approx(0.604, abs=0.001)
    assert summary["per_seed"]["1"]["base"]["accuracy"] == 0.4
    assert summary["seconds"]["sft"] == 5.0
    lines = "\n".join(_arm_lines(summary["arms"], tmp_path))  # as `rlcs ablate --seeds 2` ends
    assert "70.0%" in lines and lines.count("6 not scored") == 2


def as_jsonl(folder, rows):
    """A stranger's files: images beside a JSONL, demonstrations with a response."""
    responses = [f"It is {row['answer']}. \\boxed{{{row['answer']}}}" for row in rows]
    demonstrations = [{**row, "response": text} for row, text in zip(rows, responses, strict=True)]
    for name, written in (("demos", demonstrations), ("rl", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    return "demos.jsonl", "rl.jsonl", "rl.jsonl"


def as_other_tools(folder, rows):
    """The same as a list for LLaVA, a Parquet file of chat messages, and a table."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    listed, chats, table = [], [], ["id,question,image,answer"]
    for row in rows:
        text = f"It is {row['answer']}. \\boxed{{{row['answer']}}}"
        turns = [{"from": "human", "value": "<image>\nHow red?"}, {"from": "gpt", "value": text}]
        listed.append({"id": row["id"], "image": row["images"][0], "conversations": turns})
        content = [{"type": "image", "text": None}, {"type": "text", "text": "How red?"}]
        image = {"bytes": (folder / row["images"][0]).read_bytes(), "path": None}
        chats.append(
            {"messages": [{"role": "user", "content": content}], "images": [image], "solution": row["answer"]}
        )
        table.append(f"{row['id']},How red?,{row['images'][0]},{row['answer']}")
    (folder / "demos.json").write_text(json.dumps(listed, indent=1))
    write_table(pa.Table.from_pylist(chats), folder / "rl.parquet")
    (folder / "test.csv").write_text("\n".join(table))
    return "demos.json", "rl.parquet", "test.csv"


@pytest.mark.parametrize("written", [as_jsonl, as_other_tools])
def test_one_s_own_data_in_a_run(random_model_folder, tmp_path, written):
    from PIL import Image

    rows = []
    for i in range(8):
        Image.new("RGB", (60 + i, 60), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"id": f"r{i}", "question": "How red?", "images": [f"{i}.png"], "answer": str(i)})
    cold_start, rl, test = written(tmp_path, rows)
    own = [f"data.cold_start={cold_start}", f"data.rl={rl}", f"data.test={test}"]
    words = [
        "run",
        "quickstart",
        f"model.name={random_model_folder}",
        *SMALL,
        *own,
        "study.arms=[base,sft_grpo]",
    ]
    done = rlcs(*words, "--out", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "mine" / "summary.json").read_text())
    assert summary["arms"]["sft_grpo"]["n"] == 8
    assert not (tmp_path / "mine" / "grpo").exists()


def test_json_output_is_json_alone(random_model_folder, tmp_path):
    words = [
        "run",
        "quickstart",
        f"model.name={random_model_folder}",
        *SMALL,
        "study.arms=[base,sft_grpo]",
        "--json",
    ]
    done = rlcs(*words, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["stage"] for row in rows if "stage" in row} >= {"sft", "sft_grpo"}
    assert set(rows[-1]["arms"]) == {"base", "sft_grpo"}


def test_a_run_takes_up_the_answers_that_distill_left(random_model_folder, tmp_path):
    folder = tmp_path / "both"
    words = [f"model.name={random_model_folder}", *SMALL, "teacher.wrong_share=0.5", "teacher.enough_kept=0"]
    alone = rlcs("distill", "quickstart", *words, "teacher.max_samples=3", "--out", folder)
    assert alone.returncode == 0 and "36 samples right" in alone.stdout, alone.stderr
    before = (folder / "cold_start" / "samples.jsonl").read_bytes()
    rated = folder / "cold_start" / "problems.jsonl"
    chosen = [f"data.rl={rated}", "data.rl_pass_rate=[0.1, 0.9]", "study.arms=[base, sft_grpo]"]
    done = rlcs("run", "quickstart", *words, "teacher.max_samples=3", *chosen, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "cold_start" / "samples.jsonl").read_bytes() == before
    asked = [
        json.loads(line) for line in (folder / "sft_grpo/rollouts/step-000001.jsonl").read_text().splitlines()
    ]
    rates = {row["id"]: row["pass_rate"] for row in map(json.loads, rated.read_text().splitlines())}
    assert {0.0, 1.0} & set(rates.values()) and all(0.1 <= rates[row["id"]] <= 0.9 for row in asked)
    page = (folder / "report" / "index.html").read_text()
    assert "Problems by pass rate" in page and ">left out<" in page and ">kept<" in page


def test_tries_without_an_answer_are_asked_again_before_anything_is_trained(random_model_folder, tmp_path):
    rows = [{"question": f"What is {n} + 1 ?", "answer": str(n + 1)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = tmp_path / "run"
    faults = {"is 2 ": ["500"] * 3, "is 3 ": ["always:400"]}  # one may pass, the other never will
    with LoopbackServer(faults=faults, answer=lambda body: "\\boxed{1}") as server:
        words = [f"model.name={random_model_folder}", *SMALL, f"data.cold_start={tmp_path / 'rows.jsonl'}"]
        words += [
            "teacher.model=m",
            f"teacher.base_url={server.url}",
            "teacher.keep=all",
            "teacher.max_retries=0",
            "study.arms=[base, sft]",
        ]
        short = rlcs("run", "quickstart", *words, "--out", out)
        assert short.returncode == 1 and "Traceback" not in short.stderr, short.stderr
        assert "left 1 samples unanswered" in short.stderr and "the same command asks them" in short.stderr
        assert f"data.cold_start={out / 'cold_start/kept.jsonl'}" in short.stderr
        assert not (out / "sft").exists() and len(server.seen) == 1 + 2 + 3 + 1, "a trial first"
        done = rlcs("run", "quickstart", *words, "--out", out)
        assert done.returncode == 0 and len(server.seen) == 7 + 1 + 2, done.stderr
    assert json.loads((out / "summary.json").read_text())["counts"]["cold_start"] == 3


def test_measured_answers_to_edited_problems_are_refused(tmp_path):
    problems = [Problem(id=str(n), source="mine", question=f"{n}?", answer="5") for n in range(3)]
    right = asdict(Grade(reward=1.0, correct=True))
    with SampleLog(tmp_path / "predictions.jsonl", {each.id: each.digest for each in problems}) as log:
        for each in problems:
            log.add(Sample(id=each.id, text="5", stop=StopReason.EOS), right)
    nobody = evaluation.Evaluator(sampler=None, grader=None)  # there is nothing to ask
    measure = partial(evaluation.evaluate, nobody, folder=tmp_path, screen=None, stop=None)
    assert measure(problems[:2])["n"] == 2
    edited = [problems[0], replace(problems[1], answer="6")]
    with pytest.raises(UserError, match=r"(?s)the answer to '1' is to another question.*restore"):
        measure(edited)


def test_no_problem_of_the_wanted_difficulty_is_an_error():
    recipe = load_recipe("quickstart", ["data.rl_pass_rate=[0.2, 0.8]"]).recipe
    with pytest.raises(DataError, match=r"(?s)0 of 0 have one.*problems\.jsonl"):
        run_data.by_pass_rate([], recipe.data)


# --- memory that runs out -------------------------------------------------------------------------


def run_out(*_args, **_options):
    """Ask for 8 PB of main memory."""
    torch.empty(1 << 50, dtype=torch.float64)


PHASES = [
    # what asks for too much, the arms, the phase, the key to change
    ("rlcs.engines.local.LocalEngine.sample", "base, sft", "preflight, rollout engine", "eval.max_rows=128"),
    ("rlcs.model.loading.load", "base, sft", "eval base: loading", "weights"),
    (
        "rlcs.engines.local.LocalEngine.sample",
        "base, sft",
        "eval base: sampling",
        "eval.max_rows=128 (now 256)",
    ),
    ("rlcs.train.sft.packs_in_step", "base, sft", "sft: data", "sft.pack_tokens=4096 (now 8192)"),
    ("torch.optim.AdamW.step", "base, sft", "sft: update", "sft.pack_tokens=4096 (now 8192)"),
    ("rlcs.train.context.GrpoContext.sample", "base, grpo", "grpo: rollout", "grpo.max_rows=128 (now 256)"),
    ("rlcs.train.learning.make_batches", "base, grpo", "grpo: reference", "grpo.pack_tokens=4096 (now 8192)"),
    ("torch.optim.AdamW.step", "base, grpo", "grpo: update", "model.gradient_checkpointing=true (now false)"),
]


@pytest.mark.parametrize(("what", "arms", "phase", "change"), PHASES)
def test_memory_that_runs_out_names_the_phase_and_the_keys(
    random_model_folder, tmp_path, monkeypatch, what, arms, phase, change
):
    words = [
        f"model.name={random_model_folder}",
        *SMALL,
        f"study.arms=[{arms}]",
        "grpo.prompts_per_step=128",
        "grpo.max_rows=256",
    ]
    words += ["grpo.kl.kind=k3", "grpo.kl.coefficient=0.01"]  # then groups of equal rewards are learnt too
    words += [] if phase.startswith("preflight") else ["study.preflight=off"]
    recipe = load_recipe("quickstart", words).recipe
    data, output = data_of(recipe), study.Output(quiet=True)
    monkeypatch.setattr(what, run_out)
    with StopFlag() as stop, pytest.raises(OutOfMemory) as caught:
        study.Study(recipe, tmp_path / "run", data=data, output=output, stop=stop).run()
    error = caught.value
    assert (error.where, error.what) == (phase, "main memory ran out: 8,388,608.00 GB were requested")
    assert error.fix.startswith("planned for the longest prompts and answers: weights ")
    assert change in error.fix
    assert ("the same command with such a KEY=VALUE goes on" in error.fix) and error.exit_code == 1


@pytest.mark.fault("limits", "memory that runs out in a stage", "named; the run goes on with smaller packs")
def test_a_run_whose_memory_ran_out_goes_on_with_smaller_packs(random_model_folder, tmp_path, monkeypatch):
    words = [f"model.name={random_model_folder}", *SMALL, "study.arms=[base, sft]"]
    step, steps = torch.optim.AdamW.step, []

    def full_in_the_second(*args, **options):
        steps.append(1)
        return run_out() if len(steps) == 2 else step(*args, **options)

    def run(*more):
        recipe = load_recipe("quickstart", [*words, *more]).recipe
        with StopFlag() as stop:
            made = study.Study(
                recipe, tmp_path / "run", data=data_of(recipe), output=study.Output(quiet=True), stop=stop
            )
            return made.run()

    monkeypatch.setattr("torch.optim.AdamW.step", full_in_the_second)
    with pytest.raises(OutOfMemory, match="sft: update"):
        run()
    assert "OutOfMemory: sft: update" in (tmp_path / "run/logs/attempt-1.log").read_text()
    summary = run("sft.pack_tokens=512", "model.gradient_checkpointing=true")
    rows = (tmp_path / "run/sft/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4] and "sft" in summary["arms"]


def test_the_command_line_has_a_sentence_for_memory_too(random_model_folder):
    code = "import torch; from rlcs.cli.main import main; from rlcs.engines.decoding import DecodingBatch; "
    code += "DecodingBatch.step = lambda self: torch.empty(1 << 50); main()"
    words = ["generate", random_model_folder, "What is 1 + 1?", "--max-tokens", "4"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, words)],
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1 and "memory ran out" in done.stderr
    assert "-> ask for fewer answers at once (--batch" in done.stderr
