"""`python -m bench`: the same GRPO step by TRL and by rlcs, side by side, phase by phase.

Each side lives in a process of its own for each shape; their steps take turns, so that whatever
else the machine does falls on both. The first step warms up and is not counted.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from bench import table
from bench.meter import Measured
from bench.shapes import HYBRID, SHAPES, THREADS, Case, Shape, make_case

HERE = Path(__file__).parent
LATEST = HERE / "results" / "latest.json"
PAGE = HERE.parent / "docs" / "performance.md"
WAIT_S = 600.0
"""A step that takes longer than this is a fault."""

CHECKS = (
    Shape(
        name="check", says="38M model", model="38M", prompts=2, group=3, trunk=100, side=168, answers=(5, 20)
    ),
    Shape(name="check", says="built-in model", model="built-in", prompts=3, group=4),
    Shape(
        name="check",
        says=f"{HYBRID} model",
        model=HYBRID,
        prompts=2,
        group=3,
        trunk=100,
        side=168,
        answers=(5, 20),
    ),
)
"""Small enough to compare every gradient."""


def main() -> int:
    """Check, measure, write; exit code 1 when the two sides do not compute the same."""
    options = arguments()
    disable_progress_bar()
    if options.write_docs and not options.run:
        table.write_docs(json.loads(LATEST.read_text(encoding="utf-8")), PAGE)
        return 0
    os.environ.update(
        OMP_NUM_THREADS=str(1 if options.cpu_time else THREADS),
        TOKENIZERS_PARALLELISM="false",
        TRANSFORMERS_VERBOSITY="error",
        PYTHONWARNINGS="ignore",
    )
    if not options.skip_check and not same_results():
        return 1
    rows: list[table.Row] = []
    for shape in SHAPES:
        if not options.shape or shape.name in options.shape:
            rows += measure(shape, options.steps, cpu_time=options.cpu_time)
            table.write(rows, options.out)
    print()
    print(table.markdown(rows))
    if options.write_docs:
        table.write_docs(rows, PAGE)
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--steps", type=int, default=3, help="measured steps a side (default 3)")
    parser.add_argument("--shape", action="append", help=f"only this one of {[s.name for s in SHAPES]}")
    parser.add_argument("--out", type=Path, default=LATEST, help="where the rows go")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds of one thread: for a busy machine"
    )
    parser.add_argument("--skip-check", action="store_true", help="do not compare loss and gradients first")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument(
        "--run", action=argparse.BooleanOptionalAction, default=True, help="--no-run: use latest.json"
    )
    return parser.parse_args()


def same_results() -> bool:
    """Compare loss and gradients of both sides, and say so."""
    from bench import equality

    fine = True
    for shape in CHECKS:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            result = _ask_once(equality.main, make_case(shape, Path(folder), 1))
        gaps = [result[name] for name in ("loss_gap", "gradient_gap", "worst_gradient_gap")]
        agreed = max(gaps) <= equality.TOLERANCE
        fine = fine and agreed
        print(
            f"{'same' if agreed else 'NOT THE SAME'} loss and gradients, {shape.says}: "
            f"loss {result['loss']:.7f} and TRL's {result['peer_loss']:.7f} (relative gap {gaps[0]:.1e}), "
            f"gradients {gaps[1]:.1e}, worst parameter {gaps[2]:.1e}",
            flush=True,
        )
    return fine


def measure(shape: Shape, steps: int, *, cpu_time: bool) -> list[table.Row]:
    """All rows of one shape."""
    from transformers import AutoConfig

    from bench import ours, peer
    from bench.limit import limit_of

    started, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        case = make_case(shape, Path(folder), steps, cpu_time=cpu_time)
        limit = limit_of(case, AutoConfig.from_pretrained(folder))
        sides = [_start(side.main, case) for side in (peer, ours)]
        for _, pipe in sides:
            assert _answer(pipe) == "ready", "a side says ready first"
        measured: tuple[list[Measured], list[Measured]] = ([], [])
        for step in range(case.steps):
            for (_, pipe), results in zip(sides, measured, strict=True):
                # Memory costs time (freed memory goes back first), so it is taken in the last step alone.
                pipe.send(step == case.steps - 1)
                results.append(_answer(pipe))
        for process, _ in sides:
            process.join(WAIT_S)
    theirs, mine = measured[0][1:], measured[1][1:]
    facts = {
        "peer": f"trl {version('trl')}",
        "environment": _environment(case),
        "load_before": round(load, 1),
        "busy": round(min(m.busy for m in mine), 2),
        "peer_busy": round(min(m.busy for m in theirs), 2),
    }
    rows = table.rows_of(case, limit, mine, theirs, facts)
    brief = {row["phase"]: row["ratio"] for row in rows}
    print(f"{shape.name}: {brief} ({time.monotonic() - started:.0f} s)", flush=True)
    return rows


def _environment(case: Case) -> str:
    clock = "CPU seconds of one thread" if case.cpu_time else f"wall seconds of {case.threads} CPU threads"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{packages}, fp32, {clock}"


def _start(target: Any, case: Case) -> tuple[Any, Connection]:
    """A fresh process with a pipe to it; it loads, says ready and waits."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, case), daemon=True)
    process.start()
    there.close()
    return process, here


def _ask_once(target: Any, case: Case) -> dict[str, float]:
    process, here = _start(target, case)
    result: dict[str, float] = _answer(here)
    process.join(WAIT_S)
    return result


def _answer(pipe: Connection) -> Any:
    """What a side says next; a side that died or hangs ends the bench."""
    if not pipe.poll(WAIT_S):
        raise TimeoutError(f"a side has been silent for {WAIT_S:.0f} s")
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError("a side has died; its error is above") from None


if __name__ == "__main__":
    sys.exit(main())
