"""`rlcs data check` of files with 1,000 to 1,000,000 rows: seconds, and the most memory of all its processes.

There is no peer: no other trainer looks at gold answers before it trains. Two rows in five are numbers, one
in five each a letter, a fraction and a multiple of pi; nearly all are different, which is the slow case.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bench.loading import memory
from bench.pairs import Options, Pair, row
from bench.table import Row
from bench.works.sweeps import exponent

SIZES = (1_000, 10_000, 100_000, 1_000_000)
EVERY_S = 0.05
"""How often memory is looked at."""


def rows(options: Options) -> list[Row]:
    """A row for each size, measured once; the exponent of the seconds stands in the last."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = {size: checked(write(Path(folder) / "rows.jsonl", size)) for size in SIZES}
    growth = round(exponent(SIZES, [seconds for seconds, _ in found.values()]), 2)
    return [
        row(
            work="checking",
            shape=f"rows {size:,}",
            phase="data check",
            peer="",
            pair=Pair(ours=[seconds]),
            memory_mib=round(peak / 2**20),
            **({"exponent": growth} if size == SIZES[-1] else {}),
        )
        for size, (seconds, peak) in found.items()
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


def checked(path: Path) -> tuple[float, int]:
    """Wall seconds of `rlcs data check`, and the most bytes that it and its workers took together."""
    started, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", "rlcs", "data", "check", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
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
