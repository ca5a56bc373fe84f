"""GRPO that learns from groups as they arrive: equal to the step that waits for all, and faster."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import distributed_worker
from rlcs.distributed import ALONE
from rlcs.storage import read_jsonl
from rlcs.train import checkpoint
from test_distributed import LIMIT_S, RATE, assert_same, launch, rows, run_on, wait_for

FAKE = Path(__file__).parent / "fake_vllm.py"
GRPO = {
    "steps": 2,
    "prompts_per_step": 12,
    "group_size": 4,
    "max_new_tokens": 24,
    "pack_tokens": 300,
    "save_every": 50,
    "optimizer": {"lr": 0.0},
}
PAPER = {"optimizer_steps": 4, "kl": {"kind": "k3", "coefficient": 0.01}, "old_logprobs": "policy"}
SHARES = {"optimizer_steps": 3}
DAPO = {"dynamic_sampling": 2, "optimizer_steps": 2, "advantage": "rloo"}
KINDS = {"plain": {}, "paper": PAPER, "shares": SHARES, "dapo": DAPO}
SLOW = {"varied": True, "slow": 0.05, "tail": [4, 1.5]}


@pytest.fixture(scope="module")
def base(random_model_folder, tmp_path_factory) -> dict:
    program = tmp_path_factory.mktemp("program") / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    program.chmod(0o755)
    rollout = {"executable": str(program), "servers": 2, "concurrency": 2, "health_limit_s": 5}
    return {
        "model": str(random_model_folder),
        "rollout": rollout,
        "behaviour": SLOW,
        "problems": 40,
        "cap": 2.0,
        "keep_gradients": True,
    }


def job(base: dict, folder: Path, **more) -> dict:
    grpo = GRPO | more.pop("grpo", {})
    return base | {"folder": str(folder), "grpo": grpo} | more


@pytest.fixture(scope="module")
def pair(base, tmp_path_factory) -> Path:
    """Two ranks: every kind with and without overlap, and once with a server that is killed."""
    root = tmp_path_factory.mktemp("pair")
    jobs = [
        job(base, root / f"{name}-{overlap}", grpo=kind, overlap=overlap)
        for name, kind in KINDS.items()
        for overlap in ("none", "on_policy")
    ]
    killed = {"behaviour": SLOW | {"die_after": 5}, "overlap": "on_policy"}
    jobs.append(job(base, root / "killed", **killed))
    run_on(2, jobs, root / "jobs.json")
    return root


def assert_same_gradients(one: Path, other: Path) -> float:
    """The gradient of every optimiser step agrees to 1e-6, as a whole; returns the largest difference."""
    first, second = (torch.load(folder / "gradients.pt") for folder in (one, other))
    assert len(first) == len(second) > 0
    gaps = [((a - b).norm() / a.norm()).item() for a, b in zip(first, second, strict=True)]
    print(one.name, other.name, gaps)
    assert max(gaps) < 1e-6 and all(gradient.abs().max() > 0 for gradient in first)
    return max(gaps)


def assert_same_rollouts(one: Path, other: Path) -> None:
    for path in (one / "rollouts").glob("step-*.jsonl"):
        assert path.read_text() == (other / "rollouts" / path.name).read_text()


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_is_that_of_a_step_that_waits_for_all(pair, name):
    waits, overlaps = pair / f"{name}-none", pair / f"{name}-on_policy"
    assert_same_gradients(waits, overlaps)
    assert_same_rollouts(waits, overlaps)
    for row, twin in zip(rows(waits), rows(overlaps), strict=True):
        assert row.keys() == twin.keys()
        for key, value in row.items():
            assert twin[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6))


def test_a_killed_server_changes_nothing_and_nothing_is_learnt_twice(pair):
    assert len(list((pair / "killed" / "rollout").glob("started-*.json"))) == 3
    assert_same_gradients(pair / "plain-none", pair / "killed")
    assert_same_rollouts(pair / "plain-none", pair / "killed")


def seconds(folder: Path) -> dict[str, float]:
    """Seconds by phase, of the steps after the first (in which servers start)."""
    steps = read_jsonl(folder / "metrics.jsonl")[1:]
    return {name: sum(row["seconds"][name] for row in steps) for name in steps[0]["seconds"]}


def test_a_step_takes_less_time(pair):
    """Waiting hides behind learning: with as many optimiser steps as shares, too."""
    for name in KINDS:
        waits, overlaps = (seconds(pair / f"{name}-{how}") for how in ("none", "on_policy"))
        print(name, waits, overlaps, sum(overlaps.values()) / sum(waits.values()))
        assert sum(overlaps.values()) < sum(waits.values())
        assert overlaps["rollout"] < waits["rollout"]


def test_four_ranks_learn_what_two_do(base, pair, tmp_path):
    jobs = [job(base, tmp_path / name, grpo=KINDS[name], overlap="on_policy") for name in ("plain", "paper")]
    run_on(4, jobs, tmp_path / "jobs.json")
    for name in ("plain", "paper"):
        assert_same_gradients(pair / f"{name}-none", tmp_path / name)
        assert_same_rollouts(pair / f"{name}-none", tmp_path / name)
