"""Runs the checks one after the other, each in processes of its own, within a number of minutes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from rlcs.doctor.gpu import REPORT, Check, Setting
from rlcs.doctor.gpu.ranks import Ranks, environment, free_port
from rlcs.errors import NEED_LESS, shortage
from rlcs.patience import OwnTime, Patience
from rlcs.storage import read_json, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """One check: its module, whose processes run it, and about how many seconds it takes on an H100.

    `once`: one process; `each`: one for each GPU, alone with it; `together`: as many, in one process group.
    """

    name: str
    module: str
    runs: Literal["once", "each", "together"]
    seconds: float


def _spec(name: str, runs: Literal["once", "each", "together"], seconds: float) -> Spec:
    return Spec(name=name, module=f"rlcs.doctor.gpu.{name}", runs=runs, seconds=seconds)


SPECS = (
    # In order of worth. Every process needs 10 s for Python, torch, transformers and CUDA's context.
    _spec("versions", "once", 20),  # + 5 s for vLLM's version
    _spec("attention", "each", 45),  # + 2 models x 2 formats compiled in about 8 s each, forward and backward
    _spec("trees", "each", 60),  # + 4 kernels compiled; 0.6 B random weights 4 times; 40 plain passes
    _spec("sharding", "together", 35),  # + 0.3 B weights in 4 models; NCCL's start 5 s; a kernel compiled
    _spec("vllm", "once", 110),  # + 6 GB written and read; start 60 s; 3 rounds of answers; new weights
    _spec("step", "together", 90),  # + vLLM's start 50 s; 2 steps of 5 s; kernel compiled; checkpoint
    _spec("checkpoint", "together", 25),  # + 4 GB written and read at 1 GB/s each
    _spec("memory", "once", 30),  # + 2 steps of one full pack: 8,192 tokens x 1 B weights in 1 s
    _spec("speed", "each", 60),  # + 8 B random weights, a kernel compiled, passes of 8,192 tokens: 1 s each
)
"""All checks. Their estimates add up to 8 minutes."""

_SLACK, _GRACE_S, _POLL_S, _TICK_S = 3.0, 15.0, 0.1, 1.0
_LEAST_LIMIT_S = 120.0
"""A check may take `_SLACK` times its estimate, but so long in any case, if the minutes last; of the time
that its processes had."""


def run(
    specs: Sequence[Spec],
    setting: Setting,
    ranks: Ranks,
    *,
    minutes: float,
    say: Callable[[str], None],
) -> list[Check]:
    """Run what fits into the minutes, in order; a check that hangs is ended. `say` shows progress."""
    end = time.monotonic() + 60 * minutes
    checks: list[Check] = []
    for spec in specs:
        left = end - time.monotonic()
        plan = {"limit": min(left, max(_LEAST_LIMIT_S, _SLACK * spec.seconds)), "port": free_port()}
        plan |= {"left": left, "runs": spec.seconds <= left}
        plan = json.loads(ranks.agree(f"{spec.name}/plan", json.dumps(plan)))
        if not plan["runs"]:
            message = f"it takes about {spec.seconds:.0f} s, and {max(0.0, plan['left']):.0f} s were left"
            needed = sum(each.seconds for each in specs) / 60
            check = Check(ok=None, message=message, fix=f"give it more time: --minutes {needed + 4:.0f}")
        else:
            say(f"{spec.name:<11} runs (about {spec.seconds:.0f} s on an H100)")
            started = time.monotonic()
            limits = {name: plan[name] for name in ("limit", "left")}
            found = _run(spec, setting, ranks, port=plan["port"], **limits)
            check = _merged(ranks.collect(spec.name, found, wait_s=plan["left"] + 2 * _GRACE_S))
            check = replace(check, seconds=round(time.monotonic() - started, 1))
        checks.append(replace(check, name=spec.name))
    return checks


def _run(spec: Spec, setting: Setting, ranks: Ranks, *, port: str, limit: float, left: float) -> list[Check]:
    """Start the processes of the ranks that are started here, and wait for them."""
    own = [rank for rank in ranks.own if spec.runs != "once" or rank == 0]
    folder = Path(setting.folder)
    given = folder / f"{spec.name}-setting-{ranks.own.start}.json"
    write_json(given, asdict(setting))
    processes = [
        _Process(
            [sys.executable, "-m", "rlcs.doctor.gpu", spec.module, str(given)],
            folder / f"{spec.name}-{rank}",
            environment(rank, ranks, port=port if spec.runs == "together" else "", alone=spec.runs == "each"),
        )
        for rank in own
    ]
    try:
        end = time.monotonic() + left
        patience = [Patience(OwnTime(process.pid, _TICK_S), limit) for process in processes]
        while any(process.runs for process in processes) and time.monotonic() < end:
            if any(each.is_over for each in patience):
                break
            if any(process.failed for process in processes):  # the others of a group would wait for it
                end = min(end, time.monotonic() + _GRACE_S)
            time.sleep(_POLL_S)
    finally:
        failed = any(process.failed for process in processes)
        cut = [process.end() for process in processes]
    if failed:
        waited = Check(ok=None, message="it was ended, since another rank failed")
        return [waited if was_cut else each.result() for each, was_cut in zip(processes, cut, strict=True)]
    return [
        process.late(limit) if was_cut else process.result()
        for process, was_cut in zip(processes, cut, strict=True)
    ]


class _Process:
    """One process of a check, in a session of its own so that all of it can be ended."""

    def __init__(self, command: list[str], files: Path, variables: dict[str, str]) -> None:
        self._result, self._log = files.with_suffix(".json"), files.with_suffix(".log")
        with self._log.open("wb") as out:
            self._popen = subprocess.Popen(
                [*command, str(self._result)],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def runs(self) -> bool:
        return self._popen.poll() is None

    @property
    def failed(self) -> bool:
        """Whether it has ended, and without success."""
        if self.runs:
            return False
        return not self._result.exists() or read_json(self._result)["ok"] is False

    def end(self) -> bool:
        """End the process and its children; whether it still ran."""
        ran = self.runs
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        return ran

    def late(self, limit: float) -> Check:
        """The result of a process that did not end in so many seconds."""
        last = (self._lines() or ["it wrote nothing"])[-1][:300]
        return Check(ok=False, message=f"it did not end in {limit:.0f} s; its last line: {last}", fix=REPORT)

    def result(self) -> Check:
        """What it found, or how it ended instead."""
        if self._result.exists():
            return Check(**read_json(self._result))
        lines = self._lines()
        if what := shortage("\n".join(lines)):
            return Check(ok=False, message=what, fix=NEED_LESS)
        code = self._popen.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        last = (errors or lines or ["it wrote nothing"])[-1][:300]
        return Check(ok=False, message=f"its process {how}: {last}", fix=REPORT)

    def _lines(self) -> list[str]:
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return [line.strip() for line in text.splitlines() if line.strip()]


def _merged(found: Sequence[Check]) -> Check:
    """One result of all ranks: the first that failed with its rank's number, or rank 0's."""
    if not found:
        return Check(ok=True, message="elsewhere")
    failed = [(rank, check) for rank, check in enumerate(found) if check.ok is False]
    rates = {
        name: min(check.rates.get(name, rate) for check in found) for name, rate in found[0].rates.items()
    }
    if failed:
        rank, worst = failed[0]
        where = f"rank {rank}: " if len(found) > 1 else ""
        return replace(worst, message=where + worst.message, rates=rates)
    note = f" (slowest of {len(found)})" if len(found) > 1 and rates else ""
    values = [dict(check.values) for check in found]
    merged = values[0] | ({"by_rank": values[1:]} if len(found) > 1 and any(values[1:]) else {})
    return replace(found[0], message=found[0].message + note, values=merged, rates=rates)
