"""The processor cores that this process may use, and the settings of threads that follow from them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path

_THREADS = "OMP_NUM_THREADS"
_WAITING = "OMP_WAIT_POLICY"
_LOOKS = "GOMP_SPINCOUNT"
_LOOKS_ENOUGH = "3000"
"""How often a thread of GNU's OpenMP looks for work before it sleeps: for about 0.1 ms, in which most comes.

Measured on two cores, a GRPO step of the quickstart alone and beside one busy process: without a look 3.6 and
4.0 s, 3,000 looks 2.8 and 4.8 s, 10,000 looks 2.5 and 9.0 s, 300,000 (the library's own) 2.7 and 10.2 s.
"""
_CHOSEN_BY_USER = (_THREADS, "MKL_NUM_THREADS")
_RANKS_HERE = "LOCAL_WORLD_SIZE"
_OURS = "RLCS_THREADS"
"""The variable that is set beside a number of threads which the user has not chosen."""
STARTED = "TORCHELASTIC_RUN_ID"
"""The variable by which a process knows that it is a rank, which `torchrun` sets."""
OWN = "rlcs"
"""Its value where a run has started its own ranks (`pipeline.processes`)."""
MEETING = "RLCS_RANKS"
"""The variable with the file by which those find each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cores:
    """The cores of the machine, those that this process may run on, and its quota of their time.

    A quota of 1.5 allows 1.5 seconds of processor time each second, as a container's `--cpus 1.5`; None: all.
    """

    machine: int
    allowed: int
    quota: float | None = None

    @property
    def usable(self) -> int:
        """How many can be kept busy: those allowed, or as many as the quota pays, rounded up."""
        return self.allowed if self.quota is None else max(1, min(self.allowed, ceil(self.quota)))


def find_cores(root: Path = Path("/")) -> Cores:
    """Find them out from the system; `root` is where its `proc` and `sys` lie."""
    machine = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    return Cores(machine=machine, allowed=allowed, quota=min(_quotas(root), default=None))


def usable_cores() -> int:
    """The number of cores that this process can keep busy."""
    return find_cores().usable


def thread_settings(cores: Cores, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for OpenMP's threads that `environment` leaves open, to be set before torch is loaded.

    Threads that wait for another soon sleep. By default they spin for long: where other programs run too,
    they then take the core from the very thread that they wait for. Their number is set where the libraries,
    which heed neither a quota nor the other ranks of this machine, would take too many.
    """
    chosen = _WAITING in environment or _LOOKS in environment
    settings = {} if chosen else {_WAITING: "passive", _LOOKS: _LOOKS_ENOUGH}
    if not threads_chosen(environment):
        ranks = _ranks_here(environment)
        if ranks > 1 or cores.usable < cores.allowed:
            settings |= {_THREADS: str(threads_of_each(cores, ranks)), _OURS: "automatic"}
    return settings


def threads_chosen(environment: Mapping[str, str]) -> bool:
    """Whether the user has chosen the number of threads."""
    return _OURS not in environment and any(environment.get(name) for name in _CHOSEN_BY_USER)


def threads_of_each(cores: Cores, ranks: int) -> int:
    """The number of threads of each of so many ranks that share the cores."""
    return max(1, busy_cores(cores) // ranks)


def busy_cores(cores: Cores) -> int:
    """The number of physical cores that can be kept busy; two threads on one are no faster."""
    import psutil

    return min(cores.usable, psutil.cpu_count(logical=False) or cores.machine)


def explain_threads(cores: Cores, environment: Mapping[str, str], threads: int) -> str:
    """Say how many threads torch has, and why; and what they do while they wait."""
    waiting = environment.get(_WAITING, "not set").lower()
    waits = "soon sleep" if waiting == "passive" else "spin"
    return (
        f"{cores.machine} cores; threads for torch: {threads} ({_why(cores, environment)}), "
        f"which {waits} while they wait ({_WAITING} {waiting})"
    )


def _why(cores: Cores, environment: Mapping[str, str]) -> str:
    ranks, one = _ranks_here(environment), environment.get(_THREADS)
    open_ones = {name: value for name, value in environment.items() if name != _THREADS}
    if "MKL_NUM_THREADS" not in environment and one == thread_settings(cores, open_ones).get(_THREADS, ""):
        quota = "" if cores.quota is None else f"the container's quota is {cores.quota:g} of them"
        shared = f"{ranks} ranks share them" if ranks > 1 else ""
        return ", ".join(part for part in (quota, shared) if part)
    if ranks > 1 and one == "1":
        return f"torchrun gives each rank one, unless {_THREADS} is set"
    if chosen := [f"{name} is {environment[name]}" for name in _CHOSEN_BY_USER if environment.get(name)]:
        return ", ".join(chosen)
    if cores.allowed < cores.machine:
        return f"this process may run on {cores.allowed} of them"
    return "torch's choice, one for each physical core"


def _ranks_here(environment: Mapping[str, str]) -> int:
    value = environment.get(_RANKS_HERE, "")
    return max(1, int(value)) if value.isascii() and value.isdigit() else 1


def _quotas(root: Path) -> Iterator[float]:
    """The quotas of this process's control groups (cgroups), of both versions, and of those around them."""
    text = ""
    with suppress(OSError, ValueError):
        text = (root / "proc/self/cgroup").read_text(encoding="utf-8")
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be the host's, and its group lie at the top.
        inside = Path(path.lstrip("/"))
        for group in (inside, *inside.parents):
            folder = root / "sys/fs/cgroup" / ("cpu" if controllers else "") / group
            with suppress(OSError, ValueError, ZeroDivisionError):
                if controllers:
                    limit, period = ((folder / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period"))
                else:
                    limit, period = (folder / "cpu.max").read_text().split()
                if limit != "max" and (quota := int(limit) / int(period)) > 0:
                    yield quota
