"""Processes that share a run on CPUs: when there are several, what they compute, and how they end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import distributed_worker
import warm
from conftest import draw
from rlcs.cores import OWN, STARTED, Cores, thread_settings
from rlcs.distributed import ALONE
from rlcs.model.checkpoints import complete
from rlcs.pipeline import processes
from rlcs.pipeline.processes import may_have_gpus, number_of
from rlcs.recipe.loading import load_recipe
from rlcs.storage import read_json, read_jsonl
from test_distributed import JOBS, STUDY, assert_same, environment, free_port, run_on

FOUR = Cores(machine=4, allowed=4)
LIMIT_S = 300


# --- how many ---------------------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without GPUs, with 64 GiB of free memory."""
    monkeypatch.setattr(processes, "may_have_gpus", lambda _: False)
    memory = psutil.virtual_memory()._replace(available=64 << 30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)


def count_of(*words: str, recipe: str = "quickstart", cores: Cores = FOUR, **variables: str) -> int:
    return number_of(load_recipe(recipe, [*words]).recipe, cores, variables)


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 8)


def test_a_small_model_has_a_process_for_each_core(free, monkeypatch):
    assert count_of() == 4
    assert count_of(cores=Cores(machine=8, allowed=8, quota=1.5)) == 2
    assert count_of(cores=Cores(machine=1, allowed=1)) == 1
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 64)
    assert count_of(cores=Cores(machine=64, allowed=64)) == 8
    assert count_of("sft.batch_size=3", cores=Cores(machine=64, allowed=64)) == 3
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 2)
    assert count_of() == 2, "two threads on one core are no faster"


