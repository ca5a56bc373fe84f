"""Many real processes over gloo: what 2 and 4 ranks compute is what one computes, and no rank hangs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import distributed_worker
from rlcs import checkpoint
from rlcs.mesh import ALONE
from rlcs.packing import balanced
from rlcs.records import Tree
from rlcs.shares import guessed_tokens, idle_tree, packs_in_step

WORKER = Path(distributed_worker.__file__)
LIMIT_S = 300
RATE = 1e-3
SFT = {"batch_size": 4, "epochs": 2, "save_every": 2, "pack_tokens": 300, "optimizer": {"lr": RATE}}
GRPO = {
    "steps": 3,
    "prompts_per_step": 5,
    "group_size": 3,
    "max_new_tokens": 8,
    "save_every": 2,
    "pack_tokens": 300,
    "optimizer": {"lr": RATE},
}
PAPER = {"optimizer_steps": 2, "kl": {"kind": "k3", "coefficient": 0.01}, "old_logprobs": "policy"}
DAPO = {"dynamic_sampling": 1, "advantage": "rloo", "loss_average": "micro_batch", "pack_tokens": 1}
JOBS = {
    "sft": {"sft": SFT},
    "frozen": {"sft": SFT | {"epochs": 1, "freeze": ["vision_tower"], "loss_average": "example"}},
    "plain": {"grpo": GRPO},
    "paper": {"grpo": GRPO | PAPER},
    "dapo": {"grpo": GRPO | DAPO},
}


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    own |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": 1}
    return os.environ | {key: str(value) for key, value in own.items()}


def launch(size: int, path: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), str(path)],
            env=environment(rank, size, port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def run_on(size: int, jobs: list[dict], path: Path) -> None:
    path.write_text(json.dumps(jobs))
    ranks = launch(size, path)
    errors = [rank.communicate(timeout=LIMIT_S)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(errors)


@pytest.fixture(scope="module")
def alone(random_model_folder, tmp_path_factory) -> Path:
    """Every job by one process."""
    root = tmp_path_factory.mktemp("alone")
    for name, job in JOBS.items():
        (root / name).mkdir()
        distributed_worker.train(
            {"model": str(random_model_folder), "folder": str(root / name), **job}, ALONE
        )
    return root


@pytest.fixture(scope="module")
def pair(random_model_folder, tmp_path_factory) -> Path:
    """Every job by two ranks; and once more, stopped by a signal to rank 1 alone."""
    root = tmp_path_factory.mktemp("pair")
    base = {"model": str(random_model_folder)}
    jobs = [base | {"folder": str(root / name)} | job for name, job in JOBS.items()]
    jobs[0] |= {"gradient_checkpointing": True, "parallel": {"reshard_after_forward": False}}
    for name, step in (("sft", 3), ("paper", 1)):
        jobs.append(base | {"folder": str(root / f"{name}-stopped"), "stop_at": step} | JOBS[name])
    run_on(2, jobs, root / "jobs.json")
    return root


def assert_same(first: Path, second: Path) -> None:
    """Weights and metrics agree but for rounding, which Adam makes visible where a gradient is near zero."""
    one, other = torch.load(first / "weights.pt"), torch.load(second / "weights.pt")
    assert one.keys() == other.keys()
    for name, weight in one.items():
        gap = (other[name] - weight).abs()
        assert gap.max() <= 2 * RATE and (gap > 0.02 * RATE).float().mean() <= 2e-3, (name, gap.max())
    for row, twin in zip(rows(first), rows(second), strict=True):
        assert row.keys() == twin.keys()
        for key, value in row.items():
            near = value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)
            assert twin[key] == near, (row["step"], key)


def rows(folder: Path) -> list[dict]:
    """Metrics without times, and without the tokens, to which idle prompts add."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    times = ("seconds", "tokens_per_s", "tokens")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_compute_what_one_computes(alone, pair, name):
    assert_same(alone / name, pair / name)
    if (alone / name / "rollouts").exists():
        for path in (alone / name / "rollouts").iterdir():
            mine, theirs = path.read_text(), (pair / name / "rollouts" / path.name).read_text()
            assert [json.loads(x)["text"] for x in mine.splitlines()] == [
                json.loads(x)["text"] for x in theirs.splitlines()
            ]


