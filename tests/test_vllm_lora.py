"""Rollouts by a policy that trains adapters: its model goes to vLLM once, then the adapters alone.

vLLM is played by `fake_vllm.py` here; `test_vllm.py` has the real one.
"""

import gc
import os
import signal
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_problem
from rlcs.distributed import ALONE
from rlcs.engines.factory import open_engines
from rlcs.engines.vllm.engine import VllmEngine
from rlcs.engines.vllm.weights import WeightsFolder
from rlcs.errors import EndpointError, RecipeError
from rlcs.model import loading
from rlcs.model.chat import Chat
from rlcs.model.fsdp import whole_weights
from rlcs.model.vlm import Vlm
from rlcs.pipeline.study import engine_needs
from rlcs.recipe.execution import Lora
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.schema import Model, Recipe
from rlcs.recipe.table import summary_rows
from rlcs.train import grpo
from test_lora import logprobs, one_pack
from test_vllm_engine import Run, break_while_publishing, sampled_by_two_ranks
from test_vllm_engine import program as program

RANK = 12


def adapted(folder: Path, *, four_bit: bool = False) -> tuple[Vlm, Chat]:
    """A policy whose adapters add something."""
    plain = loading.load(Model(name=str(folder)), device=torch.device("cpu"), four_bit=four_bit)
    vlm = loading.prepare(plain, Lora(rank=RANK, alpha=24, rank_stabilised=True), (), seed=0)
    move(vlm)
    return vlm, loading.make_chat(vlm)


def move(vlm: Vlm) -> None:
    """One update of the adapters."""
    with torch.no_grad():
        for _, parameter in vlm.parameters():
            parameter += 0.02


@pytest.fixture
def run(tmp_path: Path, program: Path, random_model_folder: Path):
    runs = []

    def make(adapter_rank: int = RANK, **settings: object) -> Run:
        policy = adapted(random_model_folder)
        runs.append(Run(tmp_path / "rollout", program, *policy, adapter_rank=adapter_rank, **settings))
        runs[-1].folder.mkdir(exist_ok=True)
        return runs[-1]

    yield make
    for one in runs:
        one.fleet.close()


def loaded(run: Run) -> list[str]:
    return (run.folder / "loaded.txt").read_text().splitlines()


def test_the_model_goes_once_and_then_adapters_alone(run) -> None:
    both = run(servers=2, concurrency=2)
    said, sizes = [], []
    for _ in range(3):
        both.engine.sync()
        (by,) = set(both.ask(30))
        assert by == both.published.newest.folder.name
        model, adapters = sorted((both.folder / "weights").iterdir())
        assert adapters.name == by and by.startswith(f"{model.name}+"), "older adapters are removed"
        said.append(by)
        sizes.append([sum(file.stat().st_size for file in at.iterdir()) for at in (model, adapters)])
    assert len(set(said)) == 3 and all(model > 3 * adapters for model, adapters in sizes)
    assert sum(line.startswith("model ") for line in loaded(both)) == 2, "once a server"
    assert [loaded(both).count(f"adapter {name}") for name in said] == [2, 2, 2]
    assert len(both.started) == 2


@pytest.mark.parametrize("misdeed", ["die_after", "hang_after", "forget_after", "fail_after", "abort_after"])
def test_a_server_that_fails_gets_model_and_adapter_again(run, misdeed: str) -> None:
    failing = run(concurrency=3)
    failing.behave(**{misdeed: 4})
    failing.engine.sync()
    newest = failing.published.newest
    assert set(failing.ask(20)) == {newest.version}
    assert (failing.folder / f"{misdeed}.done").exists(), "it never failed"
    again = 2 if misdeed in ("die_after", "hang_after", "forget_after") else 1
    assert loaded(failing) == [f"model {newest.model.version}", f"adapter {newest.version}"] * again


def test_a_restarted_server_gets_the_adapter_of_now(run) -> None:
    one = run(concurrency=2)
    old = set(one.ask(4))
    move(one.vlm)
    one.engine.sync()
    os.kill(one.started[0]["pid"], signal.SIGKILL)
    assert set(one.ask(4)) == {one.published.newest.version} != old
    assert len(one.started) == 2 and one.started[1]["argv"][2] == str(one.published.newest.model.folder)


