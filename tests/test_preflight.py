"""Everything that a later stage needs fails before the first training step, with its way out."""

import json
import os
import resource
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import warm
from conftest import SMALL_STUDY, make_problem, rlcs
from loopback_server import LoopbackServer
from rlcs.data.run_data import load_run_data
from rlcs.distributed import ALONE, World
from rlcs.engines.factory import open_engines
from rlcs.engines.vllm import readiness
from rlcs.errors import (
    EndpointError,
    ModelError,
    PromptError,
    RecipeError,
    RlcsError,
    RunFolderError,
    UserError,
)
from rlcs.model import loading
from rlcs.pipeline import preflight, space
from rlcs.pipeline.run_folder import claim
from rlcs.pipeline.study import Study, dry_run, engine_needs
from rlcs.progress import Output
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.sampling import Rollouts
from rlcs.signals import StopFlag
from rlcs.storage import mark_done
from rlcs.train import state as state_of
from rlcs.train import trackers
from rlcs.train.collapse import MOST

SMALL = [*SMALL_STUDY, "grpo.steps=1", "grpo.max_new_tokens=8", "eval.max_new_tokens=8"]
FAKE = Path(__file__).parent / "fake_vllm.py"


class Lines:
    """A screen that keeps what it is told."""

    def __init__(self):
        self.lines: list[str] = []

    def say(self, text):
        self.lines.append(text)


@dataclass(frozen=True, kw_only=True)
class Eight(World):
    """The first of eight ranks on one machine, each on its own GPU."""

    def gather(self, value):
        host, _ = value if isinstance(value, tuple) else ("", "")
        return [(host, str(rank)) for rank in range(8)] if host else [value]


def resolved(model: object, *words: str):
    return load_recipe("quickstart", [f"model.name={model}", *SMALL, *words]).recipe


def data_of(recipe):
    return load_run_data(recipe.study, recipe.data, decode_limit=recipe.images.decode_limit)


def tried(recipe, out: Path, *, world: World = ALONE, logs: Path | None = None) -> tuple[dict, list[str]]:
    """The seconds of each check that passed, and the lines that were shown."""
    view = Lines()
    needs, logs = engine_needs(recipe), logs or out / "rollout"
    with open_engines(needs, logs) as make:
        given = {"data": data_of(recipe), "weights": needs.weights_folder(logs), "make_engine": make}
        trial = preflight.Preflight(recipe, out, **given, world=world, stop=StopFlag())
        return trial.run(view), view.lines


def refused(kind: type[RlcsError], recipe, out: Path) -> str:
    """The message of a run that is refused before it trains or measures anything."""
    with pytest.raises(kind) as caught:
        Study(recipe, out, data=data_of(recipe), output=Output(quiet=True), stop=StopFlag()).run()
    for pattern in ("metrics.jsonl", "step-*", "predictions.jsonl", "samples.jsonl"):
        assert not list(out.rglob(pattern)), pattern
    assert caught.value.fix, "the message says what to do"
    return str(caught.value)


