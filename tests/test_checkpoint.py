"""Checkpoints: bit-exact continuation, and every way in which a save can die or a file can rot."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn

from conftest import seal
from rlcs.errors import CheckpointError, RunFolderError
from rlcs.model.checkpoints import complete
from rlcs.train import checkpoint as ck
from rlcs.train import host_copies
from rlcs.train import state as st


def load(folder: Path, step: int) -> st.TrainState:
    return ck.Checkpoints(folder).load(step)


torch.set_num_threads(1)


class Net(nn.Module):
    """Tied, frozen, dropped-out, with a buffer: what a real model has, in 200 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.inner = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.frozen(self.inner(self.embed(ids))))
        return self.head(self.dropout(self.norm(hidden)))


def build(seed: int) -> tuple[Net, torch.optim.AdamW]:
    """A model and its optimiser, with and without weight decay."""
    torch.manual_seed(seed)
    model = Net()
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def train(model: Net, optimizer: torch.optim.AdamW, steps: range) -> list[float]:
    """Steps whose data come from all three random generators and whose lr depends on the step."""
    losses = []
    for step in steps:
        ids = torch.randint(0, 7, (5,)) + random.randint(0, 1) + int(np.random.randint(0, 2))
        loss = nn.functional.cross_entropy(model(ids % 7), torch.full((5,), step % 7))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def everything(model: Net, optimizer: torch.optim.AdamW) -> dict[str, bytes]:
    """All bytes that the next step depends on."""
    state = st.capture(model, optimizer, step=0, cursor={})
    tensors = {**state.model, **state.optimizer.tensors}
    facts = json.dumps([state.optimizer.settings, state.rng]).encode()
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} | {"facts": facts}


def small(step: int, fill: float | None = None) -> st.TrainState:
    """A state that says which step wrote it."""
    value = float(step) if fill is None else fill
    return st.TrainState(
        step=step,
        model={"w": torch.full((3, 4), value), "b": torch.arange(5.0) + value},
        optimizer=st.OptimizerState(
            tensors={"exp_avg/w": torch.full((3, 4), -value)}, settings={"groups": [], "scalars": {}}
        ),
        rng=st.capture_rng(),
        schedule={"lr": 0.1 + value},
        cursor={"seen": int(value)},
        extra={"word": "straße"},
        recipe_hash="abc",
    )


def same(a: st.TrainState, b: st.TrainState) -> bool:
    """Equal in every bit that travels."""
    pairs = [(a.model, b.model), (a.optimizer.tensors, b.optimizer.tensors)]
    plain = ("step", "rng", "schedule", "cursor", "extra", "recipe_hash")
    return (
        all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)
        and a.optimizer.settings == b.optimizer.settings
        and all(getattr(a, name) == getattr(b, name) for name in plain)
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- continuation -------------------------------------------------------------------------------


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(2)
    model, optimizer = build(0)
    train(model, optimizer, range(3))
    ck.Checkpoints(tmp_path).save(
        st.capture(model, optimizer, step=3, cursor={"epoch": 1}, recipe_hash="r"), keep=2
    )
    losses = train(model, optimizer, range(3, 6))
    unbroken = everything(model, optimizer)

    other, other_optimizer = build(99)
    random.seed(77)
    np.random.seed(78)
    state = ck.Checkpoints(tmp_path).load_latest()
    assert state is not None and (state.step, state.cursor, state.recipe_hash) == (3, {"epoch": 1}, "r")
    st.restore(state, other, other_optimizer)
    assert train(other, other_optimizer, range(3, 6)) == losses
    assert everything(other, other_optimizer) == unbroken
    assert other.head.weight is other.embed.weight