def test_a_plain_model_and_another_policy_are_loaded_whole(run, random_model_folder: Path) -> None:
    """As after training, when the same servers measure merged models, or train the next arm."""
    one = run(concurrency=2)
    one.ask(4)
    plain = loading.load(Model(name=str(random_model_folder)), device=torch.device("cpu"))
    trained, other = one.engine, adapted(random_model_folder)[0]
    for vlm, kinds in ((plain, 1), (other, 2)):
        one.engine = VllmEngine(one.fleet, one.published, vlm, one.chat)
        before = len(loaded(one))
        assert set(one.ask(4)) == {one.published.newest.version}
        assert [line.split()[0] for line in loaded(one)[before:]] == ["model", "adapter"][:kinds]
        assert len(list((one.folder / "weights").iterdir())) == kinds
    one.engine = trained
    assert set(one.ask(4)) == {one.published.newest.version}
    assert len(one.started) == 1


def test_a_server_without_room_for_the_adapter_is_refused(run) -> None:
    none = run(adapter_rank=0)
    with pytest.raises(
        EndpointError, match=r"(?s)no adapters of rank 12.*--enable-lora --max-lora-rank 16.*merged"
    ):
        none.ask(1)
    small = run(adapter_rank=8)
    with pytest.raises(EndpointError, match="no adapters of rank 12"):
        small.ask(1)


def test_a_server_that_may_not_change_adapters_is_refused(run, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = run(arguments=["--enable-lora", "--max-lora-rank", "16"], adapter_rank=0)
    with pytest.raises(EndpointError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        closed.ask(1)


def test_a_half_written_adapter_has_no_name(tmp_path: Path, random_model_folder: Path) -> None:
    vlm, _ = adapted(random_model_folder)
    folder = WeightsFolder(tmp_path, as_adapters=True)
    first = folder.publish(vlm)
    break_while_publishing(folder, vlm, save="save_adapters", file="adapter_model.safetensors")
    assert folder.newest == first and first.folder.is_dir() and first.model.folder.is_dir()
    whole = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".part")}
    assert whole == {first.version, first.model.version}
    again = WeightsFolder(tmp_path, as_adapters=True).publish(vlm)
    assert {path.name for path in tmp_path.iterdir()} == {again.version, again.model.version}


def test_a_published_policy_may_go(tmp_path: Path, random_model_folder: Path) -> None:
    """Before the next model of the run is loaded: both would not fit."""
    published, (vlm, _) = WeightsFolder(tmp_path, as_adapters=True), adapted(random_model_folder)
    published.publish(vlm)
    model = weakref.ref(vlm.model)
    del vlm
    gc.collect()
    assert published.newest is not None and model() is None


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "four bits"])
def test_the_published_model_with_the_adapter_is_the_policy(
    tmp_path: Path, random_model_folder: Path, four_bit: bool
) -> None:
    """Of QLoRA the model is what the 4-bit weights stand for, which is what the policy computes with."""
    from peft import PeftModel

    if four_bit:
        pytest.importorskip("bitsandbytes")
    vlm, chat = adapted(random_model_folder, four_bit=four_bit)
    vlm, reference = grpo.with_reference(vlm, lambda whole: whole)
    packed = one_pack(chat)
    ours, bare = logprobs(vlm, packed), logprobs(reference, packed)
    weights = WeightsFolder(tmp_path, as_adapters=True).publish(vlm)
    alone = load_file(weights.folder / "adapter_model.safetensors")
    assert all(".lora_" in name for name in alone)
    assert len(whole_weights(vlm.model, ALONE, having=".lora_")) == len(alone), "what shards send to rank 0"
    assert not (weights.model.folder / "adapter").exists()
    served = loading.load(Model(name=str(weights.model.folder)), device=torch.device("cpu"))
    torch.testing.assert_close(logprobs(served, packed), bare, rtol=1e-4, atol=1e-4)
    PeftModel.from_pretrained(served.model, weights.folder)
    torch.testing.assert_close(logprobs(served, packed), ours, rtol=1e-4, atol=1e-4)
    assert (ours - bare).abs().max() > 0.1


