"""GRPO that learns from groups as they arrive: equal to the step that waits for all."""

import json
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from conftest import LengthGrader
from distributed_worker import demonstrations, mixed_problems
from rlcs.engines.arrivals import Arrivals
from rlcs.engines.local import LocalEngine
from rlcs.errors import OutOfMemory, TrainingError
from rlcs.model import loading
from rlcs.progress import screen
from rlcs.recipe.schema import Model
from rlcs.recipe.stages import Grpo
from rlcs.signals import StopFlag, Stopped
from rlcs.storage import read_json, read_jsonl
from rlcs.train import checkpoint, grpo
from rlcs.train.context import GrpoContext
from rlcs.train.local_teacher import LocalTeacher
from rlcs.train.run_dir import RunDir
from rlcs.train.trainer import Trainer
from rlcs.train.validation import Validation
from test_distributed import LIMIT_S, RATE, assert_same, launch, rows, run_on, wait_for
from test_vllm_engine import alive

FAKE = Path(__file__).parent / "fake_vllm.py"
GRPO = {
    "steps": 2,
    "prompts_per_step": 12,
    "group_size": 6,
    "max_new_tokens": 24,
    "pack_tokens": 300,
    "save_every": 50,
    "optimizer": {"lr": 0.0},
}
PAPER = {"optimizer_steps": 4, "kl": {"kind": "k3", "coefficient": 0.01}, "old_logprobs": "policy"}
SHARES = {"optimizer_steps": 3}
DAPO = {"dynamic_sampling": 2, "optimizer_steps": 2, "advantage": "rloo"}
MIXED = {
    "optimizer_steps": 2,
    "loss_average": "sequence",
    "also": {"reward": [1, 0.5], "sft": 0.3, "distill": 0.7, "sft_batch_size": 4},
    "teacher": {"model": "other"},
}
CLIP_COV = {"control": "clip_cov", "share": 0.2, "bounds": [0.01, 50]}
HELD = {"steps": 1, "optimizer_steps": 2, "entropy": CLIP_COV}
KINDS = {"plain": {}, "paper": PAPER, "shares": SHARES, "dapo": DAPO, "held": HELD, "mixed": MIXED}
SLOW = {"varied": True, "slow": 0.05, "tail": [4, 0.4]}


@pytest.fixture(scope="module")
def base(random_model_folder, other_model_folder, tmp_path_factory) -> dict:
    program = tmp_path_factory.mktemp("program") / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    program.chmod(0o755)
    rollout = {"executable": str(program), "servers": 2, "concurrency": 8, "health_limit_s": 5}
    return {
        "model": str(random_model_folder),
        "teacher": str(other_model_folder),
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
    moving = {"optimizer": {"lr": RATE}, "steps": 1}
    jobs += [
        job(base, root / f"{name}-moving-{overlap}", grpo=KINDS[name] | moving, overlap=overlap)
        for name in ("paper", "shares")
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
            assert twin[key] == (
                value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)
            )


@pytest.mark.parametrize("name", ["paper", "shares"])
def test_the_weights_move_as_in_a_step_that_waits(pair, name):
    """In several optimiser steps: nothing is computed by weights that were changed too early."""
    assert_same(pair / f"{name}-moving-none", pair / f"{name}-moving-on_policy")


@pytest.mark.fault(
    "engines", "a server killed while groups are learnt from", "the same gradients, nothing twice"
)
def test_a_killed_server_changes_nothing_and_nothing_is_learnt_twice(pair):
    assert len(list((pair / "killed" / "rollout").glob("started-*.json"))) == 3
    assert_same_gradients(pair / "plain-none", pair / "killed")
    assert_same_rollouts(pair / "plain-none", pair / "killed")


def test_four_ranks_learn_what_two_do(base, pair, tmp_path):
    names = ("plain", "paper", "mixed")
    jobs = [job(base, tmp_path / name, grpo=KINDS[name], overlap="on_policy") for name in names]
    run_on(4, jobs, tmp_path / "jobs.json")
    for name in names:
        assert_same_gradients(pair / f"{name}-none", tmp_path / name)
        assert_same_rollouts(pair / f"{name}-none", tmp_path / name)


@pytest.mark.parametrize("how", ["killed", "refused", "signal"])
def test_what_ends_one_rank_or_the_sampling_ends_all(base, tmp_path, how):
    """In bounded time, with a sentence, and with no server left behind."""
    slow = {"varied": True, "slow": 600.0, "tail": [2, 0.05]} if how != "refused" else {"refuse": True}
    one = job(base, tmp_path / "run", behaviour=slow, overlap="on_policy", timeout_s=20)
    one |= {"stop_after_s": 10} if how == "signal" else {}
    (tmp_path / "jobs.json").write_text(json.dumps([one]))
    ranks = launch(2, tmp_path / "jobs.json")
    try:
        if how == "killed":
            wait_for(tmp_path / "run" / "rollout" / "weights")
            time.sleep(8)
            ranks[1].send_signal(signal.SIGKILL)
        started = time.monotonic()
        errors = [rank.communicate(timeout=LIMIT_S)[1] for rank in ranks]
        assert time.monotonic() - started < 300  # answers take 600
        assert all(bool(rank.returncode) == (how != "signal") for rank in ranks), errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    if how == "killed":
        assert "rank 0 lost the others" in errors[0]
    elif how == "refused":
        assert all("it refuses a prompt: 400" in error for error in errors)
    else:
        assert all("in step 1 of 2" in (tmp_path / f"run/stopped-{rank}").read_text() for rank in range(2))
    pids = [read_json(path)["pid"] for path in (tmp_path / "run" / "rollout").glob("started-*.json")]
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)


