"""The disk and the folder of whole commands: full, long and foreign names, no home, another writer."""

import os
import subprocess
import sys

import pytest
from stories import COMMON, STORIES, contents, differences, runner, undisturbed

from rlcs.storage.locks import hold

__all__ = ["runner", "undisturbed"]


@pytest.mark.fault("storage", "files cannot grow beyond a limit (as on a full disk) at various sizes",
                   "a sentence; with space the same command ends with the same bytes")  # fmt: skip
@pytest.mark.parametrize("size", [0, 300, 2_000, 20_000, 1_000_000, 6_000_000])
def test_a_full_disk_in_a_run(runner, undisturbed, tmp_path, size):
    folder = tmp_path / "run"
    first = runner.run("sft", folder, file_bytes=size)
    text = (tmp_path / "run.log").read_text()
    assert first.statuses == [2] and "Traceback" not in text, text
    assert runner.run("sft", folder).statuses == [0]
    assert not differences(undisturbed.of("sft")[0], folder)


@pytest.mark.fault("storage", "a home folder that is missing or cannot be written", "the same bytes")
@pytest.mark.parametrize("home", [None, "/nowhere", "/dev/null"])
def test_without_a_home(runner, undisturbed, tmp_path, home):
    folder = tmp_path / "run"
    assert runner.run("sft", folder, environ={"HOME": home}).statuses == [0]
    assert not differences(undisturbed.of("sft")[0], folder)


@pytest.mark.fault("storage", "run folders with long and non-ASCII names", "the same bytes")
@pytest.mark.parametrize("name", ["Läufe für 数学 \u2028 🦉", "x" * 255, "/".join(["y" * 200] * 12)])
def test_long_and_foreign_names(runner, undisturbed, tmp_path, name):
    folder = tmp_path / name
    outcome = runner.run("distill", folder, log=str(tmp_path / "log"))
    assert outcome.statuses == [0], (tmp_path / "log").read_text()
    assert not differences(undisturbed.of("distill")[0], folder)


@pytest.mark.fault(
    "storage", "a non-ASCII folder where the locale is C", "a sentence; as it says, the same bytes"
)
def test_a_foreign_name_in_the_c_locale(undisturbed, tmp_path):
    folder = tmp_path / "Läufe 数学"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "rlcs", *STORIES["distill"], "--out", folder]
    for utf8, status in (("0", 2), ("1", 0)):
        environment["PYTHONUTF8"] = utf8
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert status == 0 or "export PYTHONUTF8=1" in done.stderr
    assert not differences(undisturbed.of("distill")[0], folder)


@pytest.mark.fault("storage", "a run folder that is a file, or lies in one", "a sentence before any work")
def test_a_folder_that_cannot_be_made(runner, tmp_path):
    (tmp_path / "taken").write_text("")
    for name in ("taken", "taken/run"):
        outcome = runner.run("sft", tmp_path / name, log=str(tmp_path / "log"))
        text = (tmp_path / "log").read_text()
        assert outcome.statuses == [2] and "Traceback" not in text, text
    assert (tmp_path / "taken").read_text() == ""


WRITERS = {
    "run": ["run", "quickstart", *COMMON],
    "sft": ["sft", "quickstart", *COMMON],
    "grpo": ["grpo", "quickstart", *COMMON],
    "quickstart": ["quickstart", *COMMON],
    "ablate": ["ablate", "quickstart", *COMMON],
    "ablate seeds": ["ablate", "quickstart", *COMMON, "--seeds", "2"],
    "coldstart": ["coldstart", "quickstart", *COMMON, "validation.problems=1"],
    "distill": ["distill", "quickstart", COMMON[0]],
    "eval": ["eval", "builtin", "--benchmarks", "mathvista"],
}


@pytest.mark.fault("locks", "each command that writes, in a folder that another process holds",
                   "refused before any work, nothing written")  # fmt: skip
@pytest.mark.parametrize("command", WRITERS)
def test_every_command_that_writes_respects_the_lock(runner, tmp_path, command, monkeypatch):
    monkeypatch.setitem(STORIES, command, WRITERS[command])
    folder = tmp_path / "run"
    with hold(folder):
        outcome = runner.run(command, folder, quiet=command != "eval")
        text = (tmp_path / "run.log").read_text()
        assert outcome.statuses == [2] and f"process {os.getpid()} on" in text, text
        assert [*contents(folder)] == ["lock"]
