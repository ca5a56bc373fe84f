"""A long run stays as it began: memory, handles, threads, bytes written and CPU time of a step.

3,000 steps, each on one tree of two short answers: a quarter of an hour, so only with `--every-kill`.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

STEPS = 3_000
SETTINGS = (
    "study.preflight=off",
    "data.rl=builtin:puzzles?count=40&seed=2&levels=1",
    "data.test=builtin:puzzles?split=test&count=2&seed=3",
    f"grpo.steps={STEPS}",
    "grpo.prompts_per_step=1",
    "grpo.group_size=2",
    "grpo.optimizer_steps=1",
    "grpo.max_new_tokens=4",
    "grpo.save_every=20",
    "grpo.keep_checkpoints=1",
    "grpo.reward.workers=1",
    "grpo.reward.accuracy=0",
    "rollout.checks=0",
    "eval.max_new_tokens=4",
    "images.workers=1",
)


def size(folder: Path) -> int:
    """Bytes of all files of a folder; what is removed meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def watched(run: Path, command: list[str], log: Path) -> list[dict[str, float]]:
    """Run the command; how large its process is whenever it has done another 1% of its steps."""
    metrics = run / "grpo" / "metrics.jsonl"
    seen: list[dict[str, float]] = []
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        own = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(0.05)
            done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if done < STEPS // 10 or done >= STEPS or (seen and done < seen[-1]["step"] + STEPS / 100):
                continue
            with own.oneshot():
                seen.append(
                    {
                        "step": done,
                        "cpu": sum(own.cpu_times()[:2]),
                        "memory": own.memory_info().rss,
                        "handles": own.num_fds(),
                        "threads": own.num_threads(),
                        "children": len(own.children(recursive=True)),
                        "bytes": size(run),
                    }
                )
    assert process.returncode == 0, log.read_text()
    return seen


def rate(rows: list[dict[str, float]], name: str) -> float:
    """How much of it a step adds."""
    return (rows[-1][name] - rows[0][name]) / (rows[-1]["step"] - rows[0]["step"])


@pytest.mark.fault(
    "limits", "thousands of steps in one process", "memory, handles, folder and CPU time a step stay flat"
)
def test_a_long_run_stays_as_it_began(
    random_model_folder: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    if not pytestconfig.getoption("every_kill"):
        pytest.skip("a quarter of an hour: `make test-faults`")
    run, reward = tmp_path / "run", tmp_path / "reward.py"
    reward.write_text(
        "def score(problem, response):\n    return float(len(response) % 2)\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "rlcs", "grpo", "quickstart", f"model.name={random_model_folder}"]
    seen = watched(
        run,
        [*command, "--out", str(run), *SETTINGS, f"grpo.reward.functions={{{reward}:score: 1}}"],
        tmp_path / "log",
    )
    half = len(seen) // 2
    first, last = seen[:half], seen[half:]
    assert half >= 10, "too few looks to compare"
    for name in ("handles", "threads", "children"):
        assert statistics.median(r[name] for r in last) <= max(r[name] for r in first), name
    # An allocator keeps some blocks of what it got; a list that grows with every step would show.
    grown = statistics.median(r["memory"] for r in last) - statistics.median(r["memory"] for r in first)
    assert grown <= 24 * 2**20 + 2_000 * STEPS, f"{grown / 2**20:.1f} MiB more in the second half"
    assert rate(last, "bytes") <= 1.1 * rate(first, "bytes") + 200
    # CPU time, since other processes may come and go; steps that slow down with their number would double.
    assert rate(last, "cpu") <= 1.3 * rate(first, "cpu")
    rows = [json.loads(line) for line in (run / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
