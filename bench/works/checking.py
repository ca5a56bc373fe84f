"""Files with 1,000 to 1,000,000 rows: `rlcs data check`, and the start of a run.

Seconds, and the most memory of all processes. A run starts twice, as `rlcs grpo --dry-run` does, which also
tries all stages: the second start finds the rows on disk. There is no peer: no other trainer looks at gold
answers before it trains. Two rows in five are numbers, one in five each a letter, a fraction and a multiple
of pi; nearly all are different, which is the slow case.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from bench.loading import memory
from bench.pairs import Options, Pair, row
from bench.table import Row
from bench.works.sweeps import exponent

SIZES = (1_000, 10_000, 100_000, 1_000_000)
PHASES = ("data check", "first start", "later start")
EVERY_S = 0.05
"""How often memory is looked at."""


def rows(options: Options) -> list[Row]:
    """Rows for each size, measured once; exponents of the seconds stand in those of the last size."""
    found: dict[str, list[tuple[float, int]]] = {phase: [] for phase in PHASES}
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            path = write(Path(folder) / "rows.jsonl", size)
            start = ("grpo", "quickstart", f"data.rl={path}", "--dry-run")
            for phase, words in zip(PHASES, (("data", "check", str(path)), start, start), strict=True):
                found[phase].append(measured(words, cache=Path(folder)))
    return [
        row(
            work="checking",
            shape=f"rows {size:,}",
            phase=phase,
            peer="",
            pair=Pair(ours=[seconds]),
            memory_mib=round(peak / 2**20),
            **(
                {"exponent": round(exponent(SIZES, [s for s, _ in measures]), 2)} if size == SIZES[-1] else {}
            ),
        )
        for phase, measures in found.items()
        for size, (seconds, peak) in zip(SIZES, measures, strict=True)
    ]


def write(path: Path, count: int) -> Path:
    """A file of problems without images."""
    rng = random.Random("checking")
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            a, b = rng.randint(2, 10**5), rng.randint(2, 10**3)
            answer = (str(a * b), rf"\\frac{{{a}}}{{{b}}}", "ABC"[a % 3], rf"{b * b}\\pi", f"{a / b:.3f}")
            question = f"Question {index}: what follows from {a} and {b}? A. this B. that C. neither"
            file.write(f'{{"id": "r{index}", "question": "{question}", "answer": "{answer[index % 5]}"}}\n')
    return path


def measured(words: Sequence[str], *, cache: Path) -> tuple[float, int]:
    """Wall seconds of a command of rlcs, and the most bytes that it and its workers took together."""
    started, peak = time.perf_counter(), 0
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["RLCS_CACHE"] = str(cache)
    command = [sys.executable, "-m", "rlcs", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, cwd=cache) as process:
        while process.poll() is None:
            peak = max(peak, memory([each.pid for each in _family(process.pid)])["own"])
            time.sleep(EVERY_S)
    assert process.returncode == 0, "every row can be used"
    return time.perf_counter() - started, peak


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
