"""Rollouts by a real vLLM on the CPU with the built-in model: `make vllm-test` makes the environment for it.

`RLCS_VLLM` names an environment (or a `vllm` program) of vLLM 0.32 or newer; without it, and without `vllm`
on the path, these tests are skipped.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from PIL import Image

from conftest import LengthGrader, make_problem, tree_of
from file_channel import FileChannel
from rlcs.data import puzzles as tasks
from rlcs.data.images import data_uri, encode, encoded_image
from rlcs.data.loading import load
from rlcs.engines.factory import EngineNeeds, open_engines
from rlcs.engines.local import LocalEngine
from rlcs.engines.vllm import protocol, transfer
from rlcs.engines.vllm.server import Server
from rlcs.engines.vllm.transfer import Transfer
from rlcs.errors import EndpointError, TrainingError
from rlcs.model import loading
from rlcs.model.chat import Chat
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.model.vlm import Vlm
from rlcs.pipeline.study import engine_needs
from rlcs.progress import screen
from rlcs.publish.export import Export, export
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.schema import Model, Recipe
from rlcs.recipe.stages import Grpo
from rlcs.records import Prompt, Rollout
from rlcs.serving import session
from rlcs.signals import StopFlag
from rlcs.storage import read_jsonl
from rlcs.train import grpo
from rlcs.train.clock import Clock
from rlcs.train.context import GrpoContext
from rlcs.train.run_dir import RunDir
from test_distributed import run_on
from test_engine_check import check_of
from test_grpo import assert_same_gradients
from test_train import weights_of

START_LIMIT_S = 1800
"""Seconds in which a vLLM must have started. An idle machine needs less than a minute, one with other work
several times that: a limit is there to end what hangs, not to measure the machine."""
CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM's own limits, which are those of a machine with nothing else to do.
    "VLLM_ENGINE_READY_TIMEOUT_S": str(START_LIMIT_S),
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(START_LIMIT_S),
    "VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT": "300",
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "60",
}


def program() -> str | None:
    named = os.environ.get("RLCS_VLLM")
    if named is None:
        return shutil.which("vllm")
    path = Path(named) / "bin" / "vllm" if Path(named).is_dir() else Path(named)
    return str(path.absolute())


pytestmark = pytest.mark.skipif(
    program() is None, reason="no vLLM: `make vllm-test`, or name an environment in RLCS_VLLM"
)

HERE = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed beside rlcs"
)


def recipe_of(*words: str) -> Recipe:
    settings = [f"rollout.executable={program()}", "rollout.memory_share=0.1", "grpo.max_rows=64"]
    settings += [f"rollout.start_limit_s={START_LIMIT_S}", f"rollout.dead_limit_s={2 * START_LIMIT_S}"]
    settings += ["rollout.health_limit_s=30", "rollout.engine=vllm_server"]
    return load_recipe("quickstart", [*settings, *words]).recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return recipe_of()


@pytest.fixture(scope="module")
def make_engine(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory):
    """Engines over one server, which all tests share; a failure shows the end of its log."""
    folder = tmp_path_factory.mktemp("rollout")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU.items():
            patch.setenv(name, value)
        with open_engines(engine_needs(recipe), folder) as make:
            yield make


@pytest.fixture
def policy(recipe: Recipe) -> tuple[Vlm, Chat]:
    vlm = loading.load(recipe.model)
    return vlm, loading.make_chat(vlm, recipe.prompt, recipe.images)


def prompts_of(recipe: Recipe, chat: Chat, count: int) -> list[Prompt]:
    source = f"builtin:puzzles?split=test&count={count}&seed=3"
    rows = load(source, recipe.data, decode_limit=10**7, role="test").rows
    typed = make_problem("typed", "What is <|image_pad|><|vision_end|> in this <image>?", sizes=((120, 70),))
    return [*(chat.prompt(row.problem) for row in rows), chat.prompt(typed)]


def largest_gap(
    vlm: Vlm, chat: Chat, prompts: list[Prompt], groups: list[tuple[Rollout, ...]], t: float
) -> float:
    """Between the engine's logprobs and those that the policy gives the same tokens in the trainer's pass."""
    trees = [tree_of(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
    with torch.no_grad():
        ours = score(vlm, pack(trees, chat.patches), temperature=t).logprobs
    theirs = torch.tensor([x for group in groups for r in group for x in r.logprobs])
    return (ours - theirs).abs().max().item()


def perturb(vlm: Vlm, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += scale * parameter.std().nan_to_num() * noise


# The tests that start a vLLM of their own come first, so that the shared server is not up beside it.


def test_adapters_alone_reach_vllm(tmp_path, monkeypatch) -> None:
    """A rank between those that vLLM makes room for, a scale by its root, and a merged model afterwards."""
    words = ["lora.rank=12", "lora.alpha=24", "lora.rank_stabilised=true", "rollout.lora=adapter"]
    recipe = recipe_of(*words)
    for name, value in CPU.items():
        monkeypatch.setenv(name, value)
    vlm = loading.prepare(loading.load(recipe.model), recipe.lora, (), seed=0)
    chat = loading.make_chat(vlm, recipe.prompt, recipe.images)
    prompts = prompts_of(recipe, chat, 5)
    warm = chat.sampling(max_new_tokens=24, n=3, seed=1)

    def gap(policy: Vlm, groups: list[tuple[Rollout, ...]]) -> float:
        return largest_gap(policy, chat, prompts[:-1], groups[:-1], 1.0)

    def versions() -> list[str]:
        return sorted(path.name.partition("-")[2] for path in (tmp_path / "weights").iterdir())

    with open_engines(engine_needs(recipe), tmp_path) as make:
        engine = make(vlm, chat, 64)
        start = engine.sample(prompts, warm)
        assert gap(vlm, start) < 1e-3 and versions() == ["1", "1+2"]
        answers = [start]
        for update in (3, 4):  # the second one in place of another that was active
            generator = torch.Generator().manual_seed(update)
            with torch.no_grad():
                for _, parameter in vlm.parameters():
                    parameter += 0.007 * torch.randn(parameter.shape, generator=generator)
            assert gap(vlm, engine.sample(prompts, warm)) > 0.02, "not published yet"
            engine.sync()
            answers.append(engine.sample(prompts, warm))
            assert gap(vlm, answers[-1]) < 1e-3 and versions() == ["1", f"1+{update}"]
            assert answers[-1] not in answers[:-1]
        signal_server("server", signal.SIGKILL)
        assert engine.sample(prompts, warm) == answers[-1], "the new server has model and adapter"
        merged = tmp_path / "final"
        loading.save(vlm, merged)
        plain = loading.load(Model(name=str(merged)))
        chat = loading.make_chat(plain, recipe.prompt, recipe.images)
        perturb(plain, 0.03)
        assert gap(plain, make(plain, chat, 64).sample(prompts, warm)) < 1e-3 and versions() == ["5"]
        assert gap(vlm, engine.sample(prompts, warm)) < 1e-3 and versions() == ["6", "6+7"]


def test_a_server_started_by_a_rank_of_torchrun(tmp_path, random_model_folder) -> None:
    """It takes itself for no rank: where process groups meet by TCP, it would wait for a store in vain."""
    seen, started = tmp_path / "environment", tmp_path / "vllm"
    started.write_text(f'#!/bin/sh\nenv > "{seen}"\nexec "{program()}" "$@"\n')
    started.chmod(0o755)
    worker = Path(__file__).parent / "rollout_worker.py"
    words = [
        "rollout.memory_share=0.1",
        f"rollout.start_limit_s={START_LIMIT_S}",
        "rollout.health_limit_s=60",
    ]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(worker), str(started), str(random_model_folder), str(tmp_path)]
    # torchrun itself sets OMP_NUM_THREADS=1 for its ranks where nobody has set it.
    environment = {name: value for name, value in (os.environ | CPU).items() if name != "OMP_NUM_THREADS"}
    subprocess.run([*command, "0", *words], check=True, env=environment, timeout=START_LIMIT_S)
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [each["got"] for each in found] == [each["asked"] for each in found]
    assert [len(each["asked"]) for each in found] == [3, 1]
    names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert not {name for name in names if re.match("TORCHELASTIC|MASTER_|(LOCAL_)?(RANK|WORLD_SIZE)$", name)}
    assert "OMP_NUM_THREADS" not in names and "VLLM_SERVER_DEV_MODE" in names


def test_weights_are_sent_to_a_real_vllm(policy, tmp_path, monkeypatch) -> None:
    """By its own protocol, with a way for the bytes that a CPU has."""
    vlm, chat = policy
    started = tmp_path / "vllm"
    script = Path(__file__).parent / "file_vllm.py"
    started.write_text(f'#!/bin/sh\nexec "{Path(str(program())).parent / "python"}" "{script}" "$@"\n')
    started.chmod(0o755)
    recipe = recipe_of("rollout.engine=vllm_colocated", f"rollout.executable={started}")
    for name, value in CPU.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 200_000)
    monkeypatch.setattr(EngineNeeds, "_transfer", lambda needs, on_cpu: "file")
    send = lambda needs, vlm, fleet, launch: Transfer(fleet, FileChannel(tmp_path, vlm.world), ranks=1)  # noqa: E731
    monkeypatch.setattr(EngineNeeds, "transfer", send)
    prompts, warm = prompts_of(recipe, chat, 5), chat.sampling(max_new_tokens=24, n=3, seed=1)
    with open_engines(engine_needs(recipe), tmp_path) as make:
        engine = make(vlm, chat, 64)
        assert largest_gap(vlm, chat, prompts[:-1], engine.sample(prompts, warm)[:-1], 1.0) < 1e-3
        for _ in "12":
            perturb(vlm, 0.02)
            assert largest_gap(vlm, chat, prompts, engine.sample(prompts, warm), 1.0) > 0.01, "not sent yet"
            engine.rest()
            engine.sync()
            after = engine.sample(prompts, warm)
            assert engine._published.newest.sent
            assert largest_gap(vlm, chat, prompts[:-1], after[:-1], 1.0) < 1e-3
        signal_server("server", signal.SIGKILL)
        assert engine.sample(prompts, warm) == after and not engine._published.newest.sent


ASK_ALL = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=1024, max_num_seqs=12, enforce_eager=True)
    asked = json.load(open(sys.argv[2]))
    outputs = llm.chat(asked, SamplingParams(temperature=0, max_tokens=24))
    json.dump([output.outputs[0].text for output in outputs], open(sys.argv[2], "w"))
"""