# --- one process, with an engine whose rollouts arrive late and in any order -----------------------


class Scattered(LocalEngine):
    """Samples at once, by the weights of now, and hands the groups out from a thread, the last one first."""

    def __init__(self, vlm, chat, *, after=lambda step, count: None, order=reversed):
        super().__init__(vlm, chat, max_rows=32)
        self.after, self.order, self.started, self.synced = after, order, [], None

    def sync(self):
        super().sync()
        self.synced = next(self._vlm.model.parameters()).detach().clone()

    def start(self, prompts, sampling, *, step=0):
        groups = self.sample(prompts, sampling, step=step)
        assert torch.equal(self.synced, next(self._vlm.model.parameters())), "these weights were not sent"
        self.started.append((step, self.synced))

        def hand_out(arrived):
            for count, index in enumerate(self.order(range(len(prompts)))):
                self.after(step, count)
                arrived(index, groups[index])

        return Arrivals(hand_out, len(prompts), self._vlm.world)


SMALL = {
    "steps": 4,
    "prompts_per_step": 6,
    "group_size": 3,
    "max_new_tokens": 8,
    "pack_tokens": 150,
    "save_every": 50,
    "optimizer": {"lr": RATE},
}


def trained(model, folder, settings, overlap, *, after=None, measured=None, more=(), order=reversed):
    """The weights after a run, and its engine; `after(stop, step, count)` is called before each group.

    With `measured` the model is measured every second step, always with that row.
    """
    vlm = loading.load(Model(name=str(model)))
    chat = loading.make_chat(vlm)
    with StopFlag() as stop, screen("grpo", settings.steps, quiet=True) as view:
        engine = Scattered(vlm, chat, after=lambda *where: after and after(stop, *where), order=order)
        context = GrpoContext(
            vlm=vlm,
            reference=grpo.frozen_copy(vlm) if settings.kl.active else None,
            chat=chat,
            engine=engine,
            importance_cap=2.0,
            overlap=overlap,
            demonstrations=demonstrations(10),
            teacher=LocalTeacher(vlm=grpo.frozen_copy(vlm)) if settings.teacher.model else None,
            **({"grader": LengthGrader()} | dict(more)),
        )
        run = RunDir(folder, name="grpo", seed=3, settings=settings, recipe_hash="h")
        if measured is not None:
            run.validation = Validation(every=2, measure=lambda stop: engine.sync() or measured)
        grpo.train(context, mixed_problems(20), settings, run=run, screen=view, stop=stop)
    return dict(vlm.model.named_parameters()), engine


def assert_close(one, other):
    """But for rounding, which Adam makes visible where a gradient is near zero."""
    for name, weight in one.items():
        gap = (other[name] - weight).abs()
        assert gap.max() <= 8 * RATE and (gap > 0.1 * RATE).float().mean() <= 0.02, (name, gap.max())


def asked(folder: Path) -> dict[str, list[str]]:
    return {p.name: [row["id"] for row in read_jsonl(p)] for p in (folder / "rollouts").glob("step-*")}


@pytest.mark.parametrize("name", KINDS)
def test_learning_goes_on_while_the_last_group_is_sampled(random_model_folder, tmp_path, monkeypatch, name):
    """In every step the last group comes only when the policy has learnt from others."""
    settings = Grpo(**SMALL | KINDS[name] | {"optimizer": {"lr": 0.0}})
    learnt, add = threading.Event(), Trainer.add

    def learn(*args, **options):
        add(*args, **options)
        learnt.set()

    def wait_for_learning(stop, step, count):
        if count == 0:
            learnt.clear()
        if count == settings.prompts_per_step - 1 and not learnt.wait(60):
            raise TrainingError(f"step {step + 1} waits for its last group before it learns")

    monkeypatch.setattr(Trainer, "add", learn)
    trained(random_model_folder, tmp_path, settings, "on_policy", after=wait_for_learning, order=iter)


def test_one_step_off_is_one_step_off(random_model_folder, tmp_path):
    settings = Grpo(**SMALL)
    _, engine = trained(random_model_folder, tmp_path, settings, "one_step_off")
    assert [step for step, _ in engine.started] == [0, 1, 2, 3]
    weights = [weight for _, weight in engine.started]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    metrics = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["staleness"] for row in metrics] == [0, 1, 1, 1]
    assert metrics[0]["sampler_gap"] < 1e-4 < 1e-3 < metrics[1]["sampler_gap"]
    stale = [{row.get("staleness", 0) for row in read_jsonl(p)} for p in sorted(tmp_path.glob("rollouts/s*"))]
    assert stale == [{0}, {1}, {1}, {1}]


