"""Rollouts by vLLM, without vLLM: the wire, the weights' way, and real processes that misbehave on time."""

import base64
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import family_models
import warm
from conftest import LengthGrader, make_problem
from rlcs.distributed import World
from rlcs.engines.factory import open_engines
from rlcs.engines.local import LocalEngine
from rlcs.engines.vllm.engine import VllmEngine
from rlcs.engines.vllm.fleet import Fleet
from rlcs.engines.vllm.process import Process
from rlcs.engines.vllm.protocol import PromptRequest
from rlcs.engines.vllm.readiness import require_quantisable
from rlcs.engines.vllm.server import Launch, context_length
from rlcs.engines.vllm.weights import WeightsFolder
from rlcs.errors import EndpointError, ModelError, OutOfMemory, RecipeError, TrainingError, UserError
from rlcs.generation import EngineSampler, open_sampler
from rlcs.model import loading
from rlcs.model.chat import Chat
from rlcs.model.vlm import Vlm
from rlcs.pipeline.study import engine_needs
from rlcs.progress import screen
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.sampling import EngineSettings, Rollouts
from rlcs.recipe.schema import Model
from rlcs.recipe.stages import Grpo
from rlcs.recipe.table import summary_rows
from rlcs.records import Request, Sampling, StopReason
from rlcs.serving.remote import serving
from rlcs.signals import StopFlag
from rlcs.storage import read_jsonl
from rlcs.train import grpo
from rlcs.train.context import GrpoContext
from rlcs.train.run_dir import RunDir
from test_distributed import environment, free_port

FAKE = Path(__file__).parent / "fake_vllm.py"
WORKER = Path(__file__).parent / "rollout_worker.py"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """An executable that is called like vllm."""
    path = tmp_path / "vllm"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    path.chmod(0o755)
    return path


class Run:
    """An engine over fake servers, and what they were told."""

    def __init__(
        self,
        folder: Path,
        program: Path,
        vlm: Vlm,
        chat: Chat,
        *,
        adapter_rank: int | None = None,
        sleep_level: int = 0,
        transfer: str = "",
        **settings: object,
    ) -> None:
        self.folder = folder
        quick = {"health_limit_s": 0.6, "request_limit_s": 20.0, "executable": str(program)}
        self.settings = Rollouts.model_validate({"engine": "vllm_server", **quick, **settings})
        launch = Launch(
            settings=self.settings,
            dtype="float32",
            max_tokens=512,
            max_rows=64,
            adapter_rank=adapter_rank or 0,
            sleep_level=sleep_level,
            transfer=transfer,
        )
        self.fleet = Fleet(self.settings, logs=folder, launch=launch)
        self.published = WeightsFolder(folder / "weights", as_adapters=adapter_rank is not None)
        replay = self.settings.router_replay
        self.engine = VllmEngine(self.fleet, self.published, vlm, chat, keeps_routes=replay)
        self.vlm, self.chat = vlm, chat

    def behave(self, **how: object) -> None:
        (self.folder / "behaviour.json").write_text(json.dumps(how))

    def ask(self, count: int = 12, n: int = 2) -> list[str]:
        """Ask `count` prompts and return what the servers said of their weights."""
        prompts = [self.chat.prompt(make_problem(f"p{k}", sizes=())) for k in range(count)]
        groups = self.engine.sample(prompts, self.chat.sampling(max_new_tokens=64, n=n))
        assert [g[0].problem_id for g in groups] == [p.problem_id for p in prompts]
        assert all([r.index for r in group] == list(range(n)) for group in groups)
        return ["".join(map(chr, r.ids)) for group in groups for r in group]

    @property
    def started(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("started-*.json"))]


@pytest.fixture
def run(tmp_path: Path, program: Path, vlm: Vlm, chat: Chat):
    runs = []

    def make(**settings: object) -> Run:
        runs.append(Run(tmp_path / "rollout", program, vlm, chat, **settings))
        runs[-1].folder.mkdir(exist_ok=True)
        return runs[-1]

    yield make
    for one in runs:
        one.fleet.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_server_answers_by_the_newest_weights(run) -> None:
    both = run(servers=2, concurrency=2)
    first = set(both.ask(30))
    both.engine.sync()
    second = set(both.ask(30))
    assert len(first) == len(second) == 1 and first != second
    assert second == {both.published.newest.folder.name}
    assert [p.name for p in (both.folder / "weights").iterdir()] == list(second), "old versions are removed"
    assert len(both.started) == 2, "servers go on from round to round"
    both.fleet.close()
    assert not any(alive(one["pid"]) for one in both.started)


@pytest.mark.fault("engines", "a server that starts slowly", "waited for, not begun again")
def test_a_server_that_starts_slowly_is_not_begun_again_in_every_round(run) -> None:
    both = run(servers=2, concurrency=2)
    both.behave(first_alone=True)
    for _ in range(3):
        both.ask(4)
    assert len(both.started) == 2


@pytest.mark.fault(
    "engines", "a vLLM server that is killed, hangs, fails or answers oddly", "asked again; the run goes on"
)
@pytest.mark.parametrize("misdeed", ["die_after", "hang_after", "forget_after", "fail_after", "abort_after"])
@pytest.mark.parametrize("servers", [1, 2])
def test_a_server_that_fails_costs_a_retry(run, misdeed: str, servers: int) -> None:
    failing = run(servers=servers, concurrency=3)
    failing.behave(**{misdeed: 4})
    failing.engine.sync()
    assert set(failing.ask(20)) == {failing.published.newest.folder.name}
    assert (failing.folder / f"{misdeed}.done").exists(), "it never failed"
    restarted = misdeed in ("die_after", "hang_after")
    assert len(failing.started) >= servers + (servers == 1 and restarted)