def test_two_ranks_learn_while_vllm_samples(tmp_path, monkeypatch) -> None:
    """The gradients of steps that wait for all answers."""
    for name, value in CPU.items():
        monkeypatch.setenv(name, value)
    limits = {"start_limit_s": START_LIMIT_S, "dead_limit_s": 2 * START_LIMIT_S, "health_limit_s": 60}
    grpo = {"steps": 4, "prompts_per_step": 16, "group_size": 6, "max_new_tokens": 64, "pack_tokens": 500}
    job = {
        "model": "builtin",
        "rollout": {"executable": program(), "memory_share": 0.1, "concurrency": 4, **limits},
        "behaviour": {},
        "problems": 64,
        "cap": 2.0,
        "keep_gradients": True,
        "grpo": grpo | {"optimizer": {"lr": 0.0}, "temperature": 1.6},  # answers of different lengths
        "timeout_s": START_LIMIT_S,
    }
    ways = ("none", "on_policy", "one_step_off")
    job |= {"share_servers": str(tmp_path / "rollout")}
    jobs = [job | {"folder": str(tmp_path / way), "overlap": way} for way in ways]
    run_on(2, jobs, tmp_path / "jobs.json", limit_s=3 * START_LIMIT_S)
    assert_same_gradients(tmp_path / "none", tmp_path / "on_policy")
    metrics = read_jsonl(tmp_path / "one_step_off" / "metrics.jsonl")
    assert [row["staleness"] for row in metrics] == [0, 1, 1, 1]


