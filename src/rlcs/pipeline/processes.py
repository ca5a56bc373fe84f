"""Shares a run on CPUs among processes, as `torchrun` does, where that is faster than threads.

A step of a small model is many short operations, most of which a second thread does not speed up; a second
process does half of the problems. The command that was typed becomes rank 0, and starts itself once more for
every further rank, each of which has a copy of the model (`model.copies`).
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from rlcs.cores import MEETING, OWN, STARTED, Cores, busy_cores, threads_chosen, threads_of_each
from rlcs.errors import RlcsError
from rlcs.model.source import find_source
from rlcs.recipe.schema import Recipe

LARGEST_WEIGHTS = 1 << 30
"""Bytes of weights above which threads alone keep the cores busy, and copies would take much memory."""
PROCESS_BYTES = 3 << 29
"""Main memory of a process beside its copies of the weights: libraries, data, activations."""
COPIES = 5
"""Copies of the weights in a process: weights, gradients, AdamW's two moments, the reference."""
MEMORY_SHARE = 0.5
"""Largest share of the free memory that all processes may take."""
MOST = 8
"""Processes at most: each pays the whole cost of a pass, however few problems it has."""
_GRACE_S = 5.0
"""Seconds in which the other ranks end by themselves after rank 0 has failed."""
_NOTICE_S = 30.0
"""Seconds in which rank 0 finds out by itself that another rank has failed, and says so in better words."""
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def number_of(recipe: Recipe, cores: Cores, environment: Mapping[str, str]) -> int:
    """The number of processes that share a run of this recipe: `parallel.processes`, or what suits it.

    One where ranks are started already, where there may be GPUs, where the user has chosen the number of
    threads, elsewhere than on Linux, and for models that are large, unknown before they are loaded, or
    computed by other programs.
    """
    if STARTED in environment:
        return 1
    if recipe.parallel.processes != "auto":
        return recipe.parallel.processes
    needs_one = (
        sys.platform != "linux"  # where it was not tried
        or recipe.rollout.engine != "local"
        or any(recipe.parallel.of_shards.values())
        or recipe.grpo.teacher.model is not None
        or recipe.lora.four_bit
        or threads_chosen(environment)
        or may_have_gpus(environment)
    )
    size = 0 if needs_one else weights_size(recipe.model.name)
    if not 0 < size <= LARGEST_WEIGHTS:
        return 1
    fit = int(MEMORY_SHARE * psutil.virtual_memory().available / (PROCESS_BYTES + COPIES * size))
    return max(1, min(busy_cores(cores), MOST, fit, recipe.grpo.prompts_per_step, recipe.sft.batch_size))


def described(count: int, cores: Cores, environment: Mapping[str, str]) -> str:
    """Say how many processes there are, and what each has of the cores."""
    if threads_chosen(environment):
        return f"{count}"
    threads = threads_of_each(cores, count)
    return f"{count}, with {threads} thread{'s' * (threads > 1)} each"


def typed() -> list[str]:
    """The words after `rlcs` of the command that this process is; none in another program, a test say."""
    program = Path(sys.argv[0])
    is_ours = program.stem == "rlcs" or program.parts[-2:] == ("rlcs", "__main__.py")
    return sys.argv[1:] if is_ours else []


def may_have_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether this process may find a GPU; does not load torch."""
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(any(devices.glob(name)) for name in ("nvidia[0-9]*", "kfd", "dxg"))


def weights_size(name: str) -> int:
    """Bytes of a model's weights on this machine's disk; 0 if they are not here."""
    try:
        folder = find_source(name).files
    except RlcsError:  # loading says what is wrong
        return 0
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class Ranks:
    """The other ranks of a run, while `started` has them."""

    def __init__(self) -> None:
        """None yet."""
        self.processes: list[subprocess.Popen[bytes]] = []
        self.reads_data = True
        """Until the data is read: the same work on all ranks, with the same mistakes, which rank 0 tells."""
        self.have_met = False
        """Whether all ranks have joined: then they agree about errors, and end by themselves."""
        self._ending = threading.Event()

    def start(self, rank: int, words: Sequence[str]) -> None:
        """Start a rank, which ends with this process: it reads from a pipe that nobody writes to."""
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlcs", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
                "PYTHONWARNINGS": "ignore",  # rank 0 warns
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
        )
        self.processes.append(process)
        threading.Thread(target=self._watch, args=(process, rank), name="rank", daemon=True).start()

    def _watch(self, process: "subprocess.Popen[bytes]", rank: int) -> None:
        code = process.wait()
        while code > 0 and self.reads_data and not self._ending.wait(1.0):
            pass  # rank 0 makes the same mistake
        patience = 0.0 if code < 0 and not self.have_met else _NOTICE_S
        if code and not self._ending.wait(patience):
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            sys.stderr.write(
                f"error: rank {rank} of this run {how}\n"
                "  -> the same command continues from the last checkpoint; where memory ran out, with "
                "parallel.processes=1\n"
            )
            sys.stderr.flush()
            os._exit(1)  # the main thread may wait for it in native code

    def end(self, *, failed: bool) -> None:
        """Wait until all have ended; after a failure of this rank not for long."""
        self._ending.set()
        for process in self.processes:
            try:
                process.wait((_GRACE_S if self.have_met else 0) if failed else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin, "Popen opens the pipe"
            process.stdin.close()


@contextmanager
def started(count: int, words: Sequence[str], cores: Cores) -> Iterator[Ranks]:
    """In this context this process is rank 0 of `count`, and the command `words` runs as the others.

    Their threads share the cores. To be entered before torch is loaded, which reads the number of threads.
    """
    ranks = Ranks()
    if count == 1:
        try:
            yield ranks
        except RlcsError as error:
            error.reported |= _is_follower() and ranks.reads_data
            raise
        return
    folder = tempfile.mkdtemp(prefix="rlcs-")
    settings = environment(count, cores, os.environ, meeting=f"{folder}/ranks")
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    failed = True
    try:
        for rank in range(1, count):
            ranks.start(rank, words)
        yield ranks
        failed = False
    finally:
        ranks.end(failed=failed)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def environment(count: int, cores: Cores, given: Mapping[str, str], *, meeting: str) -> dict[str, str]:
    """The variables of rank 0 and those that all ranks share; `meeting` names a file that is not there."""
    own = {} if threads_chosen(given) else {"OMP_NUM_THREADS": str(threads_of_each(cores, count))}
    return own | {
        STARTED: OWN,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        MEETING: meeting,
        "GLOO_SOCKET_IFNAME": given.get("GLOO_SOCKET_IFNAME", _LOOPBACK),  # a host may not know its own name
    }


def _is_follower() -> bool:
    return os.environ.get(STARTED) == OWN and os.environ.get("RANK") != "0"


def follow_first() -> None:
    """In a rank that `started` has started: end with rank 0, however that ends."""
    if not _is_follower():
        return

    def follow() -> None:
        os.read(0, 1)  # nothing is written to the standard input: it ends with rank 0
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(_NOTICE_S)
        os._exit(1)  # the main thread waits for the others in native code

    threading.Thread(target=follow, name="first-rank", daemon=True).start()
