"""The disk and the folder of whole commands: full, failing, damaged, moved, foreign names, another writer.

Without `--every-kill` most are tried on the shortest command, and at few places.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stories import COMMON, STORIES, contents, differences, runner, spread, undisturbed

from rlcs.storage.locks import hold

__all__ = ["runner", "undisturbed"]


@pytest.fixture
def every(request) -> bool:
    return request.config.getoption("every_kill")


@pytest.fixture
def story(every) -> str:
    """The command on which what is not about training is tried."""
    return "sft" if every else "distill"


def ends_well(runner, undisturbed, story, folder) -> None:
    """The same command goes on and leaves what an undisturbed one does. Raises AssertionError."""
    assert runner.run(story, folder).statuses == [0], Path(f"{folder}.log").read_text()
    assert not differences(undisturbed.of(story)[0], folder)


@pytest.mark.fault("storage", "files cannot grow beyond a limit (as on a full disk) at various sizes",
                   "a sentence; with space the same command ends with the same bytes")  # fmt: skip
@pytest.mark.parametrize("size", [0, 300, 2_000, 20_000, 1_000_000, 6_000_000])
def test_a_full_disk_in_a_run(runner, undisturbed, tmp_path, size, every):
    if not every and size not in (300, 1_000_000):
        pytest.skip("`make test-faults` tries more sizes")
    story = "distill" if size < 1_000 else "sft"
    first = runner.run(story, tmp_path / "run", file_bytes=size)
    text = (tmp_path / "run.log").read_text()
    assert first.statuses == [2] and "Traceback" not in text, text
    ends_well(runner, undisturbed, story, tmp_path / "run")


NEVER = 10**9
FAILURES = {
    "a file system that becomes read-only": (errno.EROFS, NEVER),
    "a file system that refuses access": (errno.EACCES, NEVER),
    "a network file system whose handles go stale": (errno.ESTALE, NEVER),
    "one stale handle of a network file system": (errno.ESTALE, 1),
    "a disk that reports errors": (errno.EIO, NEVER),
    "a quota that is used up": (errno.EDQUOT, NEVER),
}
"""What happens to file events, the error of each, and how many events have it."""


@pytest.mark.fault("storage", "from any file event on: read-only, no access, stale handles, errors, no quota",
                   "a sentence; once it is well the same command ends with the same bytes")  # fmt: skip
@pytest.mark.parametrize("failure", FAILURES)
def test_a_file_system_that_fails(runner, undisturbed, tmp_path, failure, story, every, record_property):
    number, count = FAILURES[failure]
    events = len(undisturbed.of(story)[1][0])
    points = spread(events, 8 if every else 2)
    record_property("times", len(points))
    for point in points:
        folder = tmp_path / f"run-{point}"
        first = runner.run(story, folder, errors=(point, point + count - 1, number))
        text = Path(f"{folder}.log").read_text()
        assert first.statuses[0] in (0, 2) and "Traceback" not in text, f"{point}: {first}, {text}"
        ends_well(runner, undisturbed, story, folder)


@pytest.mark.fault("limits", "a time of day that jumps by hours, forwards and back", "the same bytes")
def test_a_clock_that_jumps(runner, undisturbed, tmp_path, story):
    assert runner.run(story, tmp_path / "run", clock_jumps=True).statuses == [0]
    assert not differences(undisturbed.of(story)[0], tmp_path / "run")


@pytest.mark.fault(
    "storage", "a run folder that is moved between a kill and the next start", "the same bytes"
)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_folder_that_is_moved(runner, undisturbed, tmp_path, story, share):
    at = int(share * len(undisturbed.of(story)[1][0]))
    first = runner.run(story, tmp_path / "run", signals=[(at, int(signal.SIGKILL))])
    assert first.statuses == [-signal.SIGKILL]
    (tmp_path / "run").rename(tmp_path / "moved")
    ends_well(runner, undisturbed, story, tmp_path / "moved")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "cut to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "a bit flipped": flip,
}


@pytest.mark.fault("storage", "each file of a finished run deleted, cut, emptied, or one bit of it flipped",
                   "a sentence, or the same command leaves all other files as they were")  # fmt: skip
@pytest.mark.parametrize("damage", DAMAGES)
def test_files_of_a_run_are_damaged(runner, undisturbed, tmp_path, damage, story, every, record_property):
    expected = undisturbed.of(story)[0]
    ends_well(runner, undisturbed, story, tmp_path / "whole")
    files = [
        path for path in sorted((tmp_path / "whole").rglob("*")) if path.is_file() and path.stat().st_size
    ]
    names = [str(path.relative_to(tmp_path / "whole")) for path in files if path.name != "lock"]
    chosen = names if every else names[:: len(names) // 4]
    record_property("times", len(chosen))
    for name in chosen:
        folder = shutil.copytree(tmp_path / "whole", tmp_path / "run")
        DAMAGES[damage](folder / name)
        done = runner.run(story, folder)
        text = (tmp_path / "run.log").read_text()
        assert done.statuses[0] in (0, 1, 2) and "Traceback" not in text, f"{name}: {done.statuses}, {text}"
        if done.statuses == [0]:
            wrong = [each for each in differences(expected, folder) if not each.startswith(f"{name} ")]
            assert not wrong, f"{name}: {wrong}"
        shutil.rmtree(folder)
        (tmp_path / "run.log").unlink()


@pytest.mark.fault("storage", "a home folder that is missing or cannot be written", "the same bytes")
@pytest.mark.parametrize("home", [None, "/nowhere", "/dev/null"])
def test_without_a_home(runner, undisturbed, tmp_path, home, story):
    assert runner.run(story, tmp_path / "run", environ={"HOME": home}).statuses == [0]
    assert not differences(undisturbed.of(story)[0], tmp_path / "run")


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
        outcome = runner.run(command, folder)
        text = (tmp_path / "run.log").read_text()
        assert outcome.statuses == [2] and f"process {os.getpid()} on" in text, text
        assert [*contents(folder)] == ["lock"]
