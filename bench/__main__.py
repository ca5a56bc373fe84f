"""`python -m bench`: what people wait for, by rlcs and by its peers, side by side.

`--work grpo` is a GRPO step by TRL and by rlcs, phase by phase; `bench.works` lists the others. Sides take
turns, so that whatever else the machine does falls on both. In a GRPO step each lives in a process of its own
for each shape; the first step warms up and is not counted.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from bench import charts, table
from bench.pairs import Options
from bench.shapes import HYBRID, SHAPES, THREADS, TRAINED, Case, Shape, make_case, trained_case
from bench.sides import ask_once, steps_in_turns
from bench.works import WORKS, rows_of

HERE = Path(__file__).parent
LATEST = HERE / "results" / "latest.json"
PAGE = HERE.parent / "docs" / "performance.md"
CHART = HERE.parent / "docs" / "images" / "bench.png"
GRPO = "grpo"
NAMES = {GRPO: "a GRPO step, against TRL"} | WORKS
"""The works that can be chosen."""

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
        write_docs(options.out)
        return 0
    os.environ.update(
        OMP_NUM_THREADS=str(1 if options.cpu_time else THREADS),
        TOKENIZERS_PARALLELISM="false",
        TRANSFORMERS_VERBOSITY="error",
        PYTHONWARNINGS="ignore",
    )
    works = options.work or list(NAMES)
    rows: list[table.Row] = []
    if GRPO in works and not options.skip_check and not same_results():
        return 1
    for name in works:
        for found in grpo_rows(options) if name == GRPO else [work_rows(name, options)]:
            rows += found
            table.write(table.merged(table.read(options.out), rows), options.out)
    print()
    print(table.markdown(rows))
    print(table.works_markdown(rows))
    if options.write_docs:
        write_docs(options.out)
    return 0


def write_docs(path: Path) -> None:
    """Put the rows of a file into the page, as tables and as a picture."""
    rows = table.read(path)
    table.write_docs(rows, PAGE)
    charts.draw(rows, CHART)


def grpo_rows(options: argparse.Namespace) -> Iterator[list[table.Row]]:
    """The rows of each shape of the GRPO step; of a trained model's only where one is named."""
    wanted = [shape for shape in SHAPES if not options.shape or shape.name in options.shape]
    for shape in wanted:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            yield measure(make_case(shape, Path(folder), options.steps, cpu_time=options.cpu_time))
    if options.model != "builtin" and (not options.shape or TRAINED.name in options.shape):
        yield measure(trained_case(TRAINED, options.model, options.steps, cpu_time=options.cpu_time))


def work_rows(name: str, options: argparse.Namespace) -> list[table.Row]:
    """The rows of another work, in this process."""
    started, load = time.monotonic(), os.getloadavg()[0]
    threads = 1 if options.cpu_time else THREADS
    torch.set_num_threads(threads)
    chosen = Options(rounds=options.steps, cpu_time=options.cpu_time, model=options.model)
    facts = {"environment": _environment(options.cpu_time, threads), "load_before": round(load, 1)}
    rows = [row | facts for row in rows_of(name)(chosen)]
    ratios = {f"{row['shape']}, {row['phase']}": row["ratio"] for row in rows}
    print(f"{name}: {ratios} ({time.monotonic() - started:.0f} s)", flush=True)
    return rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    says = "; ".join(f"{name}: {what}" for name, what in NAMES.items())
    parser.add_argument("--work", action="append", choices=NAMES, help=f"only this one (default all). {says}")
    parser.add_argument(
        "--model", default="builtin", help="folder of a trained model, for grpo, rollouts and vllm"
    )
    parser.add_argument("--steps", type=int, default=3, help="measured steps or rounds a side (default 3)")
    parser.add_argument(
        "--shape", action="append", help=f"of the GRPO step, only {[s.name for s in (*SHAPES, TRAINED)]}"
    )
    parser.add_argument("--out", type=Path, default=LATEST, help="where the rows go")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds of one thread: for a busy machine"
    )
    parser.add_argument("--skip-check", action="store_true", help="do not compare loss and gradients first")
    parser.add_argument("--write-docs", action="store_true", help="put all into docs/performance.md")
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
            result = ask_once(equality.main, make_case(shape, Path(folder), 1))
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


def measure(case: Case) -> list[table.Row]:
    """All rows of one shape."""
    from transformers import AutoConfig

    from bench.limit import limit_of

    started, load = time.monotonic(), os.getloadavg()[0]
    limit = limit_of(case, AutoConfig.from_pretrained(case.folder))
    measured = steps_in_turns(case, ("peer", "ours"), memory=True)
    theirs, mine = measured["peer"], measured["ours"]
    facts = {
        "peer": f"trl {version('trl')}",
        "environment": _environment(case.cpu_time, case.threads),
        "load_before": round(load, 1),
        "busy": round(min(m.busy for m in mine), 2),
        "peer_busy": round(min(m.busy for m in theirs), 2),
    }
    rows = table.rows_of(case, limit, mine, theirs, facts)
    brief = {row["phase"]: row["ratio"] for row in rows}
    print(f"{case.shape.name}: {brief} ({time.monotonic() - started:.0f} s)", flush=True)
    return rows


def _environment(cpu_time: bool, threads: int) -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{threads} CPU threads"
    clock = "CPU seconds of one thread" if cpu_time else f"wall seconds of {where}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{packages}, fp32, {clock}"


if __name__ == "__main__":
    sys.exit(main())
