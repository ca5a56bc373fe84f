"""The two sides of a GRPO step, each in processes of its own; their steps take turns."""

import atexit
import importlib
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from bench.meter import Measured
from bench.shapes import Case
from rlcs.cores import find_cores
from rlcs.distributed import World
from rlcs.pipeline.processes import environment

WAIT_S = 600.0
"""A step that takes longer than this is a fault."""


def steps_in_turns(case: Case, names: Sequence[str], *, memory: bool) -> dict[str, list[Measured]]:
    """What each of the sides ("peer", "ours") measured in every step of a case but the first: a warm-up."""
    sides = {
        name: start(
            importlib.import_module(f"bench.{name}").main, case, ranks=case.ranks if name == "ours" else 1
        )
        for name in names
    }
    for _, pipe in sides.values():
        assert answer(pipe) == "ready", "a side says ready first"
    measured: dict[str, list[Measured]] = {name: [] for name in names}
    for step in range(case.steps):
        for name, (_, pipe) in sides.items():
            # Memory costs time (freed memory goes back first), so it is taken in the last step alone.
            pipe.send(memory and step == case.steps - 1)
            measured[name].append(answer(pipe))
    for processes, _ in sides.values():
        for process in processes:
            process.join(WAIT_S)
    return {name: steps[1:] for name, steps in measured.items()}


def ask_once(target: Any, case: Case) -> dict[str, float]:
    """What a process of its own says once."""
    [process], here = start(target, case)
    result: dict[str, float] = answer(here)
    process.join(WAIT_S)
    return result


def start(target: Any, work: Any, *, ranks: int = 1) -> tuple[list[Any], Connection]:
    """Fresh processes that share a work, with a pipe to the first one; it loads, says ready and waits."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    variables = variables_of(ranks, os.environ) if ranks > 1 else {}
    processes = []
    for rank in range(ranks):
        own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)} if variables else {}
        pipe = there if rank == 0 else None
        processes.append(context.Process(target=run_rank, args=(target, pipe, work, own), daemon=True))
        processes[-1].start()
    there.close()
    return processes, here


def variables_of(ranks: int, given: Mapping[str, str]) -> dict[str, str]:
    """The variables that ranks share, with a file to meet at."""
    folder = tempfile.mkdtemp(prefix="bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return environment(ranks, find_cores(), given, meeting=f"{folder}/ranks")


def run_rank(target: Any, pipe: Connection | None, work: Any, variables: dict[str, str]) -> None:
    """One of the processes of a side; only the first one has the pipe."""
    os.environ.update(variables)
    target(pipe, work)


def asked(pipe: Connection | None, world: World) -> Any:
    """What the first rank, which has the pipe, is told next: on every rank."""

    def next_word() -> Any:
        assert pipe is not None, "only the first rank is asked"
        return pipe.recv()

    return world.first(next_word)


def answer(pipe: Connection) -> Any:
    """What a side says next; a side that died or hangs ends the bench."""
    if not pipe.poll(WAIT_S):
        raise TimeoutError(f"a side has been silent for {WAIT_S:.0f} s")
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError("a side has died; its error is above") from None