@pytest.mark.parametrize("more", [{}, {"dynamic_sampling": 1}], ids=["plain", "dapo"])
def test_one_step_off_stopped_and_continued_asks_the_same(random_model_folder, tmp_path, more):
    """What was sampled in advance is sampled again, by the newest weights."""
    settings = Grpo(**SMALL | {"optimizer": {"lr": 0.0}} | more)
    trained(random_model_folder, tmp_path / "a", settings, "one_step_off")

    def stop_in_the_third(stop, step, count):
        stop.is_set = stop.is_set or step == 2

    with pytest.raises(Stopped):
        trained(random_model_folder, tmp_path / "b", settings, "one_step_off", after=stop_in_the_third)
    trained(random_model_folder, tmp_path / "b", settings, "one_step_off")
    assert asked(tmp_path / "a") == asked(tmp_path / "b")
    assert len({tuple(ids) for ids in asked(tmp_path / "a").values()}) == settings.steps
    staleness = [row["staleness"] for row in read_jsonl(tmp_path / "b" / "metrics.jsonl")]
    assert (min(staleness) == 0 and max(staleness) <= 1 and staleness.count(0) == 2) or more


def test_before_a_measurement_nothing_is_sampled_in_advance(random_model_folder, tmp_path):
    row = {"accuracy": 0.5, "pass_at_k": None, "mean_tokens": 1.0, "truncated": 0.0, "unscored": 0}
    row |= {"seconds": 0.1, "n": 1, "low": 0.0, "high": 1.0, "samples": 1}
    trained(random_model_folder, tmp_path, Grpo(**SMALL), "one_step_off", measured=row)
    assert [r["staleness"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 0, 1]


@pytest.mark.parametrize("more", [{}, PAPER], ids=["plain", "paper"])
def test_a_signal_ends_a_step_that_is_being_sampled(random_model_folder, tmp_path, more):
    """At once, with a checkpoint of the steps before; the step is taken again."""
    settings = Grpo(**SMALL | more)
    unbroken, _ = trained(random_model_folder, tmp_path / "a", settings, "on_policy")

    def stop_then_hang(stop, step, count):
        if (step, count) == (2, 4):
            stop.is_set = True
            time.sleep(600)

    started = time.monotonic()
    with pytest.raises(Stopped, match="grpo in step 3 of 4"):
        trained(random_model_folder, tmp_path / "b", settings, "on_policy", after=stop_then_hang)
    assert time.monotonic() - started < 120
    assert max(checkpoint.complete(tmp_path / "b" / "checkpoints")) == 2
    continued, _ = trained(random_model_folder, tmp_path / "b", settings, "on_policy")
    assert asked(tmp_path / "a") == asked(tmp_path / "b")
    assert_close(unbroken, continued)


def test_an_error_of_the_sampling_ends_the_run(random_model_folder, tmp_path):
    def fail(stop, step, count):
        if (step, count) == (1, 3):
            raise TrainingError("no vLLM server was well")

    with pytest.raises(TrainingError, match="no vLLM server was well"):
        trained(random_model_folder, tmp_path, Grpo(**SMALL), "on_policy", after=fail)


def test_memory_that_runs_out_in_an_overlapped_step_names_the_phase(
    random_model_folder, tmp_path, monkeypatch
):
    def run_out(*args, **options):
        torch.empty(1 << 50)

    monkeypatch.setattr("rlcs.train.learning.with_logprobs", run_out)
    with pytest.raises(OutOfMemory) as caught:
        trained(random_model_folder, tmp_path, Grpo(**SMALL), "on_policy")
    assert caught.value.where == "reference"


def test_a_judge_is_asked_in_a_few_parts(random_model_folder, tmp_path):
    """Each time all ranks wait for its slowest reply; answers are given to it as they arrive."""
    parts, begun = [], []

    class Judged(LengthGrader):
        def grade(self, pairs):
            parts.append(len(pairs))
            return super().grade(pairs)

    class Judge:
        def start(self, answers):
            begun.append(len(answers))

    reward = {"accuracy": 0.0, "judge": {"weight": 1.0, "model": "builtin"}}
    settings = Grpo(**SMALL | {"steps": 1, "prompts_per_step": 16, "reward": reward})
    more = {"grader": Judged(), "judge": Judge()}
    slow = lambda stop, step, count: time.sleep(0.05)  # noqa: E731 - each group arrives alone
    trained(random_model_folder, tmp_path, settings, "on_policy", after=slow, more=more)
    assert sum(parts) == sum(begun) == 16 * 3 and begun == [3] * 16
    assert len(parts) <= 8 and all(part >= 2 * 3 for part in parts[:-1])
