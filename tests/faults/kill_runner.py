"""Runs commands of rlcs in children of one warm process, and kills them at chosen file events.

`python kill_runner.py` reads a job a line and answers with a line. It has imported everything, and has done
once what every process does at first: the built-in model loaded, a chart drawn. No model, thread or file is
open when it forks, and torch has one thread. So each child is a fresh process that saves those seconds.

An audit hook counts the child's file events below a folder: a file opened for writing, a folder made, and
names that change or go. At an event a signal is sent before it happens. Points between file events are calls
of methods, counted in the same way.
"""

import gc
import importlib
import io
import itertools
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

WRITES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "os.chmod",
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command, as `ranks` processes; `signals` are (event, signal number) of the process `rank`.

    Events are file events, or calls of the method `point` ("module:Class.method"). Of `errors`, (first, last,
    errno), those events fail. `environ` are variables that it has (None: has not), `file_bytes` the largest
    file that it can write. With `clock_jumps` the time of day jumps by hours at each look.
    """

    words: Sequence[str]
    folder: str
    log: str
    signals: Sequence[tuple[int, int]] = ()
    point: str | None = None
    errors: tuple[int, int, int] = (0, 0, 0)
    clock_jumps: bool = False
    ranks: int = 1
    rank: int = 0
    port: int = 0
    environ: Mapping[str, str | None] = field(default_factory=dict)
    file_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job: exit statuses by rank (below 0: the signal), their events, CPU seconds."""

    statuses: Sequence[int]
    events: Sequence[Sequence[str]]
    cpu_s: float


class Events:
    """The events of one process so far, and the signals and errors still to come."""

    def __init__(
        self, signals: Sequence[tuple[int, int]], report: int, errors: tuple[int, int, int] = (0, 0, 0)
    ) -> None:
        self._signals, self._report, self._errors = dict(signals), report, errors
        self._count = 0
        self._lock = threading.RLock()

    def happens(self, what: str) -> None:
        """Count an event, and send the signal that is due at it. Raises OSError where it is to fail."""
        first, last, errno = self._errors
        with self._lock:
            self._count += 1
            number = self._signals.pop(self._count, None)
            fails = first <= self._count <= last
            os.write(self._report, f"{what}\n".encode("utf-8", "backslashreplace"))
        if number is not None:
            os.kill(os.getpid(), number)
        if fails:
            raise OSError(errno, os.strerror(errno), what)


class FileEvents:
    """The audit hook of one process, for events below a folder."""

    def __init__(self, folder: str, events: Events) -> None:
        self._folder, self._events = folder, events

    def __call__(self, event: str, args: tuple[object, ...]) -> None:
        if (name := self._name(event, args)) is not None:
            self._events.happens(f"{event} {name}")

    def _name(self, event: str, args: tuple[object, ...]) -> str | None:
        """The file that an event is about, below the folder; None for other events."""
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return None
        elif event in WRITES:
            path = args[0]
            if event in ("os.remove", "os.rmdir") and args[1] != -1:
                path = Path(f"/proc/self/fd/{args[1]}").readlink() / str(path)
        else:
            return None
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        text = str(path)
        return text[len(self._folder) :] if text.startswith(self._folder) else None


def count_calls(point: str, events: Events) -> None:
    """Let each call of a method be an event, before it does anything."""
    module, _, name = point.partition(":")
    place, _, method = name.partition(".")
    kind = getattr(importlib.import_module(module), place)
    real: Callable[..., object] = getattr(kind, method)

    def counted(*args: object, **options: object) -> object:
        events.happens(point)
        return real(*args, **options)

    setattr(kind, method, counted)


def let_clock_jump() -> None:
    """Let the time of day jump by hours, forwards and back; what counts seconds has other clocks."""
    real, looks = time.time, itertools.count()
    jumps = (0, 7_200, -3_600, 90_000, -7_200)
    time.time = lambda: real() + jumps[next(looks) % len(jumps)]


def warm() -> None:
    """Import what a run imports, and do what every process does once."""
    import torch

    torch.set_num_threads(1)
    import tqdm
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    from rlcs.model import loading
    from rlcs.recipe.schema import Model
    from rlcs.report import charts
    from rlcs.report.pages import templates

    for name in ("cli.main", "evals.run", "pipeline.coldstart", "pipeline.seeds"):
        importlib.import_module(f"rlcs.{name}")
    tqdm.tqdm.monitor_interval = 0  # else its bars start a thread
    disable_progress_bar()
    loading.load(Model(name="builtin"), device=torch.device("cpu"))
    enable_progress_bar()
    charts.curve_chart("loss", "loss", [("sft", [[(1.0, 1.0), (2.0, 0.5)]])], name="warm")
    templates().get_template("page.html.j2")
    gc.collect()
    gc.freeze()  # else the first collection in a child would copy every page that it looks at
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a thread would not be there in the children"


def child(job: Job, rank: int, *, output: int, report: int) -> None:
    """Be one rank of a job, which prints into `output`; never returns."""
    status = 1
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8", write_through=True)
        if job.ranks > 1:
            os.environ |= environment(job, rank)
        for name, value in job.environ.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}
        if job.file_bytes is not None:  # Python ignores the signal that comes first
            resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_bytes, job.file_bytes))
        sys.argv = ["rlcs", *job.words]
        from rlcs.cli.main import main

        if job.clock_jumps:
            let_clock_jump()
        events = Events(job.signals if rank == job.rank else (), report, job.errors)
        if job.point is not None:
            count_calls(job.point, events)
        elif job.file_bytes is None:
            sys.addaudithook(FileEvents(job.folder, events))
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def environment(job: Job, rank: int) -> Mapping[str, str]:
    """The variables of a rank, as torchrun sets them."""
    facts = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.ranks, "LOCAL_WORLD_SIZE": job.ranks,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job.port, "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    return {name: str(value) for name, value in facts.items()}


def run(job: Job) -> Outcome:
    """Run a job in children and wait for them; none of their own children is left."""
    log = output = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if job.file_bytes is not None:  # the log is a file, too
        printed, output = os.pipe()
    pids, reports = [], []
    for rank in range(job.ranks):
        report = Path(f"{job.log}.events-{rank}")
        file = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        pid = os.fork()
        if pid == 0:
            child(job, rank, output=output, report=file)
        os.close(file)
        pids.append(pid)
        reports.append(report)
    os.close(output)
    if output != log:
        while part := os.read(printed, 1 << 16):
            os.write(log, part)
        os.close(printed)
        os.close(log)
    ended = [os.wait4(pid, 0) for pid in pids]
    statuses = [os.waitstatus_to_exitcode(status) for _, status, _ in ended]
    events = [report.read_text(encoding="utf-8").splitlines() for report in reports]
    for pid in pids:
        left = True
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            left = False
        if left:
            events[0].append(f"LEFT {pid}")
            os.killpg(pid, signal.SIGKILL)
    seconds = sum(usage.ru_utime + usage.ru_stime for *_, usage in ended)
    return Outcome(statuses=statuses, events=events, cpu_s=seconds)


def main() -> None:
    """Answer jobs until the input ends."""
    warm()
    print("warm", flush=True)  # noqa: T201 - the answer of this program
    for line in sys.stdin:
        print(json.dumps(asdict(run(Job(**json.loads(line))))), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
