"""Weights that are sent to vLLM's servers: what is sent, in which order, and what happens when it fails."""

import base64
import os
import pickle
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import make_problem
from file_channel import FileChannel
from rlcs.engines.vllm import transfer
from rlcs.engines.vllm.server import Launch
from rlcs.engines.vllm.transfer import IpcChannel, Transfer, chunks, description
from rlcs.errors import TrainingError, UserError
from rlcs.model.chat import Chat
from rlcs.model.serving_weights import serving_weights
from rlcs.model.vlm import Vlm
from rlcs.pipeline.study import engine_needs
from rlcs.recipe.loading import load_recipe
from test_vllm_engine import Run, on_gpus, program, sampled_by_two_ranks, told

__all__ = ["program"]  # a fixture


@pytest.fixture
def run(tmp_path: Path, program: Path, vlm: Vlm, chat: Chat, monkeypatch: pytest.MonkeyPatch):
    """An engine whose weights are sent by files, in several chunks."""
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 100_000)
    runs = []

    def make(required: bool = False, **settings: object) -> Run:
        one = Run(tmp_path / "rollout", program, vlm, chat, transfer="file", **settings)
        one.folder.mkdir(exist_ok=True)
        one.channel = FileChannel(tmp_path, vlm.world)
        one.engine._transfer = Transfer(one.fleet, one.channel, ranks=1, required=required)
        runs.append(one)
        return one

    yield make
    for one in runs:
        one.fleet.close()


def loaded(run: Run) -> list[str]:
    return [line.split()[0] for line in (run.folder / "loaded.txt").read_text().splitlines()]


def test_the_first_weights_lie_in_a_folder_and_the_next_are_sent(run) -> None:
    both = run(servers=2, concurrency=2)
    first = set(both.ask(30))
    for _ in "12":
        both.engine.sync()
        sent = both.published.newest
        assert sent.sent and set(both.ask(30)) == {sent.version}
    assert loaded(both) == ["model"] * 2 + ["sent"] * 4, "each server, each time"
    names = [name for name, _ in serving_weights(both.vlm, torch.float32, untied=True)]
    assert (both.folder / "received.json").read_text().count('"') == 2 * len(names)
    assert [path.name for path in (both.folder / "weights").iterdir()] == list(first), "nothing was written"
    assert both.channel.count > 2 * 2 and len(both.started) == 2


def test_a_server_that_sleeps_wakes_up_for_weights_and_its_cache_for_answers(run) -> None:
    one = run(engine="vllm_colocated", sleep_level=2)
    one.ask(2)
    for _ in "12":
        one.engine.rest()
        one.engine.sync()
        assert told(one)[-2:] == ["sleep 2", "wake weights"]
        assert set(one.ask(2)) == {one.published.newest.version}
        assert told(one)[-1] == "wake kv_cache"
    one.engine.rest()
    one.engine.sync()
    one.engine.rest()
    assert told(one)[-3:] == ["wake weights", "wake kv_cache", "sleep 2"], "all of it sleeps again"


def test_weights_that_every_server_has_lost_are_written(run) -> None:
    one = run()
    one.ask(1)
    one.engine.sync()
    os.kill(one.started[0]["pid"], signal.SIGKILL)
    assert set(one.ask(4)) == {one.published.newest.folder.name} and not one.published.newest.sent
    one.engine.sync()
    assert one.published.newest.sent and set(one.ask(2)) == {one.published.newest.version}
    assert loaded(one) == ["model", "sent", "model", "sent"]


def test_answers_that_are_there_are_not_asked_for_again(run) -> None:
    one = run(concurrency=1)
    one.ask(1)
    one.engine.sync()
    sent = one.published.newest.version
    one.behave(die_after=6)
    said = one.ask(12, n=1)
    written = one.published.newest.version
    assert set(said) == {sent, written} and said.count(sent) == 4


def test_another_server_answers_for_one_that_has_lost_the_weights(run) -> None:
    both = run(servers=2, concurrency=2)
    both.ask(4)
    both.engine.sync()
    sent = both.published.newest
    os.kill(both.started[0]["pid"], signal.SIGKILL)
    assert set(both.ask(12)) == {sent.version} and both.published.newest == sent
    both.engine.sync()
    assert set(both.ask(12)) == {both.published.newest.version} and both.published.newest.sent


def test_where_sending_fails_a_folder_takes_its_place(run, caplog: pytest.LogCaptureFixture) -> None:
    one = run()
    one.ask(1)
    one.behave(dead_receiving=1)
    one.engine.sync()
    assert not one.published.newest.sent and set(one.ask(4)) == {one.published.newest.version}
    assert "weights go to vLLM through a folder from now on: DownError" in caplog.text
    one.engine.sync()
    assert not one.published.newest.sent