@HERE
@pytest.mark.skipif(
    "avx512f" not in Path("/proc/cpuinfo").read_text(), reason="vLLM's int4 kernel for CPUs needs AVX-512"
)
def test_a_quantised_export_answers_as_it_does_here(tmp_path) -> None:
    folder, asked = tmp_path / "int4", tmp_path / "asked.json"
    export(Export(model="builtin", out=folder, dtype="bf16", quantise="int4"))
    answers, questions, ours = session.load(str(folder), dtype="bfloat16"), [], []
    for problem in tasks.load("puzzles", split="test", count=12, seed=7):
        picture = {"type": "image_url", "image_url": {"url": data_uri(encoded_image(problem.images[0]))}}
        questions.append([{"role": "user", "content": [picture, {"type": "text", "text": problem.question}]}])
        ours.append(answers.ask(problem.images[0], problem.question, max_new_tokens=24).text)
    asked.write_text(json.dumps(questions), encoding="utf-8")
    script = tmp_path / "ask.py"
    script.write_text(ASK_ALL, encoding="utf-8")
    subprocess.run(
        [sys.executable, str(script), str(folder), str(asked)],
        check=True,
        env=os.environ | CPU,
        timeout=START_LIMIT_S,
    )
    theirs = json.loads(asked.read_text(encoding="utf-8"))
    # A tie in bfloat16 may fall to either side.
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 11
    assert len(set(ours)) > 3