def test_the_threads_that_a_quota_sets_are_not_the_user_s(free):
    """`rlcs` sets their number before the run begins."""
    cores = Cores(machine=8, allowed=8, quota=2.0)
    assert count_of(cores=cores, **thread_settings(cores, {})) == 2
    shared = processes.environment(2, cores, thread_settings(cores, {}), meeting="x")
    assert shared["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in processes.environment(2, cores, {"OMP_NUM_THREADS": "3"}, meeting="x")


@pytest.mark.parametrize(
    "words",
    [
        ["rollout.engine=vllm_server"],
        ["parallel.compute_dtype=bfloat16"],
        ["lora.rank=4", "lora.four_bit=true"],
        ["grpo.also.distill=1", "grpo.also.arms=[sft_grpo]", "grpo.teacher.model=builtin"],
        ["model.name=Qwen/Qwen2.5-VL-3B-Instruct"],
        ["model.name=runs/nowhere"],
    ],
    ids=lambda words: words[-1],
)
def test_one_process_where_others_gain_nothing_or_are_not_known_to_fit(free, words):
    assert count_of(*words) == 1


def test_what_the_user_and_torchrun_decide_counts_more(free):
    assert count_of(OMP_NUM_THREADS="2") == 1
    assert count_of("parallel.processes=3", OMP_NUM_THREADS="2") == 3
    assert count_of("parallel.processes=1") == 1
    assert count_of("parallel.processes=3", TORCHELASTIC_RUN_ID="x") == 1


def test_one_where_it_was_not_tried(free, monkeypatch):
    monkeypatch.setattr(processes.sys, "platform", "darwin")
    assert count_of() == 1 and count_of("parallel.processes=2") == 2


def test_no_more_than_fit_into_memory(free, monkeypatch):
    memory = psutil.virtual_memory()._replace(available=7 << 30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert count_of() == 2
    memory = memory._replace(available=1 << 30)
    assert count_of() == 1


def test_a_large_model_has_one(free, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for size, count in ((processes.LARGEST_WEIGHTS, 4), (processes.LARGEST_WEIGHTS + 1, 1)):
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.truncate(size)
        assert count_of(f"model.name={tmp_path}") == count


@pytest.mark.parametrize(
    ("device", "visible", "found"),
    [("nvidia0", None, True), ("nvidia0", "", False), ("nvidia0", "-1", False), ("nvidia0", "0", True),
     ("kfd", None, True), ("dxg", None, True), ("nvidiactl", None, False), ("tty", None, False)],
)  # fmt: skip
def test_gpus_are_found_without_torch(tmp_path, device, visible, found):
    (tmp_path / device).touch()
    given = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert may_have_gpus(given, tmp_path) == found


# --- what they compute ------------------------------------------------------------------------------


COPIED = ("paper", "kept", "held", "adapters", "frozen")
"""Jobs that two ranks do with a copy of the model each; the first one is also stopped and continued."""


@pytest.fixture(scope="module")
def by_copies(random_model_folder, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("copies")
    base = {"model": str(random_model_folder), "parallel": {"shard_size": 1}}
    jobs = [base | JOBS[name] | {"folder": str(root / name)} for name in COPIED]
    resumed = jobs[0] | {"folder": str(root / "resumed")}
    run_on(2, [*jobs, resumed | {"stop_at": 1}, resumed], root / "jobs.json")
    return root


@pytest.mark.parametrize("name", COPIED)
def test_two_copies_compute_what_one_process_computes(by_copies, random_model_folder, tmp_path, name):
    distributed_worker.train(
        {"model": str(random_model_folder), "folder": str(tmp_path), **JOBS[name]}, ALONE
    )
    assert_same(tmp_path, by_copies / name)


def test_stopped_copies_go_on_and_the_first_one_saves(by_copies):
    assert "after step 1 of" in (by_copies / "resumed" / "stopped-1").read_text()
    assert_same(by_copies / COPIED[0], by_copies / "resumed")
    for folder in complete(by_copies / COPIED[0] / "checkpoints").values():
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert files == ["model.safetensors", "optimizer.safetensors"]


MEANS = """
import sys
import torch
from rlcs.distributed import join_world
from rlcs.model import copies

copies._AVERAGED_AT_ONCE = 5  # so that there are several exchanges
with join_world(timeout_s=60, shard_size=1) as world:
    parameters = [torch.zeros(size, requires_grad=True) for size in ((2, 2), (3,), (4,), (9,))]
    for index, parameter in enumerate(parameters[:3]):
        if index != 1 or world.rank == 1:
            parameter.grad = torch.full_like(parameter, 10.0 * index + world.rank)
    copies.mean_gradients(parameters, world)
    print([None if p.grad is None else [tuple(p.grad.shape), *p.grad.unique().tolist()] for p in parameters])
"""


def test_gradients_are_averaged_also_where_a_rank_has_none(tmp_path):
    port = free_port()
    ranks = [
        warm.Popen([sys.executable, "-c", MEANS], env=environment(rank, 2, port), stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=LIMIT_S)[0].decode() for rank in ranks]
    assert said == ["[[(2, 2), 0.5], [(3,), 5.5], [(4,), 20.5], None]\n"] * 2


# --- the command ------------------------------------------------------------------------------------


@contextmanager
def begun(folder: Path, *words: str, count: int = 2) -> Iterator["subprocess.Popen[str]"]:
    """`rlcs run` by some processes, in a group of processes of its own."""
    number = f"parallel.processes={count}"
    words = ("run", "quickstart", "--out", str(folder), "--quiet", *STUDY, number, *words)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "rlcs", *words],
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for child in [*psutil.Process(process.pid).children()] if process.poll() is None else []:
            child.kill()
        process.kill()
        process.communicate()


def trains(process: "subprocess.Popen[str]", folder: Path) -> None:
    """Wait until a run has taken a step of RL."""
    end = time.monotonic() + LIMIT_S
    while not (folder / "sft_grpo" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < end, "it ended, or does not come so far"
        time.sleep(0.1)


def other_rank(process: "subprocess.Popen[str]") -> psutil.Process:
    """The process of rank 1."""
    [rank] = [
        child
        for child in psutil.Process(process.pid).children()
        if child.environ().get("RANK") == "1" and child.environ().get(STARTED) == OWN
    ]
    return rank


@pytest.mark.fault("kills", "a signal to a run by two processes", "both stop; it goes on, with three too")
def test_a_run_by_two_processes_is_stopped_and_finished_by_three(tmp_path):
    """The signal comes to the process that the user started, as from `kill`."""
    run = tmp_path / "run"
    with begun(run) as process:
        trains(process, run)
        rank = other_rank(process)
        process.send_signal(signal.SIGTERM)
        said, error = process.communicate(timeout=LIMIT_S)
        rank.wait(30)
    assert process.returncode == 130, error
    assert error.count("stopped as asked") == 1 and "the same command continues" in error
    assert re.search(r"processes +2, with \d+ threads? each", said)
    with begun(run, "--json", count=3) as process:
        said, error = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, error
    assert said.count('"summary"') == 1 and error.count("preflight: GPUs") == 1, "one of them speaks"
    steps = [row["step"] for row in read_jsonl(run / "sft_grpo" / "metrics.jsonl")]
    assert steps == list(range(1, 31)), "none is taken twice"
    assert read_json(run / "summary.json")["arms"]["sft_grpo"]["n"] == 20


@pytest.mark.fault("kills", "one of two processes of a run is killed", "the other one ends")
@pytest.mark.parametrize("killed", ["the first", "the second"])
def test_where_one_is_killed_the_other_ends(tmp_path, killed):
    with begun(tmp_path / "run", "grpo.steps=3000") as process:
        trains(process, tmp_path / "run")
        rank = other_rank(process)
        (psutil.Process(process.pid) if killed == "the first" else rank).kill()
        _, error = process.communicate(timeout=90)
        rank.wait(60)
    assert process.returncode == (-signal.SIGKILL if killed == "the first" else 1)
    if killed == "the second":
        assert "rank 0 lost the others" in error or "rank 1 of this run" in error
        assert "the same command continues" in error


def test_a_mistake_is_told_once_and_at_once(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"question": "How many?"}) + "\n")
    with begun(tmp_path / "run", f"data.rl={bad}") as process:
        started = time.monotonic()
        _, error = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2 and "bad.jsonl" in error
    assert error.count("rlcs: ") == 1 and "(rank 1)" not in error
    assert time.monotonic() - started < 25


ALONE_FAILS = """
import os
if os.environ.get("RANK") == "1":
    import rlcs.distributed
    from rlcs.errors import UserError
    def join_world(**_):
        raise UserError("this rank has a fault of its own", where="here")
    rlcs.distributed.join_world = join_world
"""


@pytest.mark.fault(
    "limits", "one of two processes fails before they meet", "its reason is told; the other ends"
)
def test_the_reason_of_one_that_fails_alone_is_told(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(ALONE_FAILS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with begun(tmp_path / "run") as process:
        _, error = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert "rlcs (rank 1): here: this rank has a fault of its own" in error
    assert "rank 1 of this run ended with exit code 2" in error and "continues" in error


@pytest.mark.fault("kills", "one of two processes is killed before they meet", "the other one ends at once")
def test_one_that_is_killed_before_they_meet_is_noticed_at_once(tmp_path):
    with begun(tmp_path / "run") as process:
        while not psutil.Process(process.pid).children():
            assert process.poll() is None
            time.sleep(0.01)
        other_rank(process).kill()
        killed = time.monotonic()
        _, error = process.communicate(timeout=LIMIT_S)
    assert time.monotonic() - killed < 10
    assert process.returncode == 1 and "rank 1 of this run was killed by signal 9" in error


def test_a_folder_of_others_is_refused_before_images_are_written_there(tmp_path):
    other, rows = tmp_path / "other", tmp_path / "rows.parquet"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    image = {"bytes": draw(30, 30).data, "path": None}
    table = pa.table({"question": ["How many?"] * 3, "answer": ["1"] * 3, "images": [[image]] * 3})
    pq.write_table(table, rows)
    with begun(other, f"data.rl={rows}") as process:
        _, error = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2 and "holds no run" in error
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


def test_a_dry_run_tries_what_a_run_does(tmp_path):
    with begun(tmp_path / "run", "--dry-run") as process:
        said, error = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, error
    assert re.search(r"processes +2, with \d+ threads? each", said) and said.count("checks passed") == 1
    assert not (tmp_path / "run").exists()