@pytest.mark.fault("engines", "a server that was started again", "it gets the weights of now")
def test_weights_of_now_are_loaded_into_a_restarted_server(run) -> None:
    one = run(concurrency=2)
    old = set(one.ask(4))
    one.engine.sync()
    os.kill(one.started[0]["pid"], signal.SIGKILL)
    assert set(one.ask(4)) == {one.published.newest.folder.name} != old
    assert len(one.started) == 2


@pytest.mark.fault("engines", "a vLLM server killed whose engine lives on", "its processes are ended")
def test_what_a_killed_server_leaves_behind_is_ended(run) -> None:
    one = run()
    one.behave(engine=True)
    one.ask(1)
    (engine,) = [int(path.name.partition("-")[2]) for path in one.folder.glob("engine-*")]
    os.kill(one.started[0]["pid"], signal.SIGKILL)
    assert alive(engine)
    one.ask(1)
    assert len(one.started) == 2 and not alive(engine)


@pytest.mark.fault("engines", "no healthy server for long", "the run ends with a sentence")
def test_no_server_for_long_ends_the_run_with_a_sentence(run) -> None:
    none = run(urls=["http://127.0.0.1:9"], dead_limit_s=1.0)
    with pytest.raises(TrainingError, match=r"no vLLM server was well for 1 s(.|\n)*last checkpoint"):
        none.ask(2)


@pytest.mark.fault("engines", "a prompt that kills every server", "the run ends with its name")
def test_a_prompt_that_kills_every_server_ends_the_run(run) -> None:
    one = run(max_tries=2, concurrency=1)
    one.behave(expand=1)
    one.ask(1)
    (one.folder / "behaviour.json").write_text('{"refuse": true}')
    with pytest.raises(EndpointError, match="refuses a prompt: 400"):
        one.ask(1)


@pytest.mark.fault("engines", "a vLLM that cannot start", "a sentence with its last errors")
def test_a_program_that_cannot_start_says_why(run, tmp_path: Path) -> None:
    broken = run()
    broken.behave(broken=True)
    with pytest.raises(ModelError, match="no such model architecture"):
        broken.ask(1)
    with pytest.raises(ModelError, match="cannot be started"):
        run(executable=str(tmp_path / "nowhere")).ask(1)


@pytest.mark.parametrize(
    ("message", "what", "fix"),
    [
        (
            "ValueError: No available memory for the cache blocks.",
            "vLLM has too little memory for its cache",
            "raise rollout.memory_share (now 0.4)",
        ),
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            "GPU memory ran out: 2.00 GB were requested",
            "lower rollout.memory_share (now 0.4)",
        ),
    ],
)
def test_a_server_without_memory_says_which_way_its_share_must_go(run, message, what, fix) -> None:
    full = run(memory_share=0.4)
    full.behave(broken=message)
    with pytest.raises(OutOfMemory) as caught:
        full.ask(1)
    assert what in caught.value.what and "vllm-0.log" in caught.value.what
    assert caught.value.fix.startswith(fix)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"version": "0.31.2"}, "0.31.2 is too old"),
        ({"mode": "raw_logprobs"}, "logprobs are raw_logprobs"),
        ({"room": 511}, r"may have 512 tokens, and its --max-model-len is 511(.|\n)*take it out"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(run, how: dict, words: str) -> None:
    unfit = run()
    unfit.behave(**how)
    with pytest.raises(EndpointError, match=words):
        unfit.ask(1)


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        ((), 512), (("--max-model-len", "8k"), 8000), (("--max-model-len=2K",), 2048),
        (("--max_model_len", "25.6k", "--seed", "1"), 25600), (("--max-model-len", "auto"), None),
        (("--max-model-len=-1",), None),
    ],
)  # fmt: skip
def test_the_context_is_read_as_vllm_reads_it(words: tuple[str, ...], tokens: int | None) -> None:
    settings = Rollouts(engine="vllm_server", arguments=words)
    assert context_length(settings, 512) == tokens
    launch = Launch(settings=settings, dtype="float32", max_tokens=512, max_rows=1)
    assert launch.fits_itself == (tokens is None)


@pytest.mark.fault("engines", "a server left paused", "it goes on")
def test_a_pause_that_was_cut_off_ends(run) -> None:
    one = run()
    one.ask(1)
    one.fleet._servers[0]._paused = True
    one.ask(1)
    assert (one.folder / "paused.txt").read_text().split() == ["pause", "resume"] * 2


@pytest.mark.fault("engines", "a server that dies while it is given weights", "not waited for")
def test_a_server_that_dies_while_it_is_given_weights_is_not_waited_for(run) -> None:
    one = run()
    one.ask(4)
    one.behave(deaf_after=1)
    one.engine.sync()
    began = time.monotonic()
    assert set(one.ask(4)) == {one.published.newest.folder.name}
    assert (one.folder / "deaf_after.done").exists() and len(one.started) == 2
    assert time.monotonic() - began < 60


