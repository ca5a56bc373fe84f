"""Many real processes over gloo: what 2 and 4 ranks compute is what one computes, and no rank hangs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import distributed_worker
import warm
from rlcs.distributed import ALONE, World, join_world
from rlcs.errors import UserError
from rlcs.model import loading
from rlcs.model.bins import balanced
from rlcs.model.chat import Chat
from rlcs.model.checkpoints import complete
from rlcs.model.fsdp import reference_dtype
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.model.vlm import Vlm
from rlcs.recipe.execution import Parallel
from rlcs.recipe.loading import dump, load_recipe
from rlcs.recipe.schema import Model
from rlcs.records.trees import Tree
from rlcs.storage import read_json, read_jsonl
from rlcs.train import grpo, sft
from rlcs.train.batching import Keep, guessed_tokens, packs_in_step, padding_tree
from rlcs.train.trainer import logprobs_of

WORKER = Path(distributed_worker.__file__)
LIMIT_S = 900
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
DAPO |= {"order": "signal"}
HELD = {"optimizer_steps": 2, "entropy": {"control": "kl_cov", "share": 0.1}}
HELD |= {"sight": {"coefficient": 0.02, "gradient": "both"}, "also": {"sft": [1, 0], "sft_batch_size": 3}}
BONUS = {"entropy": {"control": "bonus", "target": 9.0, "bonus_step": 0.1}, "sight": {"coefficient": 0.02}}
JOBS = {
    "sft": {"sft": SFT},
    "frozen": {"sft": SFT | {"epochs": 1, "freeze": ["vision_tower"], "loss_average": "example"}},
    "plain": {"grpo": GRPO},
    "paper": {"grpo": GRPO | PAPER},
    "dapo": {"grpo": GRPO | DAPO},
    "held": {"grpo": GRPO | HELD},
    "bonus": {"grpo": GRPO | BONUS},
    "kept": {"grpo": GRPO | PAPER | {"freeze": ["vision_tower"]}, "feature_bytes": 23_000},
    "adapters": {"grpo": GRPO | PAPER, "lora": {"rank": 4, "alpha": 8}},
}
OFFLOADED = {"frozen": 2, "paper": 1}
"""Jobs that ranks do with everything in main memory too; two ranks are stopped after a step and resumed."""
COARSE = {"sft": SFT | {"epochs": 1}, "lora": {"rank": 4, "alpha": 8}, "dtype": "bfloat16"}
"""Frozen weights in bfloat16 under adapters in float32."""

STUDY = [
    "data.cold_start=builtin:puzzles?count=12&seed=1",
    "data.rl=builtin:puzzles?count=12&seed=2",
    "data.test=builtin:puzzles?split=test&count=20&seed=3",
    "sft.epochs=1",
    "sft.batch_size=6",
    "grpo.steps=30",
    "grpo.prompts_per_step=3",
    "grpo.group_size=2",
    "grpo.max_new_tokens=8",
    "grpo.save_every=500",
    "grpo.max_zero_variance_steps=99",
    "eval.max_new_tokens=8",
    "study.arms=[base, sft_grpo]",
]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets; and a rank that crashes prints its stack."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    own |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": 1}
    own |= {"PYTHONFAULTHANDLER": 1}
    return os.environ | {key: str(value) for key, value in own.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def launch(size: int, path: Path, worker: Path = WORKER) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [
        warm.Popen(
            [sys.executable, "-W", "ignore", str(worker), str(path)],
            env=environment(rank, size, port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def run_on(size: int, jobs: list[dict], path: Path, *, limit_s: float = LIMIT_S) -> None:
    path.write_text(json.dumps(jobs))
    ranks = launch(size, path)
    try:
        errors = [rank.communicate(timeout=limit_s)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
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
    for name, step in OFFLOADED.items():
        job = (
            base | {"folder": str(root / f"{name}-offloaded"), "parallel": {"cpu_offload": True}} | JOBS[name]
        )
        jobs += [job | {"stop_at": step}, job]
    jobs.append(base | {"folder": str(root / "coarse")} | COARSE)
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
            near = value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-5)
            assert twin[key] == near, (row["step"], key)


def rows(folder: Path) -> list[dict]:
    """Metrics without times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    times = ("seconds", "tokens_per_s")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_compute_what_one_computes(alone, pair, name):
    assert_same(alone / name, pair / name)
    if (alone / name / "rollouts").exists():
        for path in (alone / name / "rollouts").glob("step-*.jsonl"):
            mine, theirs = path.read_text(), (pair / name / "rollouts" / path.name).read_text()
            assert [json.loads(x)["response"] for x in mine.splitlines()] == [
                json.loads(x)["response"] for x in theirs.splitlines()
            ]