@contextmanager
def http_server(status: int) -> Iterator[str]:
    """A real server that answers every GET with this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def own_rows(tmp_path) -> list[str]:
    """Problems without demonstrations: the teacher must be asked."""
    rows = [{"id": str(n), "question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return [f"data.cold_start={tmp_path / 'rows.jsonl'}", "teacher.model=m", "teacher.max_retries=0"]


# --- what passes ------------------------------------------------------------------------------------


def test_everything_is_tried_in_seconds_and_changes_no_random_generator(random_model_folder, tmp_path):
    recipe = resolved(random_model_folder, "trackers.tensorboard=true")
    before = state_of.capture_rng()
    seconds, lines = tried(recipe, tmp_path / "run")
    assert state_of.capture_rng() == before
    assert list(seconds) == [
        *("GPUs", "folders", "open files", "model, disk", "reward"),
        *("teacher", "trackers", "rollout engine"),
    ]
    assert sum(seconds.values()) < 10
    assert any(line.startswith("preflight: rollout engine  ok") for line in lines)
    assert any("needed at most" in line and "free" in line for line in lines)
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_off_tries_nothing_and_a_finished_stage_is_not_tried_again(random_model_folder, tmp_path, own_rows):
    assert tried(resolved(random_model_folder, "study.preflight=off"), tmp_path / "a")[0] == {}
    dead = resolved(random_model_folder, *own_rows, "teacher.base_url=http://127.0.0.1:9/v1")
    for stage in ("cold_start", "sft", "sft_grpo"):
        mark_done(tmp_path / "run" / stage)
    left = tried(dead, tmp_path / "run")[0]
    assert "rollout engine" in left and "teacher" not in left and "trackers" not in left
    for arm in ("base", "sft", "sft_grpo"):
        mark_done(tmp_path / "run" / "eval" / arm)
    assert tried(dead, tmp_path / "run")[0] == {}


def test_a_dry_run_tries_everything_and_writes_nothing(random_model_folder, tmp_path):
    words = [f"model.name={random_model_folder}", *SMALL]
    done = rlcs("run", "quickstart", *words, "--dry-run", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "preflight: reward" in done.stdout and "7 checks passed; nothing was trained" in done.stdout
    assert list(tmp_path.iterdir()) == []
    as_json = rlcs("run", "quickstart", *words, "--dry-run", "--json", "--out", tmp_path / "run")
    assert set(json.loads(as_json.stdout)["seconds"]) >= {"teacher", "rollout engine"}
    failed = rlcs(
        "sft", "quickstart", *words, "lora.rank=2", "lora.targets=[nope]", "--dry-run", "--out", "x"
    )
    assert failed.returncode == 2 and "no linear layer is called nope" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_dry_run_in_the_folder_of_another_recipe_is_refused_and_changes_nothing(
    random_model_folder, tmp_path
):
    recipe, out = resolved(random_model_folder), tmp_path / "run"
    given = {"output": Output(quiet=True), "stop": StopFlag()}
    claim(out, recipe)
    written = (out / "recipe.yaml").read_bytes()
    (out / "eval" / "base").mkdir(parents=True)
    (out / "eval" / "base" / "predictions.jsonl").write_text("{}\n")
    other = resolved(random_model_folder, "seed=5")
    with pytest.raises(RunFolderError, match="seed was 0, is 5"):
        dry_run(other, out, data=data_of(other), **given)
    more = resolved(random_model_folder, "study.arms=[base, grpo]")
    assert "rollout engine" in dry_run(more, out, data=data_of(more), **given)
    assert (out / "recipe.yaml").read_bytes() == written


# --- the machine ------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small(random_model_folder, tmp_path, monkeypatch):
    free = {"free": 10_000_000}
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: SimpleNamespace(**free))
    message = refused(
        RunFolderError, resolved(random_model_folder, "grpo.keep_checkpoints=9"), tmp_path / "run"
    )
    assert "10.0 MB are free" in message and "lower grpo.keep_checkpoints (sft_grpo: 1 x" in message
    assert "lora.rank" in message
    free["free"] = 10**12
    assert tried(resolved(random_model_folder), tmp_path / "other")[0]


def test_the_space_of_a_stage_follows_from_its_shapes_and_what_it_keeps(random_model_folder):
    def space_of(*words: str, steps: int = 100):
        recipe = resolved(random_model_folder, *words)
        vlm = loading.prepare(
            loading.load(recipe.learner, weights=False), recipe.lora, recipe.grpo.freeze, seed=0
        )
        return space.stage_space(vlm, recipe.grpo, steps=steps), vlm

    whole, vlm = space_of("grpo.freeze=[]")
    count = sum(p.numel() for p in vlm.model.parameters())
    assert (whole.checkpoint, whole.final) == (3 * 4 * count, 4 * count)
    assert whole.checkpoints == 2, (
        "one a 50 steps: fewer than grpo.keep_checkpoints and the one being written"
    )
    assert space_of("grpo.save_every=5", "grpo.keep_checkpoints=7")[0].checkpoints == 8 + MOST
    assert (
        space_of("grpo.save_every=5", "grpo.steps=99", "grpo.keep_steps=[20, 80]")[0].checkpoints
        == 3 + MOST + 2
    )
    frozen, _ = space_of("grpo.freeze=[language_model]")
    assert whole.final < frozen.checkpoint < whole.checkpoint
    adapters, _ = space_of("lora.rank=2")
    assert adapters.checkpoint < whole.checkpoint / 5 and adapters.final > whole.final


def test_a_real_checkpoint_and_a_final_model_are_as_large_as_computed(random_model_folder, tmp_path):
    recipe = resolved(
        random_model_folder, "study.arms=[base, sft]", "sft.save_every=1", "sft.keep_checkpoints=1"
    )
    Study(recipe, tmp_path / "run", data=data_of(recipe), output=Output(quiet=True), stop=StopFlag()).run()

    def written(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))

    vlm = loading.prepare(loading.load(recipe.learner, weights=False), recipe.lora, recipe.sft.freeze, seed=0)
    expected = space.stage_space(vlm, recipe.sft, steps=4)
    [kept] = (tmp_path / "run" / "sft" / "checkpoints").glob("step-*")
    assert written(kept) == pytest.approx(expected.checkpoint, rel=0.05)
    assert written(tmp_path / "run" / "sft" / "final") == pytest.approx(expected.final, rel=0.05)


def test_a_folder_that_cannot_be_written(random_model_folder, tmp_path):
    recipe = resolved(random_model_folder, "rollout.weights_folder=/proc/rlcs")
    message = refused(RunFolderError, recipe, tmp_path / "run")
    assert message.startswith("/proc: cannot write there") and "rollout.weights_folder" in message


def test_the_limit_on_open_files_is_raised_or_told(random_model_folder, tmp_path, monkeypatch):
    recipe, limits = resolved(random_model_folder), [(64, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[0])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: limits.insert(0, both))
    assert any("raised from 64 to" in line for line in tried(recipe, tmp_path / "run")[1])
    assert 256 < limits[0][0] <= limits[0][1] == 4096
    limits.insert(0, (64, 128))
    message = refused(UserError, recipe, tmp_path / "other")
    assert "may open 128 files" in message and "ulimit -n" in message


def test_ranks_on_the_gpus_of_servers(random_model_folder, tmp_path, monkeypatch):
    """`torchrun --nproc-per-node 8 -m rlcs run 8xgpu-7b`: ranks 4 to 7 would take the memory of vLLM."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    monkeypatch.setattr(preflight, "command", lambda: ["rlcs", "run", "8xgpu-7b"])
    own = 'rollout.devices=["4", "5", "6", "7"]'
    vllm = ["rollout.engine=vllm_server", "rollout.servers=4", own]
    world = Eight(size=8, device=torch.device("cuda", 0))
    with pytest.raises(RecipeError) as caught:
        tried(resolved(random_model_folder, *vllm), tmp_path / "run", world=world)
    assert "GPU 4, 5, 6, 7 would train and run a vLLM server" in str(caught.value)
    right = "CUDA_VISIBLE_DEVICES=0,1,2,3 torchrun --nproc-per-node 4 -m rlcs run 8xgpu-7b"
    assert right in caught.value.fix