def test_the_words_of_an_earlier_start_are_not_the_reason(run) -> None:
    one = run()
    (one.folder / "vllm-0.log").write_text("ValueError: yesterday\n")
    one.behave(mute=True)
    with pytest.raises(ModelError, match="unrecognized arguments") as caught:
        one.ask(1)
    assert "yesterday" not in str(caught.value)


def test_one_server_that_is_well_is_enough(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long its answers take, and whatever the other does."""
    both = run(servers=2, concurrency=1, start_limit_s=2.0, dead_limit_s=1.5)
    both.behave(slow=5.0, first_alone=True)
    both.ask(1)


@pytest.mark.fault("engines", "SIGKILL of the process that started vLLM", "no server is left")
def test_servers_of_ours_die_with_us(tmp_path: Path, program: Path) -> None:
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from rlcs.engines.vllm.process import Process
        from rlcs.engines.vllm.server import Launch
        from rlcs.recipe.sampling import EngineSettings, Rollouts
        from rlcs.recipe.sampling import EngineSettings, Rollouts
        settings = Rollouts(executable={str(program)!r})
        launch = Launch(settings=settings, dtype="float32", max_tokens=9, max_rows=9)
        folder = Path({str(tmp_path)!r})
        process = Process(
            lambda port: launch.command(folder / "weights" / "1", port), launch.environment(0), folder / "log"
        )
        while not list(folder.glob("started-*.json")):
            time.sleep(0.05)
        print("up", flush=True)
        time.sleep(60)
    """)
    trainer = warm.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "up\n"
    (server,) = [int(path.stem.partition("-")[2]) for path in tmp_path.glob("started-*.json")]
    assert alive(server)
    trainer.kill()
    trainer.wait()
    end = time.monotonic() + 10
    while alive(server) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(server)


@pytest.mark.fault("engines", "a server ended at once", "its shared memory is removed")
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /dev/shm")
@pytest.mark.parametrize("at_once", [True, False])
def test_shared_memory_of_a_server_goes_with_it(tmp_path: Path, at_once: bool) -> None:
    """Between its processes vLLM has 400 MB of it, which a killed one leaves to Python's resource tracker."""
    name = tmp_path / "name"
    script = f"""
        import signal, time
        from multiprocessing.shared_memory import SharedMemory
        from pathlib import Path
        signal.signal(signal.SIGTERM, lambda *_: exit())
        memory = SharedMemory(create=True, size=1 << 20)
        Path({str(tmp_path)!r}, "part").write_text(memory.name)
        Path({str(tmp_path)!r}, "part").rename({str(name)!r})
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    process = Process(lambda port: command, os.environ, tmp_path / "log")
    while not name.exists():
        assert process.runs, process.last_errors
        time.sleep(0.05)
    memory = Path("/dev/shm", name.read_text())  # noqa: S108
    assert memory.exists()
    process.end(at_once=at_once)
    assert not memory.exists() and not process.runs


def test_the_command_line_of_a_server(vlm: Vlm) -> None:
    words = ["rollout.servers=2", "rollout.devices=[\"0,1\", \"2,3\"]", "rollout.tensor_parallel=2",
             "rollout.memory_share=0.5", "rollout.arguments=[--enforce-eager]", "grpo.max_rows=24",
             "rollout.executable=/env/bin/vllm", "grpo.max_new_tokens=100",
             "prompt.max_tokens=200"]  # fmt: skip
    launch = engine_needs(load_recipe("quickstart", words).recipe).launch(vlm)
    command = launch.command(Path("/weights/7"), 8123)
    assert command[:3] == ["/env/bin/vllm", "serve", "/weights/7"]
    pairs = {command[k]: command[k + 1] for k in range(len(command) - 1)}
    expected = {"--port": "8123", "--max-model-len": "300", "--max-num-seqs": "24", "--dtype": "float32",
                "--tensor-parallel-size": "2", "--gpu-memory-utilization": "0.5",
                "--logprobs-mode": "processed_logprobs"}  # fmt: skip
    assert expected.items() <= pairs.items() and command[-1] == "--enforce-eager"
    assert "--no-enable-chunked-prefill" in command, "this model lies on a CPU"
    assert launch.environment(1)["CUDA_VISIBLE_DEVICES"] == "2,3"
    with pytest.raises(RecipeError, match="1 devices for 2 servers"):
        load_recipe("quickstart", ["rollout.servers=2", 'rollout.devices=["0"]'])
    for words in (
        ["rollout.engine=vllm_colocated", "rollout.servers=2"],
        ["rollout.engine=vllm_colocated", 'rollout.devices=["0"]'],
        ["rollout.engine=vllm_colocated", "rollout.urls=[http://a:1]"],
        ["rollout.engine=vllm_server", "rollout.urls=[http://a]", "rollout.arguments=[--seed]"],
    ):
        with pytest.raises(RecipeError, match=r"leave out|run elsewhere|where they are started"):
            load_recipe("quickstart", words)


def test_weights_lie_in_main_memory_where_it_has_room(tmp_path: Path, vlm: Vlm) -> None:
    """Such a folder must go with a run that is killed: nobody looks there."""
    memory, disk = tmp_path / "shm", tmp_path / "disk"
    memory.mkdir()
    published = WeightsFolder(disk, memory=memory)
    for _ in "12":
        weights = published.publish(vlm)
    assert weights.folder.parent.parent == memory and not disk.exists()
    assert [path.name for path in weights.folder.parent.iterdir()] == [weights.version]
    published.remove()
    assert list(memory.iterdir()) == []
    script = f"""
        import os, signal
        from pathlib import Path
        from rlcs.engines.vllm.weights import WeightsFolder
        from rlcs.model import loading
        from rlcs.recipe.schema import Model
        disk, memory = Path({str(disk)!r}), Path({str(memory)!r})
        WeightsFolder(disk, memory=memory).publish(loading.load(Model(name="builtin")))
        assert list(memory.iterdir())
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = warm.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert killed.returncode == -signal.SIGKILL
    end = time.monotonic() + 10
    while list(memory.iterdir()) and time.monotonic() < end:
        time.sleep(0.05)
    assert list(memory.iterdir()) == []