# From here on all tests share one server.


def test_vllm_and_the_local_engine_are_one_distribution(recipe, make_engine, policy) -> None:
    vlm, chat = policy
    prompts = prompts_of(recipe, chat, 11)
    engine = make_engine(vlm, chat, 64)
    greedy = chat.sampling(max_new_tokens=40, temperature=0.0)
    theirs, ours = engine.sample(prompts, greedy), LocalEngine(vlm, chat, max_rows=64).sample(prompts, greedy)
    assert [g[0].ids for g in theirs] == [g[0].ids for g in ours]
    assert [g[0].stop for g in theirs] == [g[0].stop for g in ours]
    for temperature in (1.0, 0.7):
        warm = chat.sampling(max_new_tokens=40, temperature=temperature, n=4, seed=5)
        groups = engine.sample(prompts, warm)
        assert largest_gap(vlm, chat, prompts[:-1], groups[:-1], temperature) < 1e-3
        # Where the model is lost it gives banned ids some probability, which vLLM's logprobs are without.
        assert largest_gap(vlm, chat, prompts, groups, temperature) < 0.05
        assert engine.sample(prompts, warm) == groups, "the same seeds draw the same answers"
    ids = {index for group in groups for r in group for index in r.ids}
    assert not ids & set(warm.banned_ids)


def test_new_weights_reach_the_server_and_no_old_cache_stays(recipe, make_engine, policy) -> None:
    vlm, chat = policy
    prompts = prompts_of(recipe, chat, 5)
    engine = make_engine(vlm, chat, 64)
    warm = chat.sampling(max_new_tokens=24, n=3, seed=1)
    before = engine.sample(prompts, warm)
    perturb(vlm, 0.03)
    assert largest_gap(vlm, chat, prompts, engine.sample(prompts, warm), 1.0) > 0.02, "not published yet"
    engine.sync()
    after = engine.sample(prompts, warm)
    assert largest_gap(vlm, chat, prompts[:-1], after[:-1], 1.0) < 1e-3
    assert after != before


def test_another_image_size_is_an_error(recipe, make_engine, policy) -> None:
    vlm, chat = policy
    engine = make_engine(vlm, chat, 64)
    engine.sync()
    other = loading.make_chat(vlm, images=recipe_of("images.min_pixels=50176").images)
    with pytest.raises(EndpointError, match="pixel bounds"):
        engine.sample([other.prompt(make_problem("small"))], other.sampling(max_new_tokens=4))


def test_vllm_sees_what_the_trainer_sees(recipe, make_engine, policy, monkeypatch) -> None:
    """Before and after an update; then weights that are named and not loaded, and black images."""
    vlm, chat = policy
    engine = make_engine(vlm, chat, 64)
    engine.sync()
    check, lines = check_of(vlm, chat, engine), list[str]()
    check._say = lines.append
    check(0, Clock())
    perturb(vlm, 0.02)
    engine.sync()
    check(1, Clock())
    assert len(lines) == 2 and check.worst.gap < 1e-4 and check.worst.precision == "float32"
    with monkeypatch.context() as patch:
        named = lambda server, client, weights, has: server._name(client, weights)  # noqa: E731
        patch.setattr(Server, "_load", named)
        perturb(vlm, 0.02)
        engine.sync()
        with pytest.raises(TrainingError, match=r"weights\..* as if it still had the weights of before"):
            check(2, Clock())
    engine.sync()
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "encode", lambda image, **options: encode(Image.new("RGB", image.size)))
        with pytest.raises(TrainingError, match=r"pixels\..* as if every image were black"):
            check_of(vlm, chat, engine)(0, Clock())