def test_which_gpus_may_be_shared():
    def check(*words: str, training=("0",), visible=("0", "1")):
        settings = load_recipe("quickstart", ["rollout.engine=vllm_server", *words]).recipe.rollout
        readiness.require_own_gpus(settings, training=training, visible=visible, command="run x")

    check('rollout.devices=["1"]')
    check("rollout.memory_share=0.4")  # on purpose
    check("rollout.urls=[http://elsewhere:8000]")
    check(training=())  # no GPU here
    readiness.require_own_gpus(Rollouts(), training=["0"], visible=["0"], command="")
    with pytest.raises(RecipeError, match="GPU 0 would train"):
        check()  # a server without devices takes the first GPU
    with pytest.raises(RecipeError, match="GPU 0 would train"):
        check('rollout.devices=["1, 0"]', "rollout.memory_share=0.9")
    with pytest.raises(RecipeError, match="has the GPUs 1 and needs 2"):
        check('rollout.devices=["1"]', "rollout.tensor_parallel=2")


# --- model and data -----------------------------------------------------------------------------------


def test_a_model_of_which_nothing_would_train(random_model_folder, tmp_path):
    every = "grpo.freeze=[vision_tower, merger, language_model]"
    assert "grpo.freeze: no part" in refused(UserError, resolved(random_model_folder, every), tmp_path / "a")
    words = ["lora.rank=2", "lora.targets=[q_prj]"]
    message = refused(RecipeError, resolved(random_model_folder, *words), tmp_path / "b")
    assert "no linear layer is called q_prj" in message and "q_proj" in message