@pytest.mark.fault("engines", "no space in main memory for weights", "the run's folder takes them")
def test_without_room_in_main_memory_weights_go_to_the_run(
    tmp_path: Path, vlm: Vlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = SimpleNamespace(free=vlm.model.num_parameters() * 8)
    monkeypatch.setattr("shutil.disk_usage", lambda path: once)
    weights = WeightsFolder(tmp_path / "disk", memory=tmp_path).publish(vlm)
    assert weights.folder.parent == tmp_path / "disk"


def test_fp8_rollouts_are_started_and_always_corrected(vlm: Vlm) -> None:
    fp8 = ["rollout.engine=vllm_server", "rollout.quantization=fp8"]
    recipe = load_recipe("quickstart", fp8).recipe
    command = engine_needs(recipe).launch(vlm).command(Path("/weights/7"), 8123)
    at = command.index("--quantization")
    assert command[at + 1] == "fp8_per_channel"
    ignored = json.loads(command[command.index("--quantization-config") + 1])["ignore"]

    def is_whole(name: str) -> bool:
        return any(re.match(pattern.removeprefix("re:"), name) for pattern in ignored)

    layer = "language_model.model.layers.0."
    whole = [f"{layer}linear_attn.in_proj_{gate}" for gate in ("a", "b", "ba")]
    assert all(map(is_whole, ["visual.blocks.0.mlp", "a.vision_tower.x", f"{layer}mlp.gate", *whole]))
    for name in ("mlp.gate_up_proj", "mlp.gate_proj", "linear_attn.in_proj_qkvz", "mlp.experts"):
        assert not is_whole(layer + name)
    assert "vLLM in FP8" in dict(summary_rows(recipe))["rollouts"]
    assert recipe.rollout.cap == 2.0
    for words, says in (
        (["rollout.importance_cap=null"], "answers are those of another policy"),
        (["rollout.engine=local"], "quantization is vLLM's"),
        (["rollout.urls=[http://a:1]"], "give `quantization` where they are started"),
    ):
        with pytest.raises(RecipeError, match=says):
            load_recipe("quickstart", [*fp8, *words])
    with pytest.raises(RecipeError, match="no fp8 on a CPU"):
        require_quantisable(recipe.rollout, "cpu")
    require_quantisable(recipe.rollout, "cuda")


def test_the_weights_folder_may_be_elsewhere(tmp_path: Path, program: Path, vlm: Vlm, chat: Chat) -> None:
    words = ["rollout.engine=vllm_server", f"rollout.executable={program}", "rollout.health_limit_s=1",
             f"rollout.weights_folder={tmp_path / 'shared'}"]  # fmt: skip
    stranger = tmp_path / "shared" / "keep.txt"
    stranger.parent.mkdir()
    stranger.write_text("not ours")
    with open_engines(engine_needs(load_recipe("quickstart", words).recipe), tmp_path / "run") as make:
        sampling = chat.sampling(max_new_tokens=4)
        make(vlm, chat, 8).sample([chat.prompt(make_problem("a", sizes=()))], sampling)
        (first,) = (tmp_path / "shared").glob("quickstart-*/*-1/model.safetensors")
        with open_engines(
            engine_needs(load_recipe("quickstart", words).recipe), tmp_path / "other"
        ) as make_other:
            make_other(vlm, chat, 8).sample([chat.prompt(make_problem("a", sizes=()))], sampling)
        assert first.exists(), "another run's weights"
    assert stranger.exists()
    assert not any(path.is_dir() for path in (tmp_path / "shared").iterdir()), "nobody reads them any more"


def test_vllm_starts_anew_when_images_are_resized_otherwise(
    tmp_path: Path, program: Path, vlm: Vlm, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["rollout.engine=vllm_server", f"rollout.executable={program}", "rollout.health_limit_s=1"]
    ask = [chat.prompt(make_problem("a", sizes=()))], chat.sampling(max_new_tokens=4)
    bounds = dict(vlm.processor.image_processor.size)
    with open_engines(engine_needs(load_recipe("quickstart", words).recipe), tmp_path) as make:
        for size, starts in ((bounds, 1), (bounds, 1), (bounds | {"shortest_edge": 6272}, 2)):
            monkeypatch.setattr(vlm.processor.image_processor, "size", size)
            make(vlm, chat, 8).sample(*ask)
            assert len(list(tmp_path.glob("started-*.json"))) == starts


def test_vllm_computes_in_the_dtype_of_a_sharded_policy(vlm: Vlm) -> None:
    recipe = load_recipe("quickstart", ["parallel.compute_dtype=bfloat16"]).recipe
    assert engine_needs(recipe).launch(vlm).dtype == "float32"
    grouped = replace(vlm, world=replace(vlm.world, objects=object()))
    assert engine_needs(recipe).launch(grouped).dtype == "bfloat16"


def break_while_publishing(folder: WeightsFolder, vlm: Vlm, *, save: str, file: str) -> None:
    """Publish, and be stopped when this file of the new version is half written by this function."""

    def breaks(vlm: Vlm, path: Path, *more: object, **options: object) -> None:
        path.mkdir()
        (path / file).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"rlcs.engines.vllm.weights.{save}", breaks)
        with pytest.raises(KeyboardInterrupt):
            folder.publish(vlm)


@pytest.mark.fault("engines", "weights for a server half written", "never loaded")
def test_a_half_written_version_has_no_name(tmp_path: Path, vlm: Vlm) -> None:
    folder = WeightsFolder(tmp_path)
    first = folder.publish(vlm)
    break_while_publishing(folder, vlm, save="write_serving", file="model.safetensors")
    assert folder.newest == first and first.folder.is_dir()
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".part")] == [first.version]
    WeightsFolder(tmp_path).publish(vlm)
    assert len(list(tmp_path.iterdir())) == 1, "what an earlier attempt left is cleared"