def test_vllm_with_other_pixel_bounds_is_named(recipe, make_engine, policy) -> None:
    """Its processor makes fewer tokens of an image than the trainer, whose bounds are other ones."""
    vlm, chat = policy
    engine = make_engine(vlm, chat, 64)
    engine.sync()
    other = loading.make_chat(vlm, images=recipe_of("images.min_pixels=50176").images)
    with pytest.raises(TrainingError, match=r"grid\..* tokens of the images, and the trainer"):
        check_of(vlm, other, engine)(0, Clock())


class Disturbed:
    """An engine whose server suffers something while it answers."""

    def __init__(self, engine, misdeeds: dict) -> None:
        self.engine, self.misdeeds, self.done = engine, misdeeds, []

    def sync(self) -> None:
        self.engine.sync()

    def rest(self) -> None:
        self.engine.rest()

    def sample(self, prompts, sampling, *, step=0, on_group=None):
        timer = None
        if step in self.misdeeds:
            name, number = self.misdeeds[step]
            timer = threading.Timer(0.3, lambda: self.done.append(signal_server(name, number)))
            timer.start()
        groups = self.engine.sample(prompts, sampling, step=step, on_group=on_group)
        if timer is not None:
            timer.join()
        return groups


def signal_server(name: str, number: signal.Signals) -> int:
    """Send a signal to a process of our newest server, once it is well: `vllm serve` itself, or its engine.

    It may still be starting after the last signal; one that is stopped then is waited for as long as a
    start may take.
    """
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end:
        servers = [child for child in psutil.Process().children() if " serve " in command_of(child)]
        # Processes may end while they are looked at: then look again.
        with contextlib.suppress(psutil.Error, httpx.HTTPError, ValueError, StopIteration):
            newest = max(servers, key=psutil.Process.create_time)
            words = command_of(newest).split()
            port = words[words.index("--port") + 1]
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).raise_for_status()
            inside = next(child for child in newest.children() if "EngineCore" in command_of(child))
            process = newest if name == "server" else inside
            process.send_signal(number)
            return process.pid
        time.sleep(0.1)
    raise AssertionError("there is no server with an engine")


def command_of(process: psutil.Process) -> str:
    """Its command line; empty when it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def train(folder: Path, recipe: Recipe, vlm: Vlm, chat: Chat, engine) -> dict[str, torch.Tensor]:
    settings = Grpo.model_validate({
        "steps": 4, "prompts_per_step": 4, "group_size": 4, "max_new_tokens": 24, "save_every": 10,
        "optimizer": {"lr": 1e-3}, "max_zero_variance_steps": 4,
    })  # fmt: skip
    rows = load(
        "builtin:puzzles?split=train&count=12&seed=4", recipe.data, decode_limit=10**7, role="rl"
    ).rows
    context = GrpoContext(
        vlm=vlm,
        reference=None,
        chat=chat,
        engine=engine,
        grader=LengthGrader(),
        importance_cap=recipe.rollout.cap,
    )
    with StopFlag() as stop, screen("grpo", settings.steps, quiet=True) as view:
        stage = RunDir(folder, name="grpo", seed=3, settings=settings, recipe_hash="h")
        grpo.train(context, [row.problem for row in rows], settings, run=stage, screen=view, stop=stop)
    return weights_of(vlm)


def test_a_server_killed_twice_and_hung_once_changes_nothing(recipe, make_engine, tmp_path) -> None:
    results = []
    for name, misdeeds in {
        "calm": {},
        "disturbed": {
            1: ("server", signal.SIGKILL),
            2: ("engine", signal.SIGKILL),
            3: ("server", signal.SIGSTOP),
        },
    }.items():
        vlm = loading.load(recipe.model)
        chat = loading.make_chat(vlm, recipe.prompt, recipe.images)
        engine = Disturbed(make_engine(vlm, chat, 64), misdeeds)
        results.append(train(tmp_path / name, recipe, vlm, chat, engine))
        assert len(engine.done) == len(misdeeds)
    calm, disturbed = results
    start = weights_of(loading.load(recipe.model))
    assert any((start[key] - calm[key]).abs().max() > 1e-3 for key in calm), "nothing was learnt"
    for key in calm:
        assert torch.allclose(calm[key], disturbed[key], atol=1e-5), key
    for step in range(1, 5):
        name = f"rollouts/step-{step:06d}.jsonl"
        assert (tmp_path / "calm" / name).read_text() == (tmp_path / "disturbed" / name).read_text()