def test_a_model_without_weights(random_model_folder, tmp_path):
    shutil.copytree(random_model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "cannot load the model" in refused(ModelError, resolved(tmp_path / "model"), tmp_path / "run")


def test_the_question_has_the_largest_image_that_fits(random_model_folder):
    recipe = resolved(random_model_folder, "prompt.max_tokens=60")
    chat = loading.load_chat(recipe.model, recipe.prompt, recipe.images)
    sizes = [(30, 30), (400, 400), (60, 60), (30, 60)]
    problems = [make_problem(str(n), sizes=[size]) for n, size in enumerate(sizes)]
    assert preflight.largest_prompt(chat, problems).problem_id == "2"
    with pytest.raises(PromptError, match="the limit is 60"):
        preflight.largest_prompt(chat, problems[1:2])


# --- teacher, judge, trackers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("always:401", "refuses the key"),
        ("always:404", "there is no model 'm'"),
        ("always:400", "the teacher answers none of 3 problems: HTTP 400"),
    ],
)
def test_a_teacher_that_cannot_be_used(random_model_folder, tmp_path, own_rows, fault, says):
    with LoopbackServer(faults={"What": [fault]}) as server:
        recipe = resolved(random_model_folder, *own_rows, f"teacher.base_url={server.url}")
        assert says in refused(EndpointError, recipe, tmp_path / "run")
        assert len(server.seen) <= 3 and all(body["max_tokens"] == 16 for body in server.seen)


def test_a_teacher_at_a_wrong_port_and_one_that_is_busy(random_model_folder, tmp_path, own_rows):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipe = resolved(random_model_folder, *own_rows, f"teacher.base_url=http://127.0.0.1:{port}/v1")
    assert "nothing answers there" in refused(EndpointError, recipe, tmp_path / "run")
    with LoopbackServer(faults={"What": ["503"]}) as server:
        recipe = resolved(random_model_folder, *own_rows, f"teacher.base_url={server.url}")
        lines = tried(recipe, tmp_path / "other")[1]
    assert any("the teacher does not answer now: HTTP 503" in line for line in lines)


def test_one_problem_that_the_teacher_refuses_stops_nothing(random_model_folder, tmp_path, own_rows):
    with LoopbackServer(faults={"What is 0": ["always:400"]}) as server:
        recipe = resolved(random_model_folder, *own_rows, f"teacher.base_url={server.url}")
        assert "teacher" in tried(recipe, tmp_path / "run")[0] and len(server.seen) == 2


def test_a_local_teacher_that_is_not_there(random_model_folder, tmp_path, own_rows):
    recipe = resolved(random_model_folder, *own_rows[:1], "teacher.model=./nowhere")
    assert "nowhere" in refused(ModelError, recipe, tmp_path / "run")


def test_a_judge_with_a_wrong_key(random_model_folder, tmp_path):
    with LoopbackServer(faults={"response": ["always:401"]}) as server:
        judge = ["weight=1", "model=j", f"base_url={server.url}"]
        recipe = resolved(random_model_folder, *(f"grpo.reward.judge.{word}" for word in judge))
        assert "refuses the key" in refused(RecipeError, recipe, tmp_path / "run")


def test_what_decides_correct_is_tried_without_rl_too(random_model_folder, tmp_path):
    (tmp_path / "own.py").write_text("def score(problem, response):\n    raise ValueError('a mistake')\n")
    reward = [f"grpo.reward.functions={{{tmp_path / 'own.py'}:score: 1}}", "grpo.reward.accuracy=0"]
    recipe = resolved(random_model_folder, *reward, "study.arms=[base, sft]")
    assert "a mistake" in refused(RecipeError, recipe, tmp_path / "run")


def test_a_tracker_that_cannot_be_written(random_model_folder, tmp_path, monkeypatch):
    class Closed(trackers._TensorBoard):
        def log(self, values, step):
            raise ConnectionError("you are not logged in")

    monkeypatch.setitem(trackers._KINDS, "wandb", Closed)
    message = refused(RecipeError, resolved(random_model_folder, "trackers.wandb=mine"), tmp_path / "run")
    assert "trackers.wandb: wandb cannot be written: ConnectionError: you are not logged in" in message
    assert "wandb login" in message


# --- vLLM ---------------------------------------------------------------------------------------------


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (None, "vLLM cannot be started: No such file"),
        ("echo 0.8.3", "vLLM 0.8.3 is too old"),
        ("echo hello", "it says no version of vLLM: 'hello'"),
        ("echo 'ImportError: libcudart.so.13' >&2; exit 1", "vLLM cannot be started: ImportError: libcudart"),
    ],
)
def test_a_vllm_that_would_not_start(random_model_folder, tmp_path, program, says):
    path = script(tmp_path / "vllm", program) if program else str(tmp_path / "vllm")
    words = ["rollout.engine=vllm_server", f"rollout.executable={path}"]
    message = refused(ModelError, resolved(random_model_folder, *words), tmp_path / "run")
    assert says in message and f"rollout.executable={path}" in message