def test_a_tied_head_goes_with_weights_of_its_own_to_a_cpu(tmp_path: Path, vlm: Vlm) -> None:
    published = WeightsFolder(tmp_path).publish(vlm).folder
    again = loading.load(Model(name=str(published)), device=torch.device("cpu")).model
    head, words = again.get_output_embeddings().weight, again.get_input_embeddings().weight
    assert head is not words and torch.equal(head, words)
    assert torch.equal(head, vlm.model.get_output_embeddings().weight)


def sampled_by_two_ranks(program: Path, model: Path, folder: Path, *more: object) -> list[dict]:
    """What `rollout_worker.py` wrote on each of two ranks."""
    port = free_port()
    command = [str(word) for word in (sys.executable, "-W", "ignore", WORKER, program, model, folder, *more)]
    ranks = [
        warm.Popen(command, env=environment(rank, 2, port), stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_under_torchrun_rank_0_asks_for_all_ranks(tmp_path: Path, program: Path, random_model_folder) -> None:
    """The weights come together from both ranks' shards, and every rank gets the answers to its prompts."""
    found = sampled_by_two_ranks(program, random_model_folder, tmp_path)
    assert [len(each["asked"]) for each in found] == [3, 1]
    assert all(each["got"] == each["asked"] for each in found)
    (version,) = (path for path in (tmp_path / "published").iterdir() if path.is_dir())
    assert all(each["said"] == [version.name] for each in found), "one server, one version"
    saved, base = (loading.load(Model(name=str(each))).model for each in (version, random_model_folder))
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), base.parameters(), strict=False))
    assert torch.equal(saved.get_output_embeddings().weight, base.get_output_embeddings().weight)
    assert len(list(tmp_path.glob("started-*.json"))) == 1


def test_prompts_go_as_ids_with_one_placeholder_an_image(chat: Chat) -> None:
    prompt = chat.prompt(make_problem("two", "<image> or <image><|image_pad|>?", sizes=((56, 84), (84, 56))))
    request = PromptRequest(
        prompt=prompt, sampling=chat.sampling(max_new_tokens=5, n=3), step=2, resized=chat.resized
    )
    ids = request.token_ids
    assert ids.count(chat.image_id) == 2 < list(prompt.ids).count(chat.image_id)
    assert len(ids) == len(prompt.ids) - sum(b - a - 1 for a, b in prompt.spans)
    marks = {prompt.ids[at] for a, b in prompt.spans for at in (a - 1, b)}
    assert replace(request, marks_images=True).token_ids == [index for index in ids if index not in marks]
    body = json.loads(json.dumps(request.body()))
    params = body["sampling_params"]
    assert len(body["content_parts"]) == 2 and params["n"] == 3 and params["stop_token_ids"] == [chat.end_id]
    assert set(params["logit_bias"]) == {str(i) for i in chat.sampling(max_new_tokens=5).banned_ids}
    assert replace(request, step=3).body()["sampling_params"]["seed"] != params["seed"]
    sent = [base64.b64decode(part["url"].partition(",")[2]) for part in body["content_parts"]]
    images = [Image.open(io.BytesIO(data)) for data in sent]
    assert [(image.size, image.mode) for image in images] == [((56, 84), "RGB"), ((84, 56), "RGB")]


def test_another_prompt_than_ours_is_an_error(chat: Chat) -> None:
    prompt = chat.prompt(make_problem("one"))
    request = PromptRequest(
        prompt=prompt, sampling=chat.sampling(max_new_tokens=5), step=0, resized=chat.resized
    )
    token = {"logprob": 1e-7}
    choice = {"index": 0, "finish_reason": "length", "token_ids": [5], "logprobs": {"content": [token]}}
    reply = {"prompt_token_ids": list(prompt.ids), "choices": [choice]}

    (rollout,) = request.rollouts_from(reply)
    assert rollout.stop is StopReason.LENGTH and rollout.logprobs == (0.0,) and rollout.ids == (5,)
    with pytest.raises(EndpointError, match="read the prompt of one as"):
        request.rollouts_from({**reply, "prompt_token_ids": prompt.ids[:-1]})
    assert request.is_answered(["length"])
    assert not request.is_answered(["abort"]) and not request.is_answered([])