def test_the_trained_model_is_a_hugging_face_folder(pair):
    from safetensors.torch import load_file

    weights = torch.load(pair / "sft" / "weights.pt")
    saved = load_file(pair / "sft" / "final" / "model.safetensors")
    assert set(weights) - set(saved) == {"lm_head.weight"}  # tied
    for name, weight in saved.items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize(("name", "step"), [("sft", 3), ("paper", 1)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(pair, name, step):
    folder = pair / f"{name}-stopped"
    for rank in range(2):
        assert f"after step {step} of" in (folder / f"stopped-{rank}").read_text()
    assert checkpoint.saved_steps(folder / "checkpoints")[-1] == step
    saved = folder / "checkpoints" / f"step-{step:06d}"
    assert (saved / "model.safetensors").stat().st_size < 0.6 * (
        pair / "sft/final/model.safetensors"
    ).stat().st_size
    assert (saved / "model-1.safetensors").is_file() and (saved / "optimizer-1.safetensors").is_file()


@pytest.mark.parametrize("size", [1, 4])
def test_saved_by_two_ranks_and_continued_by_another_number(alone, pair, random_model_folder, tmp_path, size):
    jobs = []
    for name in ("sft", "paper"):
        shutil.copytree(pair / f"{name}-stopped", tmp_path / name)
        jobs.append({"model": str(random_model_folder), "folder": str(tmp_path / name)} | JOBS[name])
    if size == 1:
        for job in jobs:
            distributed_worker.train(job, ALONE)
    else:
        run_on(size, jobs, tmp_path / "jobs.json")
    for name in ("sft", "paper"):
        assert_same(alone / name, tmp_path / name)


def test_a_killed_rank_takes_the_others_along(random_model_folder, tmp_path):
    job = {"model": str(random_model_folder), "folder": str(tmp_path / "run")}
    (tmp_path / "jobs.json").write_text(json.dumps([job | {"sft": SFT | {"epochs": 500}}]))
    ranks = launch(2, tmp_path / "jobs.json")
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        started = time.monotonic()
        while not metrics.exists() and time.monotonic() - started < LIMIT_S:
            time.sleep(0.2)
        ranks[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, error = ranks[0].communicate(timeout=120)
        assert time.monotonic() - killed < 60 and ranks[0].returncode not in (0, None)
        assert "rank 0 lost the others" in error and "continues from the last checkpoint" in error
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


# --- shares --------------------------------------------------------------------------------------


def test_shares_are_balanced_and_complete():
    sizes = [7, 1, 5, 5, 3, 9, 2]
    shares = balanced(sizes, 3)
    assert sorted(i for share in shares for i in share) == list(range(7))
    sums = [sum(sizes[i] for i in share) for share in shares]
    assert max(sums) - min(sums) <= 2 and all(share == sorted(share) for share in shares)
    assert balanced(sizes, 1) == [list(range(7))] and balanced([4], 3) == [[0], [], []]


def test_a_guess_of_tokens_is_near_the_truth(chat):
    guessed = real = 0
    for demonstration in distributed_worker.demonstrations(12):
        guessed += guessed_tokens(demonstration.problem, demonstration.response)
        real += len(chat.prompt(demonstration.problem).ids) + len(chat.response_ids(demonstration.response))
    assert 0.3 < guessed / real < 3


class OtherRank:
    """A mesh in which another rank has `flags`: packs with images or without."""

    def __init__(self, flags):
        self._flags = flags

    def gather(self, own):
        return [own, self._flags]


def test_packs_of_a_rank_fall_in_step_with_the_others(chat):
    text = Tree(prompt=idle_tree(chat, image=False).prompt, branches=())
    packs = packs_in_step([text], chat, budget=10_000, mesh=OtherRank([True, False, False]))
    assert [pack.grids is not None for pack in packs] == [True, False, False]
    assert [len(pack.layout.trees) for pack in packs] == [2, 1, 1]
    assert [len(packs_in_step([text], chat, budget=9, mesh=OtherRank([])))] == [1]