@pytest.mark.parametrize("name", OFFLOADED)
def test_offloading_changes_no_bit_of_what_two_ranks_compute(pair, name):
    """Across a stop and a resume; where shards lie is looked at in `test_fsdp.py`."""
    here, there = pair / name, pair / f"{name}-offloaded"
    assert f"after step {OFFLOADED[name]} of" in (there / "stopped-1").read_text()
    weights, offloaded = torch.load(here / "weights.pt"), torch.load(there / "weights.pt")
    assert weights.keys() == offloaded.keys()
    assert all(torch.equal(weight, offloaded[key]) for key, weight in weights.items())
    assert rows(here) == rows(there)


def test_the_trained_model_is_a_hugging_face_folder(pair):
    weights = torch.load(pair / "sft" / "weights.pt")
    saved = loading.load(Model(name=str(pair / "sft" / "final"))).model.state_dict()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in saved.items())


def test_adapters_are_merged_from_shards(alone, pair):
    """Merging adds rounding of its own to what Adam makes of rounding."""
    one, two = (loading.load(Model(name=str(root / "adapters" / "final"))).model for root in (alone, pair))
    gaps = [(a - b).abs().max() for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert max(gaps) < 4 * RATE
    assert (pair / "adapters" / "final" / "adapter" / "adapter_model.safetensors").is_file()
    moved = torch.load(pair / "adapters" / "weights.pt")
    assert any(weight.abs().max() > 0 for name, weight in moved.items() if "lora_B" in name)


@pytest.mark.fault("kills", "a signal to one of two ranks while it trains", "all stop after the same step")
@pytest.mark.parametrize(("name", "step"), [("sft", 3), ("paper", 1)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(pair, name, step):
    folder = pair / f"{name}-stopped"
    for rank in range(2):
        assert f"after step {step} of" in (folder / f"stopped-{rank}").read_text()
    assert max(complete(folder / "checkpoints")) == step
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


def test_two_ranks_measure_while_they_train_and_keep_the_best(random_model_folder, tmp_path):
    """Every rank has the same rows; a stop changes none; a checkpoint in shards becomes a plain model."""
    settings = SFT | {"handover": {"rule": "best_pass_1"}}
    job = {"model": str(random_model_folder), "validate": 2, "sft": settings}
    whole, stopped = ({"folder": str(tmp_path / name / "sft"), **job} for name in ("whole", "stopped"))
    run_on(2, [whole, stopped | {"stop_at": 3}, stopped], tmp_path / "jobs.json")
    rows = [read_jsonl(tmp_path / name / "sft" / "validation.jsonl") for name in ("whole", "stopped")]
    assert [row["step"] for row in rows[0]] == [0, 2, 4, 6] and rows[0][0]["n"] == 7
    assert [row | {"seconds": 0} for row in rows[0]] == [row | {"seconds": 0} for row in rows[1]]
    best = max(rows[0][1:], key=lambda row: row["accuracy"])["step"]  # of equals the first
    for name in ("whole", "stopped"):
        done = read_json(tmp_path / name / "sft" / "done.json")
        assert (done["step"], done["rule"]) == (best, "best_pass_1")
    final = load_file(tmp_path / "whole" / "sft" / "final" / "model.safetensors")
    words = [f"model.name={random_model_folder}", "sft.handover.rule=best_pass_1", "validation.sft_every=2"]
    text = dump(load_recipe("quickstart", words).recipe)
    (tmp_path / "whole" / "recipe.yaml").write_text(text)
    saved = complete(tmp_path / "whole" / "sft" / "checkpoints")
    assert best < 6 and {best, 6} <= saved.keys(), "the last step is kept beside the best"
    assert (saved[best] / "model-1.safetensors").is_file()
    (tmp_path / "whole" / "sft" / "done.json").unlink()  # so that the checkpoint is read, not `final`
    made = load_file(Path(loading.resolve(f"{tmp_path}/whole/sft@{best}")) / "model.safetensors")
    assert made.keys() == final.keys() and all(torch.equal(made[name], final[name]) for name in final)


@pytest.mark.fault("kills", "a rank that dies or hangs in a collective", "the others end and name it")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
def test_a_rank_that_dies_or_hangs_takes_the_others_along(random_model_folder, tmp_path, how):
    job = {"model": str(random_model_folder), "folder": str(tmp_path / "run"), "timeout_s": 20}
    (tmp_path / "jobs.json").write_text(json.dumps([job | {"sft": SFT | {"epochs": 5000}}]))
    ranks = launch(2, tmp_path / "jobs.json")
    try:
        wait_for(tmp_path / "run" / "metrics.jsonl")
        ranks[1].send_signal(how)
        sent = time.monotonic()
        _, error = ranks[0].communicate(timeout=LIMIT_S)
        assert time.monotonic() - sent < 100 and ranks[0].returncode not in (0, None)
        assert "rank 0 lost the others" in error and "continues from the last checkpoint" in error
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.fault("limits", "one rank without memory", "all end with the reason")
def test_a_rank_without_memory_ends_all(random_model_folder, tmp_path):
    job = {"model": str(random_model_folder), "folder": str(tmp_path / "run"), "timeout_s": 20}
    (tmp_path / "jobs.json").write_text(json.dumps([job | {"sft": SFT, "run_out_of_memory": True}]))
    ranks = launch(2, tmp_path / "jobs.json")
    try:
        (_, other), (_, full) = (rank.communicate(timeout=LIMIT_S) for rank in ranks)
        assert [rank.returncode for rank in ranks] == [1, 1]
        assert "OutOfMemory: update: main memory ran out: 4,194,304.00 GB were requested" in full
        assert "rank 0 lost the others" in other and "its own message says why" in other
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def wait_for(path: Path) -> None:
    started = time.monotonic()
    while not path.exists():
        assert time.monotonic() - started < LIMIT_S, f"{path} does not come"
        time.sleep(0.2)


def stopped_and_finished(words: list[str], started: Path) -> tuple[str, str]:
    """What a study on two ranks says that is stopped when `started` exists; one process finishes it."""
    start = [sys.executable, "-W", "ignore"]
    run = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--shutdown-timeout",
        "200",
    ]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    study = warm.Popen([*start, *run, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        wait_for(started)
        study.send_signal(signal.SIGTERM)
        said, error = study.communicate(timeout=LIMIT_S)
    finally:
        study.kill()
    assert error.count("stopped as asked") == 1, error
    step = max(complete(started.parent / "checkpoints"))
    assert (started.parent / "checkpoints" / f"step-{step:06d}" / "model-1.safetensors").is_file()
    warm.run([*start, *words], check=True, capture_output=True, timeout=LIMIT_S, **options)
    return said, error


def test_a_study_under_torchrun_is_stopped_and_finished_by_one_process(random_model_folder, tmp_path):
    words = ["-m", "rlcs", "run", "quickstart", f"model.name={random_model_folder}", *STUDY]
    words += ["--out", str(tmp_path)]
    said, error = stopped_and_finished(words, tmp_path / "sft_grpo" / "metrics.jsonl")
    assert "grpo after step" in error, error
    assert said.count("SFT loss") == 1  # rank 0 alone speaks
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: arm["n"] for name, arm in summary["arms"].items()} == {"base": 20, "sft_grpo": 20}
    assert [row["step"] for row in rows(tmp_path / "sft_grpo")] == list(range(1, 31))


def test_trials_of_rl_under_torchrun_are_stopped_and_finished_by_one_process(random_model_folder, tmp_path):
    """All ranks choose alike; the winner's shards become the arm's, whatever number of ranks goes on."""
    words = ["-m", "rlcs", "run", "quickstart", f"model.name={random_model_folder}", *STUDY]
    words += ["sft.handover.rule=probe", "sft.handover.round_steps=4", "sft.handover.most_share=0.5"]
    words += ["validation.sft_every=1", "validation.problems=4", "grpo.steps=32", "study.preflight=off"]
    words += ["study.arms=[base, sft, sft_grpo]", "--out", str(tmp_path)]
    # Then the winner's trial has got its name.
    stopped_and_finished(words, tmp_path / "sft_grpo" / "metrics.jsonl")
    facts = read_json(tmp_path / "sft" / "candidates.json")
    assert len(facts["candidates"]) == 2 and facts["steps"] == 32 - 4 and len(facts["rounds"]) == 1
    assert [row["step"] for row in rows(tmp_path / "sft_grpo")] == list(range(1, 29))
    assert read_json(tmp_path / "sft" / "done.json")["step"] == facts["chosen"]
    assert len(list(tmp_path.glob("trial-*"))) == 1


# --- a group of one --------------------------------------------------------------------------------


@pytest.fixture
def group_of_one(monkeypatch) -> Iterator[World]:
    for name, value in environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    with join_world(timeout_s=60) as world:
        yield world


def scored(folder: Path, chat: Chat, parallel: Parallel, world: World) -> tuple[Vlm, Tensor]:
    """A model in shards, and its logprobs, with gradients."""
    vlm = loading.spread(loading.load(Model(name=str(folder)), world=world), parallel)
    trees = [sft.tree_of(demonstration, chat) for demonstration in distributed_worker.demonstrations(3)]
    logprobs = score(vlm, pack(trees, chat.patches)).logprobs
    logprobs.sum().backward()
    return vlm, logprobs.detach()


def done_by(world: World, job: dict, folder: Path) -> dict[str, Tensor]:
    """The weights after a job."""
    folder.mkdir()
    distributed_worker.train(job | {"folder": str(folder)}, world)
    return torch.load(folder / "weights.pt")


@pytest.mark.parametrize("name", OFFLOADED)
def test_offloading_changes_no_bit_of_what_one_rank_computes(
    random_model_folder, group_of_one, tmp_path, name
):
    job = {"model": str(random_model_folder)} | JOBS[name]
    here = done_by(group_of_one, job, tmp_path / "here")
    there = done_by(group_of_one, job | {"parallel": {"cpu_offload": True}}, tmp_path / "there")
    assert all(torch.equal(weight, there[key]) for key, weight in here.items())
    assert rows(tmp_path / "here") == rows(tmp_path / "there")


def test_exact_adapters_on_coarse_weights_train_in_shards(random_model_folder, pair, group_of_one, tmp_path):
    job = {"model": str(random_model_folder)} | COARSE
    alone = done_by(ALONE, job, tmp_path / "alone")
    one = done_by(group_of_one, job, tmp_path / "one")
    two = torch.load(pair / "coarse" / "weights.pt")
    for name, weight in alone.items():
        adapter = "lora_" in name
        assert weight.dtype == one[name].dtype == two[name].dtype
        assert weight.dtype == (torch.float32 if adapter else torch.bfloat16), name
        assert torch.equal(weight, one[name]) and (adapter or torch.equal(weight, two[name])), name
    losses = [rows(path)[-1]["loss"] for path in (tmp_path / "one", pair / "coarse")]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_number_formats_under_torchrun(random_model_folder, chat, group_of_one):
    exact, logprobs = scored(random_model_folder, chat, Parallel(), group_of_one)
    mixed, rounded = scored(random_model_folder, chat, Parallel(compute_dtype="bfloat16"), group_of_one)
    assert 1e-4 < (logprobs - rounded).abs().max() < 0.2
    _, same = scored(random_model_folder, chat, Parallel(reduce_dtype="bfloat16"), group_of_one)
    assert torch.equal(same, logprobs)
    for vlm in (exact, mixed):
        assert (
            {p.dtype for _, p in vlm.parameters()}
            == {p.grad.dtype for _, p in vlm.parameters()}
            == {torch.float32}
        )


def test_gradients_are_summed_in_the_chosen_format(random_model_folder, chat, group_of_one):
    for name, coarse in (("same", False), ("bfloat16", True)):
        vlm, _ = scored(random_model_folder, chat, Parallel(reduce_dtype=name), group_of_one)
        grads = [p.grad.to_local() for _, p in vlm.parameters()]
        assert all(torch.equal(g, g.bfloat16().float()) for g in grads) == coarse


def test_a_reference_is_kept_in_the_format_of_its_computation(random_model_folder, chat, group_of_one):
    """Which changes no bit: FSDP rounds exact shards to that format when it gathers them."""
    trees = [sft.tree_of(demonstration, chat) for demonstration in distributed_worker.demonstrations(3)]
    packs = [pack(trees, chat.patches)]

    def reference(**settings):
        parallel = Parallel(**settings)
        vlm = loading.load(Model(name=str(random_model_folder)), world=group_of_one)
        spread = partial(loading.spread, settings=parallel)
        _, frozen = grpo.with_reference(vlm, spread, dtype=reference_dtype(parallel))
        [logprobs] = logprobs_of(frozen, packs, temperature=1.0)
        return {weight.dtype for weight in frozen.model.parameters()}, logprobs

    plain, exact = reference()
    kept, rounded = reference(compute_dtype="bfloat16")
    whole, same = reference(compute_dtype="bfloat16", reference_dtype="float32")
    coarse, alike = reference(reference_dtype="bfloat16")
    assert plain == whole == {torch.float32} and kept == coarse == {torch.bfloat16}
    assert torch.equal(rounded, same)
    assert 1e-4 < (exact - rounded).abs().max() < 0.2 and (alike - rounded).abs().max() < 0.1


def test_layers_stay_gathered_only_where_the_recipe_says_so(random_model_folder, chat, group_of_one):
    for freed in (True, False):
        parallel = Parallel(reshard_after_forward=freed)
        vlm = loading.spread(loading.load(Model(name=str(random_model_folder)), world=group_of_one), parallel)
        tree = sft.tree_of(distributed_worker.demonstrations(2)[1], chat)
        score(vlm, pack([tree], chat.patches))
        layer = vlm.model.model.language_model.layers[0].mlp.up_proj.weight
        assert isinstance(layer, DTensor) == freed


def test_what_only_shards_can_have_is_refused_without_torchrun(vlm):
    with pytest.raises(UserError, match="mixed precision and offloading belong to sharded models"):
        loading.spread(vlm, Parallel(compute_dtype="bfloat16"))
    with pytest.raises(UserError, match=r"parallel\.cpu_offload"):
        loading.spread(vlm, Parallel(cpu_offload=True))


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
    """A world in which another rank has `flags`: packs with images or without."""

    def __init__(self, flags):
        self._flags = flags

    def gather(self, own):
        return [own, (0, self._flags)]


def test_packs_of_a_rank_fall_in_step_with_the_others(chat):
    text = Tree(prompt=padding_tree(chat, image=False).prompt, branches=())
    packs = packs_in_step([text], chat, budget=10_000, world=OtherRank([True, False, False]))
    assert [pack.grids is not None for pack in packs] == [True, False, False]
    assert [len(pack.layout.trunks) for pack in packs] == [2, 1, 1]
    assert [len(packs_in_step([text], chat, budget=9, world=OtherRank([])))] == [1]


@pytest.mark.parametrize(
    ("patches", "used", "others", "kept"),
    [
        (64, 0, [16, 16], [True, True]),
        (31, 0, [16, 16], [True, False]),
        (64, 0, [16, 90], [True, False]),
        (64, 0, [90], [False, False]),
        (64, 33, [16, 16], [True, False]),
        (0, 0, [], [False, False]),
    ],
)
def test_ranks_keep_features_of_the_same_packs(chat, patches, used, others, kept):
    """Two packs of 16 patches here; a pack keeps them where that is within the bound on both ranks."""
    picture = Tree(prompt=padding_tree(chat, image=True).prompt, branches=())
    keep = Keep(patches=patches, used=used)
    packs = packs_in_step([picture] * 2, chat, budget=1, world=OtherRank(others), keep=keep)
    assert [pack.kept is not None for pack in packs] == kept