class Recorder:
    """Stands for vLLM, its model and a world, and notes in which order they are used."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        for name in ("gc.collect", "torch.cuda.empty_cache"):
            monkeypatch.setattr(name, lambda name=name: self.events.append(name))

    def note(self, name: str, result: object = None):
        return lambda *args, **options: self.events.append(name) or result


FREED = ["gc.collect", "torch.cuda.empty_cache"]


@pytest.mark.parametrize("level", [1, 2])
def test_a_server_sleeps_while_the_model_trains(run, level: int) -> None:
    """Weights that come again are discarded; the memory of weights wakes up first, that of the cache last."""
    one = run(engine="vllm_colocated", sleep_level=level)
    one.ask(2)
    one.engine.rest()
    one.engine.rest()
    assert told(one) == ["pause", "resume", f"sleep {level}"]
    first = one.published.newest.version
    said = set(one.ask(2))
    loads = (one.folder / "loaded.txt").read_text().splitlines()
    assert said == {first} and len(loads) == (2 if level == 2 else 1), "level 1 kept them"
    one.engine.rest()
    one.engine.sync()
    assert set(one.ask(2)) == {one.published.newest.version} != {first}
    wakes = ["wake weights", "wake kv_cache"]
    assert told(one)[2:] == [f"sleep {level}", *wakes, f"sleep {level}", *wakes] and len(one.started) == 1


@pytest.mark.fault("engines", "a server that dies asleep", "started again")
@pytest.mark.parametrize("misdeed", ["dead_sleeping", "dead_waking", "killed"])
def test_a_server_that_dies_asleep_is_started_again(run, misdeed: str) -> None:
    one = run(engine="vllm_colocated", sleep_level=2)
    one.behave(**{misdeed: 1})
    one.ask(2)
    one.engine.rest()
    if misdeed == "killed":
        os.kill(one.started[0]["pid"], signal.SIGKILL)
    one.engine.sync()
    assert set(one.ask(2)) == {one.published.newest.version}
    assert len(one.started) == 2
    one.engine.rest()
    assert told(one)[-1] == "sleep 2"


def test_servers_with_gpus_of_their_own_never_sleep(run) -> None:
    one = run()
    one.ask(1)
    one.engine.rest()
    assert told(one) == ["pause", "resume"]


def told(run: Run) -> list[str]:
    return (run.folder / "paused.txt").read_text().splitlines()


def on_gpus(vlm: Vlm, rank: int, size: int) -> Vlm:
    world = World(rank=rank, size=size, device=torch.device("cuda", rank % 4))
    return replace(vlm, device=torch.device("cuda", rank % 4), world=world)


def test_every_rank_starts_a_server_on_its_own_gpus(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")

    def launch(rank: int, *words: str, size: int = 8, trains: bool = True) -> Launch:
        needs = engine_needs(load_recipe("quickstart", ["rollout.engine=vllm_colocated", *words]).recipe)
        return needs.launch(on_gpus(vlm, rank, size), trains=trains)

    second = launch(5)
    assert second.environment(5)["CUDA_VISIBLE_DEVICES"] == "5" and second.number == 5
    words = second.command(Path("/weights/7"), 8123)
    assert "--enable-sleep-mode" in words and second.sleep_level == 2
    assert words[words.index("--gpu-memory-utilization") + 1] == "0.5"
    pair = launch(2, "rollout.tensor_parallel=2", "rollout.memory_share=0.7")
    assert pair.environment(2)["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert "0.7" in pair.command(Path("/weights/7"), 8123)
    assert launch(0, "lora.rank=8").sleep_level == 1, "the model below adapters stays the same"
    assert "--enable-sleep-mode" not in launch(0, trains=False).command(Path("/weights/7"), 8123)
    with pytest.raises(UserError, match="3 ranks do not make groups of 2"):
        launch(0, "rollout.tensor_parallel=2", size=3)
    with pytest.raises(UserError, match="needs 8 GPUs, and this process sees 4"):
        launch(0, "rollout.tensor_parallel=8")


def test_on_a_cpu_models_are_served_as_vllm_can(vlm: Vlm, tmp_path: Path) -> None:
    folder = family_models.build("qwen3_5", tmp_path / "hybrid")
    hybrid = loading.load(Model(name=str(folder), dtype="bfloat16"), device=torch.device("cpu"))

    def command(policy: Vlm, *words: str) -> list[str]:
        needs = engine_needs(load_recipe("quickstart", ["rollout.engine=vllm_server", *words]).recipe)
        return needs.launch(policy).command(folder, 8123)

    assert "--no-enable-prefix-caching" in command(hybrid)
    assert "--no-enable-prefix-caching" not in command(vlm)
    with pytest.raises(UserError, match=r"(?s)in bfloat16 only, not in float32.*model.dtype=bfloat16"):
        command(loading.load(Model(name=str(folder)), device=torch.device("cpu")))
    mixture = family_models.build("qwen3_vl_moe", tmp_path / "mixture")
    with pytest.raises(UserError, match="wrong answers once it has new weights"):
        command(loading.load(Model(name=str(mixture)), device=torch.device("cpu")))
    with pytest.raises(UserError, match=r"(?s)no LoRA adapters.*rollout.lora=merged"):
        command(hybrid, "lora.rank=8")
    served = serving("vllm", str(folder), key=None).command(folder, 8123)
    assert "bfloat16" in served and "--no-enable-prefix-caching" in served


@pytest.mark.parametrize("ranks", [1, 2])
def test_under_torchrun_ranks_ask_their_own_servers(
    tmp_path: Path, program: Path, random_model_folder: Path, ranks: int
) -> None:
    """With tensor parallelism the first of a group asks for all of it."""
    words = ["rollout.engine=vllm_colocated", f"rollout.tensor_parallel={ranks}"]
    found = sampled_by_two_ranks(program, random_model_folder, tmp_path, 0, *words)
    assert all(each["got"] == each["asked"] for each in found) and len(found[0]["asked"]) == 3
    (version,) = (path.name for path in (tmp_path / "published").iterdir())
    assert all(each["said"] == [version] for each in found)
    logs = sorted(path.name for path in tmp_path.glob("vllm-*.log"))
    assert logs == (["vllm-0.log"] if ranks == 2 else ["vllm-0.log", "vllm-1.log"])
    assert len(list(tmp_path.glob("started-*.json"))) == len(logs)


@pytest.mark.parametrize("shares_gpu", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_that_shares_its_gpu_gives_memory_back_before_rank_0_asks(
    vlm: Vlm, chat: Chat, monkeypatch: pytest.MonkeyPatch, rank: int, shares_gpu: bool
) -> None:
    """Servers may start, or start again, on GPUs that train: their ranks all have a cache."""
    seen = Recorder(monkeypatch)
    world = SimpleNamespace(
        rank=rank,
        size=2,
        gather=seen.note("gathered", [[], []]),
        each=lambda work: seen.note("each", [work()] * 2)(),
    )
    published = SimpleNamespace(newest=None, publish=seen.note("published", object()))
    backend = SimpleNamespace(shares_gpu=shares_gpu)
    engine = VllmEngine(backend, published, replace(vlm, world=world), chat)
    engine.sample([], chat.sampling(max_new_tokens=4))
    assert seen.events == ["published", *(FREED if shares_gpu else []), "gathered", "each", "each"]


@pytest.mark.parametrize("shares_gpu", [True, False])
def test_memory_is_given_back_before_weights_are_sent_to_a_server_on_the_same_gpu(
    vlm: Vlm, chat: Chat, monkeypatch: pytest.MonkeyPatch, shares_gpu: bool
) -> None:
    seen = Recorder(monkeypatch)
    published = SimpleNamespace(newest=object(), announce=seen.note("announced", object()))
    transfer = SimpleNamespace(send=seen.note("sent"))
    backend = SimpleNamespace(shares_gpu=shares_gpu)
    VllmEngine(backend, published, vlm, chat, transfer=transfer).sync()
    assert seen.events == [*(FREED if shares_gpu else []), "announced", "sent"]


@pytest.mark.parametrize(
    ("shared", "words"),
    [
        (True, ["rollout.engine=vllm_colocated"]),
        (True, ["rollout.engine=vllm_server"]),
        (True, ["rollout.engine=vllm_server", "rollout.servers=2", 'rollout.devices=["7", "4, 6"]']),
        (False, ["rollout.engine=vllm_server", 'rollout.devices=["5"]']),
        (False, ["rollout.engine=vllm_server", 'rollout.urls=["http://127.0.0.1:8000"]']),
    ],
)
def test_a_rank_knows_whether_a_server_starts_on_its_gpu(
    vlm: Vlm, monkeypatch: pytest.MonkeyPatch, shared: bool, words: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    needs = engine_needs(load_recipe("quickstart", words).recipe)
    launch = needs.launch(on_gpus(vlm, 0, 4))
    assert Fleet(needs.settings, logs=Path(), launch=launch).shares_gpu == shared
    assert not needs.launch(vlm).shares_gpu, "there is no GPU"


def test_a_model_that_is_only_read_is_served_as_it_lies(
    tmp_path: Path, program: Path, random_model_folder: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, logs = tmp_path / "models" / "mine", tmp_path / "logs"
    shutil.copytree(random_model_folder, folder)
    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", None)  # no weights here
    settings = EngineSettings(
        engine="vllm_server", executable=str(program), tensor_parallel=4, health_limit_s=1
    )
    how = Sampling(max_new_tokens=9, n=2)
    with open_sampler(str(folder), how, settings=settings, rows=5, logs=logs) as sampler:
        problems = [make_problem("short", sizes=()), make_problem("long", "why " * 9000, sizes=())]
        found = {
            s.key: s for s in sampler.samples([Request.of(p, index=i) for p in problems for i in (0, 1)])
        }
        assert {key for key, sample in found.items() if sample.error} == {("long", 0, 0), ("long", 1, 0)}
        mine = chat.text([ord(letter) for letter in "mine"])
        assert [found["short", i, 0].text for i in (0, 1)] == [mine, mine], "no other weights"
        assert isinstance(sampler, EngineSampler) and sampler.batch_size == 2 * 5
        (started,) = [json.loads(path.read_text()) for path in tmp_path.glob("started-*.json")]
        assert alive(started["pid"])
    assert not alive(started["pid"])
    words = started["argv"][1:]
    pairs = dict(itertools.pairwise(words))
    assert words[:2] == ["serve", str(folder)] and pairs["--tensor-parallel-size"] == "4"
    context = json.loads((folder / "config.json").read_text())["text_config"]["max_position_embeddings"]
    assert int(pairs["--max-model-len"]) == context and pairs["--dtype"] == "float32"
    assert [path.name for path in logs.iterdir()] == ["vllm-0.log"]


@pytest.mark.parametrize("words", [("--max-model-len", "70"), ("--seed", "1", "--max-model-len=70")])
def test_what_a_server_has_no_room_for_is_left_out_and_stops_nothing(
    words: tuple[str, ...], tmp_path: Path, program: Path, random_model_folder: Path
) -> None:
    folder = tmp_path / "models" / "mine"
    shutil.copytree(random_model_folder, folder)
    (tmp_path / "behaviour.json").write_text('{"room": 70}')
    settings = EngineSettings(engine="vllm_server", executable=str(program), arguments=words)
    how = Sampling(max_new_tokens=9)
    with open_sampler(str(folder), how, settings=settings, logs=tmp_path / "logs") as sampler:
        problems = [make_problem("short", "Why?", sizes=()), make_problem("long", "why " * 30, sizes=())]
        found = {sample.id: sample for sample in sampler.samples(map(Request.of, problems))}
        assert "the limit is 61" in found["long"].error and not found["long"].retryable
        assert found["short"].tokens and not found["short"].error


class Distant:
    """A local engine whose logprobs are off by a constant, like those of other kernels."""

    def __init__(self, vlm: Vlm, chat: Chat, distance: float) -> None:
        self.local, self.distance = LocalEngine(vlm, chat, max_rows=16), distance

    def sync(self) -> None:
        pass

    rest = sync

    def sample(self, prompts, sampling, *, step=0, on_group=None):
        groups = self.local.sample(prompts, sampling, step=step)
        return [
            tuple(replace(r, logprobs=tuple(x - self.distance for x in r.logprobs)) for r in group)
            for group in groups
        ]


@pytest.mark.parametrize(("distance", "warned"), [(0.05, False), (0.3, True)])
def test_the_gap_is_logged_and_corrected_and_alarms(
    tmp_path: Path, vlm: Vlm, chat: Chat, caplog: pytest.LogCaptureFixture, distance: float, warned: bool
) -> None:
    settings = Grpo.model_validate(
        {"steps": 1, "prompts_per_step": 2, "group_size": 3, "max_new_tokens": 6, "optimizer_steps": 1}
    )
    context = GrpoContext(
        vlm=vlm,
        reference=None,
        chat=chat,
        engine=Distant(vlm, chat, distance),
        grader=LengthGrader(),
        importance_cap=1.2,
    )
    problems = [make_problem(f"p{k}", sizes=()) for k in range(2)]
    with StopFlag() as stop, screen("grpo", 1, quiet=True) as view:
        stage = RunDir(tmp_path, name="grpo", seed=3, settings=settings, recipe_hash="h")
        grpo.train(context, problems, settings, run=stage, screen=view, stop=stop)
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert row["sampler_gap"] == pytest.approx(distance, abs=1e-3)
    assert row["sampler_gap_max"] == pytest.approx(distance, abs=2e-3)
    assert row["importance"] == pytest.approx(min(math.exp(distance), 1.2), abs=1e-3)
    assert ("nats" in caplog.text or "sampler" in caplog.text) == warned


def test_the_table_says_who_samples() -> None:
    words = ["rollout.engine=vllm_server", "rollout.importance_cap=1.5", "rollout.urls=[http://a:1]"]
    row = dict(summary_rows(load_recipe("quickstart", words).recipe))["rollouts"]
    assert row == "vLLM, http://a:1; its logprobs against the policy's: token weights up to 1.5"
    assert "rollouts" not in dict(summary_rows(load_recipe("quickstart", []).recipe))
    words = ["teacher.model=m", "teacher.rollout.engine=vllm_server"]
    row = dict(summary_rows(load_recipe("quickstart", words).recipe))["cold-start teacher"]
    assert row.startswith("m by vLLM, temperature")
    with pytest.raises(RecipeError, match="of kind local, and this one is builtin"):
        load_recipe("quickstart", words[1:])


def test_local_rollouts_are_never_weighted() -> None:
    assert Rollouts().cap is None and Rollouts(engine="vllm_colocated").cap == 2.0
    assert Rollouts(engine="vllm_server", importance_cap=None).cap is None


def test_what_servers_saw_is_read_from_each_that_is_well(run) -> None:
    """Servers of ours are started for it; one that dies is left out."""
    made = run(servers=2)
    made.behave(die_after=2)
    prompts = [made.chat.prompt(make_problem(f"p{k}", sizes=())) for k in range(3)]
    views = made.engine.inspect(prompts, made.chat.sampling(max_new_tokens=8), candidates=4)
    assert len(views) == 1 and views[0].precision == "float32"
    assert [seen.prompt_ids for seen in views[0].prompts] == [prompt.ids for prompt in prompts]
    views = made.engine.inspect(prompts, made.chat.sampling(max_new_tokens=8), candidates=4)
    assert [view.name[:13] for view in views] == ["vLLM server 0", "vLLM server 1"]
    assert all(len(seen.candidates) == len(seen.ids) > 0 for view in views for seen in view.prompts)


@pytest.mark.fault("limits", "a vLLM server stopped for more than its health limit", "goes on; no restart")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the time that passes counts")
def test_a_server_that_is_kept_from_working_is_not_restarted(run) -> None:
    one = run(concurrency=2, health_limit_s=1.0)
    one.behave(slow=0.3)
    one.ask(1)
    pid, ended = one.started[0]["pid"], threading.Event()

    def starve() -> None:
        while not ended.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(1.2)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.3)

    thread = threading.Thread(target=starve)
    thread.start()
    try:
        one.ask(12)
    finally:
        ended.set()
        thread.join()
    assert len(one.started) == 1
