"""Starts Python programs for tests from a process that has imported the slow libraries once.

Importing torch, transformers and rlcs takes a process longer than most tests let it work. `Popen` and `run`
are those of `subprocess`, but a program of this Python is forked from a process that waits with everything
imported. It is a process like any other, and a child of the one that started it: pipes, signals, exit codes
and process groups are what they always are. What must be imported anew (a test of imports, of what is set
before torch is loaded, or of another Python) is started by `subprocess` itself, as is everything where the
system is not Linux.
"""

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
import warnings
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

IMPORTED = (
    "torch.distributed.run", "torch.distributed.elastic.multiprocessing.subprocess_handler",
    "rlcs.cli.main", "rlcs.pipeline.study", "rlcs.pipeline.seeds", "rlcs.train.grpo", "rlcs.train.sft",
    "rlcs.model.loading", "rlcs.evals.run", "rlcs.report.page", "rlcs.distill.run",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto",
)  # fmt: skip
"""Modules that the programs of tests need; importing them starts no thread and reads no weights."""
_FLAGS = ("-u", "-W")
_SUBREAPER = 36
"""`PR_SET_CHILD_SUBREAPER` of Linux: orphans among the descendants become children of this process."""
_LARGEST = 1 << 20


class _Nursery:
    """The end of a socket at whose other end a process waits to fork programs from itself."""

    def __init__(self, ours: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        self._socket, self._process = ours, process
        self._lock = threading.Lock()

    def fork(self, request: dict[str, Any], streams: list[int]) -> int:
        """The id of a new child of this process, which runs what is asked for."""
        with self._lock:
            prctl = ctypes.CDLL(None, use_errno=True).prctl
            prctl(_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode()], streams)
                return int(self._socket.recv(_LARGEST))
            finally:
                prctl(_SUBREAPER, 0, 0, 0, 0)


_nurseries: dict[int, _Nursery] = {}
"""The nursery of this process, by its id: a fork does not share its parent's."""


def _nursery() -> _Nursery:
    if os.getpid() not in _nurseries:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        theirs.close()
        _nurseries[os.getpid()] = _Nursery(ours, process)
    return _nurseries[os.getpid()]


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A `subprocess.Popen`, whose program starts with what is imported already."""

    def _execute_child(self, *given: Any) -> None:
        """Fork the program instead of executing it; what cannot be started so is started as ever."""
        options = signature(super()._execute_child).bind(*given).arguments
        program = _program([os.fspath(word) for word in options["args"]])
        if program is None or options["preexec_fn"] is not None or options["pass_fds"] or options["shell"]:
            super()._execute_child(*given)
            return
        ends = ("p2cread", "c2pwrite", "errwrite")
        streams = [fd if (fd := options[end]) != -1 else own for own, end in enumerate(ends)]
        environment = os.environ if options["env"] is None else options["env"]
        request = program | {
            "environment": {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()},
            "folder": os.fspath(options["cwd"] or Path.cwd()),
            "session": options["start_new_session"],
            "group": options["process_group"],
        }
        try:
            self.pid = _nursery().fork(request, streams)
        finally:
            piped = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
            self._close_pipe_fds(*(options[end] for end in piped))  # type: ignore[attr-defined]
        self._child_created = True


def run(*given: Any, check: bool = False, timeout: float | None = None, **options: Any) -> Any:
    """`subprocess.run` of a program that starts with what is imported already."""
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    written = options.pop("input", None)
    if written is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(*given, **options) as process:
        try:
            out, error = process.communicate(written, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, error)
    if check:
        done.check_returncode()
    return done


def _program(words: list[str]) -> dict[str, Any] | None:
    """What a command of this Python runs; None for other commands and options, and on other systems."""
    if words[0] != sys.executable or sys.platform != "linux":
        return None
    words, quiet = words[1:], False
    while words and words[0] in _FLAGS:
        quiet = quiet or words[0] == "-W"
        words = words[2 if words[0] == "-W" else 1 :]
    if not words or (words[0].startswith("-") and words[0] not in ("-m", "-c")):
        return None
    kind = words[0] if words[0] in ("-m", "-c") else ""
    return {"kind": kind, "words": words[1:] if kind else words, "quiet": quiet}


# ------------------------------------------------------------------------ in the process that waits


def _serve(ours: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork whenever asked to. Returns in each fork, with what it is to run; None when the asking ends."""
    while True:
        try:
            asked, streams, *_ = socket.recv_fds(ours, _LARGEST, 3)
        except KeyboardInterrupt:
            return None
        if not asked:
            return None
        read, write = os.pipe()
        middle = os.fork()  # whose end makes its child one of the process that asked
        if middle == 0:
            middle = os.getpid()
            child = os.fork()
            if child != 0:
                os.write(write, str(child).encode())
                os._exit(0)
            for fd in (read, write, ours.detach()):
                os.close(fd)
            while os.getppid() == middle:
                time.sleep(0.001)
            return json.loads(asked), streams
        os.waitpid(middle, 0)
        ours.send(os.read(read, 32))
        for fd in (read, write, *streams):
            os.close(fd)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Take on the streams, the environment and the folder of a new program."""
    if request["session"]:
        os.setsid()
    if request["group"] not in (None, -1):
        os.setpgid(0, request["group"])
    for own, fd in enumerate(streams):
        os.dup2(fd, own)
    for fd in set(streams) - {0, 1, 2}:
        os.close(fd)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]
    if request["quiet"]:
        warnings.simplefilter("ignore")
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
        importlib.import_module("torch").set_num_threads(int(threads))


def _run(kind: str, words: list[str]) -> None:
    """Run a program as `python` would: a module, a text or a file."""
    if kind == "-m" and words[0] == "torch.distributed.run":
        _fork_own_nursery()
    sys.argv = ["-c" if kind == "-c" else words[0], *words[1:]]
    if kind == "-m":
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        return
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    if kind == "-c":
        sys.path.insert(0, "")
        code, name = words[0], "<string>"
    else:
        sys.path.insert(0, str(Path(words[0]).parent))
        code, name = Path(words[0]).read_text(encoding="utf-8"), words[0]
        main.__dict__["__file__"] = name
    exec(compile(code, name, "exec"), main.__dict__)  # noqa: S102 - the test's own program


def _fork_own_nursery() -> None:
    """Let the ranks of torchrun be forked too, by a process that is forked before there are threads."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        _work(theirs)
        raise SystemExit
    theirs.close()
    _nurseries[os.getpid()] = _Nursery(ours)
    handler = importlib.import_module("torch.distributed.elastic.multiprocessing.subprocess_handler")
    handler.subprocess_handler.Popen = Popen


def _work(theirs: socket.socket) -> None:
    """Fork until nobody can ask any more; what is forked runs its program here."""
    found = _serve(theirs)
    if found is None:
        os._exit(0)
    request, streams = found
    _become(request, streams)
    _run(request["kind"], request["words"])


def _main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    _work(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    _main()