def test_the_gaussian_that_generators_keep_back_is_restored() -> None:
    random.gauss(0, 1)
    np.random.standard_normal()
    state = json.loads(json.dumps(st.capture_rng()))
    expected = [random.gauss(0, 1), np.random.standard_normal(), torch.rand(2).tolist()]
    st.restore_rng(state)
    assert [random.gauss(0, 1), np.random.standard_normal(), torch.rand(2).tolist()] == expected


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model, optimizer = build(0)
    path = ck.Checkpoints(tmp_path).save(st.capture(model, optimizer, step=1, cursor={}), keep=1)
    from safetensors import safe_open

    with safe_open(path / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert stored == set(model.state_dict()) - {"head.weight"}
    loaded = load(tmp_path, 1).model
    assert loaded.keys() == model.state_dict().keys()
    assert torch.equal(loaded["head.weight"], model.embed.weight)


def test_views_of_one_storage_survive(tmp_path: Path) -> None:
    big = torch.arange(12.0).reshape(3, 4)
    state = replace(
        small(1), model={"row": big[1], "column": big[:, 1], "turned": big.T, "scalar": big[0, 3]}
    )
    ck.Checkpoints(tmp_path).save(state, keep=1)
    assert same(load(tmp_path, 1), state)


def test_optimizer_state_goes_by_name_and_keeps_its_type() -> None:
    model, optimizer = build(0)
    train(model, optimizer, range(2))
    wide = torch.full((7, 8), 1 / 3, dtype=torch.float64)
    optimizer.state[model.embed.weight]["exp_avg"] = wide
    saved = st.optimizer_to_tensors(optimizer, dict(model.named_parameters()))
    assert "exp_avg/inner.weight" in saved.tensors and "step/norm.bias" in saved.tensors
    other, other_optimizer = build(1)
    st.restore_optimizer(other_optimizer, dict(other.named_parameters()), saved)
    restored = other_optimizer.state[other.embed.weight]["exp_avg"]
    assert restored.dtype == torch.float64 and torch.equal(restored, wide)
    assert restored.data_ptr() != wide.data_ptr()
    assert other_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 1e-2 / 2
    assert other_optimizer.param_groups[1]["betas"] == (0.9, 0.95)


def test_restoring_leaves_nothing_of_what_the_optimizer_knew() -> None:
    fresh, fresh_optimizer = build(0)
    model, optimizer = build(0)
    train(model, optimizer, range(2))
    st.restore(st.capture(fresh, fresh_optimizer, step=0, cursor={}), model, optimizer)
    assert everything(model, optimizer) == everything(fresh, fresh_optimizer)


@pytest.mark.fault("storage", "a checkpoint of another model", "refused")
def test_another_model_or_choice_of_parts_is_refused() -> None:
    model, optimizer = build(0)
    state = st.capture(model, optimizer, step=1, cursor={})
    with pytest.raises(CheckpointError, match="another model"):
        st.restore(replace(state, model={"w": torch.zeros(1)}), model, optimizer)
    fewer = torch.optim.AdamW([model.embed.weight], lr=1e-2)
    with pytest.raises(CheckpointError, match=r"inner\.bias"):
        st.restore(state, model, fewer)


# --- folders ------------------------------------------------------------------------------------


def test_round_trip_and_explicit_step(tmp_path: Path) -> None:
    folder = tmp_path / "a b" / "ü"
    assert ck.Checkpoints(folder).load_latest() is None and complete(folder) == {}
    for step in (5, 80, 1_000_000):
        path = ck.Checkpoints(folder).save(small(step), keep=9)
    assert path.name == "step-1000000" and sorted(complete(folder)) == [5, 80, 1_000_000]
    assert names(folder / "step-000080") == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert same(load(folder, 80), small(80))
    latest = ck.Checkpoints(folder).load_latest()
    assert latest is not None and same(latest, small(1_000_000))


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    ck.Checkpoints(tmp_path).save(small(1), keep=1)
    ck.Checkpoints(tmp_path).save(small(1, fill=7.0), keep=1)
    assert names(tmp_path) == ["step-000001"]
    assert same(load(tmp_path, 1), small(1, fill=7.0))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        ck.Checkpoints(tmp_path).save(small(step), keep=2)
    assert names(tmp_path) == ["step-000004", "step-000005"]


def test_pruning_counts_valid_checkpoints_only(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        ck.Checkpoints(tmp_path).save(small(step), keep=9)
    flip_bit(tmp_path / "step-000003" / "model.safetensors")
    (tmp_path / "step-000002" / "manifest.json").unlink()
    ck.Checkpoints(tmp_path).save(small(4), keep=2)
    assert "step-000001" in names(tmp_path)
    flip_bit(tmp_path / "step-000004" / "state.json")
    with pytest.warns(RuntimeWarning, match="set aside"):
        state = ck.Checkpoints(tmp_path).load_latest()
    assert state is not None and same(state, small(1))
    ck.Checkpoints(tmp_path).save(small(5), keep=1)
    assert names(tmp_path) == ["step-000005"]  # damaged ones older than what is kept go too


def test_an_older_step_saved_later_never_removes_itself_or_its_future(tmp_path: Path) -> None:
    for step in (80, 120):
        ck.Checkpoints(tmp_path).save(small(step), keep=2)
    ck.Checkpoints(tmp_path).save(small(100), keep=1)
    assert names(tmp_path) == ["step-000100", "step-000120"]


@pytest.mark.fault(
    "storage", "a full disk while a checkpoint is written", "the previous one stays, nothing beside it"
)
def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    ck.Checkpoints(tmp_path).save(small(1), keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(RunFolderError, match="cannot write"):
            ck.Checkpoints(tmp_path).save(small(2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-000001"]
    assert same(load(tmp_path, 1), small(1))


@pytest.mark.fault("storage", "a disk that refuses a checkpoint", "a sentence")
def test_a_disk_that_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    ck.Checkpoints(tmp_path).save(small(1), keep=1)
    monkeypatch.setattr("rlcs.train.checkpoint.write_tensors", refuse)
    with pytest.raises(RunFolderError, match=r"cannot write 68 bytes: No space left.*\n.*previous version"):
        ck.Checkpoints(tmp_path).save(small(2), keep=1)
    assert names(tmp_path) == ["step-000001"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_takes_no_second_copy_of_the_tensors(tmp_path: Path) -> None:
    """In a process of its own, for its own high-water mark (that of `getrusage` is handed down)."""
    run = subprocess.run(
        [sys.executable, __file__, str(tmp_path), "memory"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) < 64, "MiB, for a tensor of 256"


def memory_of_a_save(work: Path) -> float:
    """MiB beyond what the process had before."""

    def peak() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

    ck.Checkpoints(work).save(small(1), keep=1)  # what libraries take on first use
    state = replace(small(2), model={"w": torch.ones(64, 2**20)})
    before = peak()
    ck.Checkpoints(work).save(state, keep=1)
    return peak() - before


def test_a_file_may_be_read_by_whom_its_folder_may(tmp_path: Path) -> None:
    path = ck.Checkpoints(tmp_path).save(small(1), keep=1)
    assert {(path / name).stat().st_mode for name in FILES} == {(path / "state.json").stat().st_mode}


# --- what a save costs --------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of everything that is hashed."""
    sizes: list[int] = []

    class Counted:
        def __init__(self) -> None:
            self._digest = hashlib.sha256()
            self.hexdigest = self._digest.hexdigest

        def update(self, data: memoryview) -> None:
            sizes.append(len(data))
            self._digest.update(data)

    def file_digest(file: Any, name: str) -> Any:
        sizes.append(os.fstat(file.fileno()).st_size)
        return hashlib.file_digest(file, name)

    monkeypatch.setattr("rlcs.storage.hashlib", SimpleNamespace(sha256=Counted, file_digest=file_digest))
    return sizes


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.name != "manifest.json")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_save_hashes_what_it_writes_and_reads_nothing(tmp_path: Path, hashed: list[int]) -> None:
    checkpoints = ck.Checkpoints(tmp_path)
    state = replace(small(1), model={"w": torch.ones(1000, 1000)})
    for step in (1, 2, 3, 4):
        hashed.clear()
        before = bytes_read()
        checkpoints.save(replace(state, step=step), keep=3)
        assert sum(hashed) == size_of(tmp_path / f"step-{step:06d}") > 4e6
        assert bytes_read() - before < 20_000, "of 4 MB in each checkpoint"
    assert names(tmp_path) == ["step-000002", "step-000003", "step-000004"]


def test_a_checkpoint_is_verified_once_when_it_is_read_and_not_when_others_are_pruned(
    tmp_path: Path, hashed: list[int]
) -> None:
    for step in (1, 2):
        ck.Checkpoints(tmp_path).save(small(step), keep=3)
    checkpoints = ck.Checkpoints(tmp_path)
    hashed.clear()
    assert checkpoints.load_latest() is not None
    assert sum(hashed) == size_of(tmp_path / "step-000002")
    hashed.clear()
    checkpoints.save(small(3), keep=2)
    assert sum(hashed) == size_of(tmp_path / "step-000003")


def test_a_checkpoint_that_changed_since_it_was_written_is_read_before_it_counts(
    tmp_path: Path, hashed: list[int]
) -> None:
    checkpoints = ck.Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(small(step), keep=3)
    flip_bit(tmp_path / "step-000003" / "model.safetensors")
    hashed.clear()
    checkpoints.save(small(4), keep=2)
    assert {"step-000002", "step-000004"} <= set(names(tmp_path)), "the damaged one does not count"
    assert sum(hashed) > size_of(tmp_path / "step-000004")


# --- in the background --------------------------------------------------------------------------


@pytest.fixture
def may_write(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Files are written only once this is set."""
    event = threading.Event()
    write = ck.write_tensors

    def slow(path: Path, tensors: dict[str, Tensor]) -> ck.FileSum:
        assert event.wait(60)
        return write(path, tensors)

    monkeypatch.setattr(ck, "write_tensors", slow)
    return event


def until(condition: Callable[[], object]) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < 60
        time.sleep(0.01)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, may_write: threading.Event) -> None:
    model, optimizer = build(0)
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    checkpoints = ck.Checkpoints(tmp_path)
    checkpoints.start(st.capture(model, optimizer, step=2, cursor={"epoch": 1}), keep=1)
    train(model, optimizer, range(2, 4))
    checkpoints.poll()
    assert complete(tmp_path) == {}, "it appears only when it is written"
    may_write.set()

    def finished() -> bool:
        checkpoints.poll()
        return bool(complete(tmp_path))

    until(finished)
    state = ck.Checkpoints(tmp_path).load_latest()
    assert state is not None
    other, other_optimizer = build(1)
    st.restore(state, other, other_optimizer)
    assert everything(other, other_optimizer) == before


def test_a_save_waits_for_the_one_before_and_takes_no_more_memory(
    tmp_path: Path, may_write: threading.Event
) -> None:
    checkpoints = ck.Checkpoints(tmp_path)
    checkpoints.start(small(1), keep=2)
    buffer = checkpoints._copies._buffer.data_ptr()
    second = threading.Thread(target=lambda: checkpoints.start(small(2), keep=2))
    second.start()
    second.join(0.2)
    assert second.is_alive() and complete(tmp_path) == {}
    may_write.set()
    second.join(60)
    assert sorted(complete(tmp_path)) == [1]
    checkpoints.wait()
    assert same(load(tmp_path, 1), small(1)) and same(load(tmp_path, 2), small(2))
    assert checkpoints._copies._buffer.data_ptr() == buffer


@pytest.mark.fault("storage", "a full disk under a checkpoint in the background", "reported at the next step")
@pytest.mark.parametrize("finish", ["poll", "wait", "start"])
def test_a_full_disk_is_reported_when_training_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finish: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    checkpoints = ck.Checkpoints(tmp_path)
    checkpoints.save(small(1), keep=1)
    monkeypatch.setattr("rlcs.train.checkpoint.write_tensors", refuse)
    checkpoints.start(small(2), keep=1)
    until(lambda: checkpoints._unfinished and checkpoints._unfinished.files.done())
    again = (
        partial(checkpoints.start, small(3), keep=1) if finish == "start" else getattr(checkpoints, finish)
    )
    with pytest.raises(RunFolderError, match=r"cannot write 68 bytes: No space left.*\n.*previous version"):
        again()
    assert names(tmp_path) == ["step-000001"]


@pytest.mark.fault("limits", "no memory for a copy of a checkpoint", "training waits for the write")
def test_without_memory_for_a_copy_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rlcs.train.host_copies.free_memory", lambda: 100)
    checkpoints = ck.Checkpoints(tmp_path)
    for step in (1, 2):
        state = replace(small(step), model={"w": torch.ones(9)})
        checkpoints.start(state, keep=2)
        state.model["w"].zero_()
        checkpoints.wait()
        assert load(tmp_path, step).model["w"].sum() == 9
    assert caplog.text.count("training waits while checkpoints are written") == 1


def test_memory_is_what_a_container_has_left(tmp_path: Path) -> None:
    for name, text in {"max": "5000", "current": "4000", "stat": "anon 1\nactive_file 500\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert host_copies.free_memory(tmp_path) == 1500
    (tmp_path / "memory.max").write_text("max\n")
    machine = psutil.virtual_memory().available
    assert host_copies.free_memory(tmp_path) == pytest.approx(machine, rel=0.2)
    assert host_copies.free_memory(tmp_path / "none") == pytest.approx(machine, rel=0.2)


# --- damage -------------------------------------------------------------------------------------


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(share: float) -> Callable[[Path], None]:
    # Two bytes at least: the last one of a JSON file is a line end, which nobody misses.
    return lambda path: os.truncate(path, min(int(path.stat().st_size * share), path.stat().st_size - 2))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit": flip_bit,
    "empty": truncate(0.0),
    "half": truncate(0.5),
    "tail": truncate(1.0),
    "removed": Path.unlink,
}
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.fault(
    "storage", "each file of a checkpoint damaged, cut or gone", "set aside; the one before is taken"
)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_set_aside_and_survived(tmp_path: Path, file: str, damage: str) -> None:
    for step in (1, 2):
        ck.Checkpoints(tmp_path).save(small(step), keep=2)
    DAMAGES[damage](tmp_path / "step-000002" / file)
    with pytest.raises(CheckpointError):
        load(tmp_path, 2)
    assert "step-000002" in names(tmp_path)  # an explicit step is neither moved nor replaced
    with pytest.warns(RuntimeWarning, match=r"step-000002\.bad"):
        state = ck.Checkpoints(tmp_path).load_latest()
    assert state is not None and same(state, small(1))
    assert names(tmp_path) == ["step-000001", "step-000002.bad"]


def swap_manifest(folder: Path) -> None:
    shutil.copy(folder / "step-000001" / "manifest.json", folder / "step-000002" / "manifest.json")


def wrong_name(folder: Path) -> None:
    shutil.rmtree(folder / "step-000002")
    shutil.copytree(folder / "step-000001", folder / "step-000002")


def empty_manifest(folder: Path) -> None:
    (folder / "step-000002" / "manifest.json").write_text('{"files": {}}')
    (folder / "step-000002" / "model.safetensors").unlink()


def other_format(folder: Path) -> None:
    path = folder / "step-000002" / "state.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"format": 999}))
    seal(path.parent)


@pytest.mark.fault("storage", "checkpoints with files of others", "not believed")
@pytest.mark.parametrize("mix_up", [swap_manifest, wrong_name, empty_manifest, other_format])
def test_mixed_up_folders_are_not_believed(tmp_path: Path, mix_up: Callable[[Path], None]) -> None:
    for step in (1, 2):
        ck.Checkpoints(tmp_path).save(small(step), keep=2)
    mix_up(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"step-000002\.bad"):
        state = ck.Checkpoints(tmp_path).load_latest()
    assert state is not None and same(state, small(1))


@pytest.mark.fault("storage", "no checkpoint left that is whole", "a sentence")
def test_nothing_left_to_fall_back_to(tmp_path: Path) -> None:
    for _ in range(2):  # the second time `.bad` is taken
        ck.Checkpoints(tmp_path).save(small(1), keep=1)
        flip_bit(tmp_path / "step-000001" / "state.json")
        with pytest.warns(RuntimeWarning):
            assert ck.Checkpoints(tmp_path).load_latest() is None
    assert names(tmp_path) == ["step-000001.bad", "step-000001.bad-2"]


def test_folders_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    ck.Checkpoints(tmp_path).save(small(1), keep=1)
    for name in ("step-000009.tmp-77", "step-9", "my-step-000009", "step-000009-copy"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000010").write_text("a file")
    state = ck.Checkpoints(tmp_path).load_latest()
    assert state is not None and state.step == 1
    assert "step-000009.tmp-77" not in names(tmp_path), "what a killed save left may be large"
    ck.Checkpoints(tmp_path).save(small(2), keep=1)
    assert "step-9" in names(tmp_path) and "step-000009-copy" in names(tmp_path)


# --- death at every moment of a save ------------------------------------------------------------

EVENTS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.scandir",
    "os.listdir",
    "shutil.rmtree",
}


def plain_save(folder: Path) -> tuple[list[st.TrainState], int, list[st.TrainState]]:
    """What lies there before, and: the states to save, how many to keep, what may be found after."""
    ck.Checkpoints(folder).save(small(1), keep=1)
    return [small(2)], 1, [small(1), small(2)]


def same_step(folder: Path) -> tuple[list[st.TrainState], int, list[st.TrainState]]:
    """A step that is written a second time."""
    ck.Checkpoints(folder).save(small(1), keep=1)
    return [small(1, fill=5.0)], 1, [small(1), small(1, fill=5.0)]


def after_deaths(folder: Path) -> tuple[list[st.TrainState], int, list[st.TrainState]]:
    """Leftovers of earlier deaths: a half save, and a replacement that died between its renames."""
    for step in (1, 2):
        ck.Checkpoints(folder).save(small(step), keep=2)
    shutil.copytree(folder / "step-000001", folder / "step-000002.tmp-1")
    (folder / "step-000002").rename(folder / "step-000002.old")
    return [small(3)], 2, [small(2), small(3)]


def dies_at(event_number: int, act: Callable[[], object]) -> bool:
    """Fork, kill the child at that audit event of `act`; whether it died (false: it finished)."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, arguments: Any) -> None:
            nonlocal seen
            if event == "pickle.find_class":
                os._exit(3)
            if event in EVENTS:
                seen += 1
                if seen == event_number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        act()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def in_background(folder: Path) -> tuple[list[st.TrainState], int, list[st.TrainState]]:
    """A state that is written while the process goes on, until the next is to be saved."""
    ck.Checkpoints(folder).save(small(1), keep=1)
    states = [small(1), small(2), small(3)]
    return states[1:], 2, states


def save_all(folder: Path, states: list[st.TrainState], keep: int) -> None:
    """Save a state at once, several in the background."""
    checkpoints = ck.Checkpoints(folder)
    if len(states) == 1:
        checkpoints.save(states[0], keep=keep)
    for state in states if len(states) > 1 else ():
        checkpoints.start(state, keep=keep)
        while checkpoints._unfinished:
            checkpoints.poll()
    checkpoints.wait()


def kill_matrix(work: Path) -> dict[str, list[int]]:
    """For every way to save: how often a death left the old state, and how often the new one."""
    os.fsync = lambda _: None  # matters to power cuts, not to kills, and costs most of the time
    warnings.simplefilter("error")  # a death must never leave a damaged folder under a good name
    results = {}
    for prepare in (plain_save, same_step, after_deaths, in_background):
        base = work / prepare.__name__
        new, keep, allowed = prepare(base)
        counts, event, died = [0] * len(allowed), 0, True
        while died:
            event += 1
            folder = work / "now"
            shutil.copytree(base, folder)
            died = dies_at(event, partial(save_all, folder, new, keep))
            for step in complete(folder):
                load(folder, step)  # what bears a good name is whole, removals included
            found = ck.Checkpoints(folder).load_latest()
            assert found is not None, names(folder)
            matches = [same(found, state) for state in allowed]
            assert any(matches), (event, found.step, names(folder))
            counts[matches.index(True)] += 1
            ck.Checkpoints(folder).save(small(9), keep=1)
            assert names(folder) == ["step-000009"], names(folder)
            shutil.rmtree(folder)
        assert matches[-1], "the last one did not die"
        results[prepare.__name__] = counts
    return results


@pytest.mark.fault(
    "kills", "SIGKILL at every file event of one save", "the previous checkpoint or the new one, whole"
)
def test_killed_at_every_event_of_a_save(tmp_path: Path) -> None:
    """In a process of its own with one thread, since it forks."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert len(results) == 4
    for name, (before, *after) in results.items():
        assert before >= 10 and min(after) >= 2, (name, before, after)


if __name__ == "__main__":
    work = memory_of_a_save if "memory" in sys.argv else kill_matrix
    print(json.dumps(work(Path(sys.argv[1]))))  # noqa: T201