def test_a_colocated_vllm_that_is_not_installed(random_model_folder, tmp_path):
    recipe = resolved(random_model_folder, "rollout.engine=vllm_colocated", "rollout.executable=no-vllm")
    started = time.monotonic()
    message = refused(ModelError, recipe, tmp_path / "run")
    assert "vLLM cannot be started" in message and "vllm-env/bin/pip install 'vllm>=0.32'" in message
    assert "rollout.engine=local" in message and time.monotonic() - started < 20


def test_a_server_elsewhere_that_is_not_well(random_model_folder, tmp_path):
    def recipe(url: str):
        words = ["rollout.engine=vllm_server", f"rollout.urls=[{url}]", "rollout.health_limit_s=0.6"]
        return resolved(random_model_folder, *words)

    with http_server(503) as url:
        message = refused(EndpointError, recipe(url), tmp_path / "run")
    assert f"rollout.urls: {url}: this vLLM server does not answer (HTTP 503)" in message
    assert "ConnectError" in refused(EndpointError, recipe(url), tmp_path / "dead")
    with http_server(200) as url:
        readiness.require_reachable(recipe(url).rollout)
        assert "it does not answer as vLLM does" in refused(EndpointError, recipe(url), tmp_path / "other")


@pytest.mark.parametrize("adapters", [(), ("lora.rank=4", "rollout.lora=adapter")], ids=["whole", "adapters"])
def test_vllm_starts_answers_and_loads_weights_again(adapters, random_model_folder, tmp_path, own_rows):
    program = script(tmp_path / "vllm", f'exec "{sys.executable}" "{FAKE}" "$@"')
    weights = tmp_path / "weights"
    weights.mkdir()
    rows = own_rows[0].partition("=")[2]  # without images, which the fake program does not read
    words = [*(f"data.{source}={rows}" for source in ("cold_start", "rl", "test")), "study.arms=[base, grpo]"]
    words += [f"rollout.{key}" for key in ("engine=vllm_server", f"executable={program}")]
    words += [f"rollout.weights_folder={weights}"]
    recipe = resolved(random_model_folder, *words, *adapters)
    seconds, lines = tried(recipe, tmp_path / "quick", logs=tmp_path / "logs")
    assert "rollout engine" in seconds and "  vLLM 0.32.1" in lines
    loaded = (weights / "loaded.txt").read_text().splitlines()
    first, second = loaded[1:] if adapters else loaded  # adapters come after the model that they add to
    assert first != second, "the second time with newer weights"
    assert all(line.startswith("adapter" if adapters else "model") for line in (first, second)), loaded
    (weights / "behaviour.json").write_text(json.dumps({"broken": True}))
    message = refused(ModelError, recipe, tmp_path / "run")
    assert "RuntimeError: something failed" in message


def test_every_server_that_takes_turns_with_a_rank_is_tried(random_model_folder, tmp_path, own_rows):
    """That of the last GPU too: else it would first start after SFT, hours later, in a run that resumes."""
    start = f'echo up >> "{tmp_path}/started"; exec "{sys.executable}" "{FAKE}" "$@"'
    program = script(tmp_path / "vllm", f'case "$1" in serve) {start};; esac; echo 0.32.1')
    rows = own_rows[0].partition("=")[2]  # without images, which the fake program does not read
    words = [*SMALL, *(f"data.{source}={rows}" for source in ("cold_start", "rl", "test"))]
    words += ["study.arms=[base, grpo]", "rollout.engine=vllm_colocated", f"rollout.executable={program}"]
    words += [f"model.name={random_model_folder}", "--dry-run", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "rlcs", "run", "quickstart", *words]
    warm.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert (tmp_path / "started").read_text().split() == ["up", "up"]


def test_the_temporary_folder_of_a_dry_run_is_beside_the_run(random_model_folder, tmp_path, monkeypatch):
    """Weights for vLLM may be larger than /tmp."""
    seen, make = [], tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *args: seen.append(args[2]) or make(*args))
    recipe = resolved(random_model_folder)
    given = {"data": data_of(recipe), "output": Output(quiet=True), "stop": StopFlag()}
    dry_run(recipe, tmp_path / "a" / "run", **given)
    assert str(tmp_path) in map(str, seen) and not list(tmp_path.iterdir())
