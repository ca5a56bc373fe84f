"""Trackers: real TensorBoard and trackio, wandb offline; a step is sent once; a broken one hurts nobody."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlcs.errors import RecipeError
from rlcs.recipe.execution import Trackers as Settings
from rlcs.recipe.loading import load_recipe
from rlcs.records import StepReport
from rlcs.train import trackers
from rlcs.train.metrics import MetricsLog


def step(number: int, reward: float = 0.5) -> StepReport:
    return StepReport(
        stage="grpo", step=number, steps=20, values={"reward": reward}, seconds={"rollout": number / 10}
    )


def attempt(settings: Settings, folder: Path, steps: range, *, cut: int | None = None) -> None:
    """One attempt of a stage, as `RunDir` does it: resume (the file cut at `cut`), then steps."""
    folder.mkdir(parents=True, exist_ok=True)
    log, sent = MetricsLog(folder / "metrics.jsonl"), trackers.Trackers(settings, folder, stage="grpo")
    sent.skip_what_was_sent()
    if cut is not None:
        log.resume_from(cut)
    for number in steps:
        log.append(step(number))
        sent.append(step(number))
    sent.close()


def three_attempts(settings: Settings, folder: Path) -> None:
    """Stopped at 7, again at 5 (from checkpoint 4), then through: 1 to 9."""
    attempt(settings, folder, range(1, 8))
    attempt(settings, folder, range(5, 6), cut=4)
    attempt(settings, folder, range(5, 10), cut=4)


def events(folder: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    read.Reload()
    return {tag: [event.step for event in read.Tensors(tag)] for tag in read.Tags()["tensors"]}


def test_tensorboard_has_every_step_once_over_three_attempts(tmp_path):
    folder = tmp_path / "run" / "grpo"
    three_attempts(Settings(tensorboard=True), folder)
    found = events(folder)
    assert set(found) == {"grpo/reward", "grpo/seconds/rollout"}
    assert found["grpo/reward"] == list(range(1, 10))


def test_trackio_has_every_step_once_over_three_attempts(tmp_path):
    program = (
        "from pathlib import Path; from test_trackers import *\n"
        f"three_attempts(Settings(trackio='demo'), Path({str(tmp_path / 'run' / 'grpo')!r}))\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=Path(__file__).parent, env=environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "standard output belongs to the run"
    assert "failed" not in done.stderr
    read = (
        "import trackio, json\n"
        "run, = trackio.Api().runs('demo')\n"
        "print(json.dumps(run.name))\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "print(json.dumps([row['step'] for row in SQLiteStorage.get_logs('demo', run.name)]))\n"
    )
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", read], env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    name, steps = shown.stdout.splitlines()[-2:]
    assert json.loads(name).startswith("run-grpo-")
    assert json.loads(steps) == list(range(1, 10))


def test_wandb_offline_writes_every_step(tmp_path):
    pytest.importorskip("wandb")
    folder = tmp_path / "run" / "grpo"
    program = (
        "from pathlib import Path; from test_trackers import *\n"
        f"three_attempts(Settings(wandb='demo'), Path({str(folder)!r}))\n"
    )
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=Path(__file__).parent, env=environment,
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "failed" not in done.stderr
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert files and len({path.stem for path in files}) == 1, "every attempt goes on in the same run"
    assert sum(path.read_bytes().count(b"grpo/reward") for path in files) >= 9


@pytest.mark.fault("engines", "a tracker that fails", "told once; the run goes on")
def test_a_tracker_that_raises_is_told_once_and_left_after_three_failures(tmp_path, monkeypatch, caplog):
    calls = []

    class Broken(trackers._TensorBoard):
        def log(self, values, number):
            calls.append(number)
            raise ConnectionError("the network is gone")

    monkeypatch.setitem(trackers._KINDS, "trackio", Broken)
    with caplog.at_level(logging.WARNING):
        attempt(Settings(tensorboard=True, trackio="demo"), tmp_path / "run" / "grpo", range(1, 10))
    told = [record.message for record in caplog.records]
    assert len(told) == 1 and "trackio" in told[0] and "network is gone" in told[0]
    assert calls == [1, 2, 3], "a dead service is not asked for ever"
    assert events(tmp_path / "run" / "grpo")["grpo/reward"] == list(range(1, 10)), "the neighbour is unharmed"


def test_one_failure_in_the_middle_loses_one_step(tmp_path, monkeypatch):
    real = trackers._TensorBoard

    class Flaky(real):
        def log(self, values, number):
            if number == 3:
                raise TimeoutError("late")
            super().log(values, number)

    monkeypatch.setitem(trackers._KINDS, "tensorboard", Flaky)
    attempt(Settings(tensorboard=True), tmp_path / "grpo", range(1, 6))
    assert events(tmp_path / "grpo")["grpo/reward"] == [1, 2, 4, 5]


def test_a_missing_package_is_told_before_the_run(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="wandb is not installed") as caught:
        trackers.require_installed(load_recipe("quickstart", ["trackers.wandb=mine"]).recipe.trackers)
    assert "pip install wandb" in str(caught.value)
    trackers.require_installed(Settings())


def test_no_tracker_leaves_no_trace(tmp_path):
    attempt(Settings(), tmp_path / "grpo", range(1, 3))
    assert [path.name for path in (tmp_path / "grpo").iterdir()] == ["metrics.jsonl"]
