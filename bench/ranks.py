"""`python -m bench.ranks`: SFT of the built-in model, two processes of one thread against one of two threads.

Both train on the same demonstrations in the same order; the tokens are those of the trees, without what
idles. The first steps warm up and are not counted. On a machine that others use, run it again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.sides import variables_of

WARM_UP = 3


def main() -> None:
    """Measure in turns and print tokens a second, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15, help="counted steps of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # what the processes are started with
    options = parser.parse_args()
    if options.train:
        train(options.train, options.steps)
        return
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(options.rounds):
        for ranks in rates:
            rate, losses = measure(ranks, options.steps)
            rates[ranks].append(rate)
            says = f"round {number + 1}, {ranks} process(es) of {2 // ranks} thread(s): {rate:8,.0f} tokens/s"
            print(f"{says}, loss {losses[0]:.5f} to {losses[-1]:.5f}", flush=True)
    best = {ranks: statistics.median(each) for ranks, each in rates.items()}
    print(f"median: 1 process {best[1]:,.0f}, 2 processes {best[2]:,.0f} tokens/s: {best[2] / best[1]:.1%}")


def measure(ranks: int, steps: int) -> tuple[float, list[float]]:
    """Tokens a second by the median step, and the losses."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "bench.ranks",
            "--train",
            folder,
            "--steps",
            str(steps),
        ]
        variables = os.environ | {"OMP_NUM_THREADS": str(2 // ranks), "TRANSFORMERS_VERBOSITY": "error"}
        if ranks > 1:
            variables |= variables_of(ranks, variables)
        started = [
            subprocess.Popen(
                command,
                env=variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(ranks)
        ]
        codes = [process.wait() for process in started]
        assert not any(codes), "a process failed; its error is above"
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    seconds = statistics.median(sum(row["seconds"].values()) for row in rows[WARM_UP:])
    tokens = statistics.median(row["tokens"] for row in rows[WARM_UP:])
    return tokens / seconds, [row["loss"] for row in rows]


def train(folder: Path, steps: int) -> None:
    """One rank of a measurement."""
    from rlcs.data import puzzles
    from rlcs.distributed import join_world
    from rlcs.model import loading
    from rlcs.progress import screen
    from rlcs.recipe.loading import load_recipe
    from rlcs.records import Demonstration
    from rlcs.signals import StopFlag
    from rlcs.train import sft
    from rlcs.train.run_dir import RunDir

    recipe = load_recipe("quickstart", ["sft.epochs=1", "sft.save_every=100000"]).recipe
    count = (WARM_UP + steps) * recipe.sft.batch_size
    problems = puzzles.load("puzzles", split="train", count=count, seed=1)
    taught = [
        Demonstration(problem=p, response=puzzles.teach(p, seed=0, wrong_share=0.0), teacher="builtin")
        for p in problems
    ]
    with join_world(timeout_s=600) as world, StopFlag() as stop, screen("sft", steps, quiet=True) as view:
        vlm = loading.load(recipe.model, world=world)
        loading.freeze(vlm, recipe.sft.freeze)
        vlm = loading.spread(vlm, recipe.parallel)
        chat = loading.make_chat(vlm, recipe.prompt, recipe.images)
        stage = RunDir(folder, name="sft", seed=0, settings=recipe.sft, recipe_hash="")
        sft.train(vlm, chat, taught, recipe.sft, run=stage, screen=view, stop=stop)


if __name__ == "__main__":
    main()