def test_where_sending_is_required_its_failure_is_an_error(run) -> None:
    one = run(required=True)
    one.ask(1)
    one.behave(dead_receiving=1)
    with pytest.raises(TrainingError, match="weights could not be sent to vLLM"):
        one.engine.sync()


def test_in_the_background_lost_weights_end_the_run(run) -> None:
    """A folder is written by all ranks, and they train meanwhile."""
    one = run()
    one.ask(1)
    one.engine.sync()
    os.kill(one.started[0]["pid"], signal.SIGKILL)
    prompt = one.chat.prompt(make_problem("p", sizes=()))
    arrivals = one.engine.start([prompt], one.chat.sampling(max_new_tokens=4))
    with pytest.raises(TrainingError, match="have lost the weights"):
        while arrivals.left:
            arrivals.take(60)


@pytest.mark.parametrize("engine", ["vllm_server", "vllm_colocated"])
def test_all_ranks_send_together(tmp_path: Path, program: Path, random_model_folder, engine: str) -> None:
    words = ["send", f"rollout.engine={engine}", "rollout.arguments=[--weight-transfer-config,file]"]
    found = sampled_by_two_ranks(program, random_model_folder, tmp_path, 0, *words)
    assert all(each["got"] == each["asked"] for each in found)
    sent = {word for each in found for word in each["said"]}
    assert len(sent) == 2 and all(len(each["said"]) == 2 for each in found), "written first, sent then"
    lines = (tmp_path / "loaded.txt").read_text().splitlines()
    assert sum(line.startswith("sent ") for line in lines) == (1 if engine == "vllm_server" else 2)


def test_chunks_keep_every_tensor_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 40)
    sizes = dict(zip("abcde", (3, 30, 4, 5, 1), strict=True))
    tensors = [(name, torch.full((size,), size, dtype=torch.bfloat16)) for name, size in sizes.items()]
    made = list(chunks(tensors, torch.device("cpu")))
    assert [[name for name, _ in chunk] for chunk in made] == [["a", "b"], ["c", "d", "e"]]
    expected = {"names": ["a", "b"], "dtype_names": ["bfloat16"] * 2, "shapes": [[3], [30]]}
    assert description(made[0]) == expected


def test_which_way_is_chosen(vlm: Vlm) -> None:
    def launch(*words: str, cpu: bool = False) -> Launch:
        recipe = load_recipe("quickstart", ["rollout.engine=vllm_server", *words]).recipe
        return engine_needs(recipe).launch(vlm if cpu else on_gpus(vlm, 0, 1))

    ours = launch()
    command = ours.command(Path("/weights/7"), 8123)
    assert command[command.index("--weight-transfer-config") + 1] == '{"backend": "nccl"}'
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in ours.environment(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        beside = launch("rollout.engine=vllm_colocated")
    assert beside.transfer == "ipc" and beside.environment(0)["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
    folder = launch("rollout.weights=folder")
    assert not folder.transfer and "--weight-transfer-config" not in folder.command(Path("/weights/7"), 8123)
    elsewhere = "rollout.urls=[http://a:1]"
    assert not launch(elsewhere).transfer and launch(elsewhere, "rollout.weights=transfer").transfer == "nccl"
    assert not launch("lora.rank=8").transfer, "adapters are small"
    assert launch("lora.rank=8", "rollout.lora=merged").transfer == "nccl"
    assert not launch(cpu=True).transfer
    with pytest.raises(UserError, match="no weight transfer on a CPU"):
        launch("rollout.weights=transfer", cpu=True)


def test_memory_is_shared_in_the_form_that_vllm_reads(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the handle alone is made up."""
    sent: list[dict] = []
    monkeypatch.setattr(transfer, "reduce_tensor", lambda buffer: (None, ("handle", buffer.numel())))
    properties = SimpleNamespace(uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    chunk = [("a", torch.ones(2, 3, dtype=torch.bfloat16)), ("b", torch.ones(5, dtype=torch.bfloat16))]
    IpcChannel(vlm, 1).send(SimpleNamespace(update=sent.append), chunk, asks=True)
    (info,) = sent
    assert info["tensor_sizes"] == [12, 10] and info["shapes"] == [[2, 3], [5]]
    handles = base64.b64encode(pickle.dumps({"GPU-1": ("handle", 22)})).decode()
    assert info["ipc_handles_pickled"] == handles
