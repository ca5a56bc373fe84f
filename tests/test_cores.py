"""Threads follow from the cores that a process may use, and their settings arrive before torch is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlcs.cores import Cores, explain_threads, find_cores, thread_settings

EIGHT = Cores(machine=8, allowed=8)


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 8)


def system(root: Path, own: str, files: dict[str, str]) -> Path:
    """Write what a process reads about its control groups."""
    for name, text in {"proc/self/cgroup": own, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "300000 100000\n"}, 2),
        ("0::/docker/of-the-host\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
        ("1:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
        ("3:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "1\n", "cpu/cpu.cfs_period_us": "1\n"}, None),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "100000\n"}, None),
        ("0::/\n", {"cpu.max": "100000 0\n"}, None),
        ("0::/\n", {"cpu.max": "many\n"}, None),
        ("no such line", {}, None),
        ("", {}, None),
    ],
)
def test_the_quota_of_a_container(own: str, files: dict[str, str], quota: float, tmp_path: Path) -> None:
    root = system(tmp_path, own, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert find_cores(root) == Cores(machine=8, allowed=8, quota=quota)


def test_a_system_without_control_groups_or_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert find_cores(tmp_path) == Cores(machine=1, allowed=1)


@pytest.mark.parametrize(
    ("allowed", "quota", "usable"), [(8, None, 8), (2, None, 2), (8, 1.5, 2), (8, 0.2, 1), (2, 4.0, 2)]
)
def test_what_can_be_kept_busy(
    allowed: int, quota: float | None, usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(allowed)))
    text = "max 100000" if quota is None else f"{round(quota * 100_000)} 100000"
    assert find_cores(system(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": text})).usable == usable


@pytest.mark.parametrize(
    ("cores", "environment", "threads"),
    [
        (EIGHT, {}, None),  # torch's own choice stays, and with it every number of a run
        (Cores(machine=8, allowed=4), {}, None),  # torch heeds the affinity itself
        (Cores(machine=8, allowed=8, quota=2.5), {}, "3"),
        (Cores(machine=8, allowed=8, quota=16.0), {}, None),
        (Cores(machine=32, allowed=32, quota=20.0), {}, "8"),  # 8 physical ones
        (Cores(machine=8, allowed=8, quota=2.5), {"OMP_NUM_THREADS": "5"}, None),
        (Cores(machine=8, allowed=8, quota=2.5), {"MKL_NUM_THREADS": "5"}, None),
        (EIGHT, {"LOCAL_WORLD_SIZE": "3"}, "2"),
        (EIGHT, {"LOCAL_WORLD_SIZE": "16"}, "1"),
        (EIGHT, {"LOCAL_WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}, None),  # as torchrun sets it
        (EIGHT, {"LOCAL_WORLD_SIZE": "none"}, None),
    ],
)
def test_the_number_of_threads(cores: Cores, environment: dict[str, str], threads: str | None) -> None:
    assert thread_settings(cores, environment).get("OMP_NUM_THREADS") == threads


def test_threads_that_wait_soon_sleep_unless_the_user_wants_otherwise() -> None:
    assert thread_settings(EIGHT, {}) == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}
    for own in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        assert thread_settings(EIGHT, {own: "1"}) == {}


@pytest.mark.parametrize(
    ("cores", "environment", "why"),
    [
        (EIGHT, {}, "torch's choice, one for each physical core"),
        (Cores(machine=8, allowed=4), {}, "this process may run on 4 of them"),
        (Cores(machine=8, allowed=8, quota=1.5), {}, "the container's quota is 1.5 of them"),
        (EIGHT, {"LOCAL_WORLD_SIZE": "2"}, "2 ranks share them"),
        (EIGHT, {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
         "torchrun gives each rank one, unless OMP_NUM_THREADS is set"),
        (EIGHT, {"OMP_NUM_THREADS": "5"}, "OMP_NUM_THREADS is 5"),
        (Cores(machine=8, allowed=8, quota=1.5), {"MKL_NUM_THREADS": "3"}, "MKL_NUM_THREADS is 3"),
    ],
)  # fmt: skip
def test_why_so_many(cores: Cores, environment: dict[str, str], why: str) -> None:
    complete = environment | thread_settings(cores, environment)
    text = explain_threads(cores, complete, 2)
    waits = "soon sleep while they wait (OMP_WAIT_POLICY passive)"
    assert text == f"8 cores; threads for torch: 2 ({why}), which {waits}"


def test_threads_that_spin_are_named() -> None:
    assert "spin while they wait (OMP_WAIT_POLICY active)" in explain_threads(
        EIGHT, {"OMP_WAIT_POLICY": "ACTIVE"}, 8
    )
    assert "spin while they wait (OMP_WAIT_POLICY not set)" in explain_threads(EIGHT, {}, 8)


def test_the_policy_arrives_before_torch_is_loaded() -> None:
    """OpenMP reads its variables once, when torch loads it, and says what it read."""
    program = (
        "import sys\n"
        "from rlcs.cli import main\n"
        "assert 'torch' not in sys.modules\n"
        "main.app = lambda **_: __import__('torch')\n"
        "main.main()"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert "GOMP_SPINCOUNT = '3000'" in done.stderr, "how often a thread looks before it sleeps"