def test_under_torchrun_adapters_come_from_the_shards(
    tmp_path: Path, program: Path, random_model_folder: Path
) -> None:
    found = sampled_by_two_ranks(program, random_model_folder, tmp_path, RANK)
    base, adapter = sorted(path for path in (tmp_path / "published").iterdir() if path.is_dir())
    assert all(each["said"] == [adapter.name] and each["got"] == each["asked"] for each in found)
    plain = loading.load(Model(name=str(random_model_folder)), device=torch.device("cpu"))
    saved = loading.load(Model(name=str(base))).model
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), plain.model.parameters(), strict=False))
    vlm = loading.prepare(plain, Lora(rank=RANK), (), seed=3)
    expected = dict(vlm.parameters())
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(weights) == len(expected)
    for name, tensor in weights.items():
        own = name.removeprefix("base_model.model.").removesuffix(".weight") + ".default.weight"
        assert torch.equal(tensor, expected[own] + (1 if "lora_B" in name else 0)), name


def recipe(*words: str) -> Recipe:
    return load_recipe("quickstart", ["rollout.engine=vllm_server", "lora.rank=12", *words]).recipe


def test_how_servers_of_ours_make_room(vlm: Vlm) -> None:
    launch = engine_needs(recipe("lora.rank=65")).launch(vlm)
    command = launch.command(Path("/weights/7"), 8123)
    at = command.index("--enable-lora")
    assert command[at : at + 3] == ["--enable-lora", "--max-lora-rank", "128"]
    assert launch.environment(0)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    merged = engine_needs(recipe("rollout.lora=merged")).launch(vlm)
    assert "--enable-lora" not in merged.command(Path("/weights/7"), 8123)
    assert merged.environment(0) == replace(launch, adapter_rank=0).environment(0)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in merged.environment(0)


ALL_PARTS = "lora.parts=[vision_tower, language_model]"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "LoRA as adapters"),
        (["rollout.engine=vllm_colocated"], "LoRA as adapters"),
        (["rollout.lora=merged"], "LoRA merged"),
        ([ALL_PARTS, "grpo.freeze=[]"], "LoRA merged"),
        ([ALL_PARTS, "grpo.freeze=[vision_tower]", "rollout.lora=adapter"], "LoRA as adapters"),
        (["lora.rank=513"], "LoRA merged"),
    ],
)
def test_what_vllm_gets_is_chosen_and_said(words: list[str], says: str) -> None:
    assert says in dict(summary_rows(recipe(*words)))["rollouts"]
    assert recipe(*words).samples_by_adapters == (says == "LoRA as adapters")
    assert "LoRA" not in dict(summary_rows(recipe("lora.rank=0")))["rollouts"]


@pytest.mark.parametrize(
    "words", [[ALL_PARTS, "grpo.freeze=[]"], ["lora.rank=513"], ["lora.parts=[merger]", "grpo.freeze=[]"]]
)
def test_adapters_that_vllm_would_ignore_are_refused(words: list[str]) -> None:
    words_of_it = r"command line: rollout.lora=adapter: vLLM takes.*language model only.*merged"
    with pytest.raises(RecipeError, match=words_of_it):
        recipe("rollout.lora=adapter", *words)


def test_merged_stays_what_it_was(tmp_path: Path, program: Path, random_model_folder: Path) -> None:
    vlm, chat = adapted(random_model_folder)
    ask = [chat.prompt(make_problem("a", sizes=()))], chat.sampling(max_new_tokens=4)
    words = [f"rollout.executable={program}", "rollout.health_limit_s=1"]
    for lora, kinds in (
        ("merged", {"model.safetensors"}),
        ("auto", {"model.safetensors", "adapter_model.safetensors"}),
    ):
        folder = tmp_path / lora
        with open_engines(engine_needs(recipe(f"rollout.lora={lora}", *words)), folder) as make:
            make(vlm, chat, 8).sample(*ask)
            assert {path.name for path in folder.glob("weights/*/*model.safetensors")} == kinds
