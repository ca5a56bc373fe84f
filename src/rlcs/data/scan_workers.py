"""Processes that scan chunks of lines: new interpreters, never forks, each of which ends with its input.

`python -m rlcs.data.scan_workers` is such a process: it reads a `ScanTask`, then chunks, and answers each
with what was `Found`, or None where it failed: the process that asked then reads the chunk itself, and finds
out why. All of it is pickled, as it only goes between processes of one command.
"""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from queue import SimpleQueue
from typing import Any

from rlcs.data.files import JsonLines, NumberedLine
from rlcs.data.scanner import Found, Scanner, ScanTask

Chunk = list[NumberedLine]
"""Lines that follow each other, which a process gets at once."""

_PROGRAM = ("-m", "rlcs.data.scan_workers")
_AHEAD = 2
"""Chunks for each process that are read before they are needed."""


class ScanWorkers(AbstractContextManager["ScanWorkers"]):
    """Some processes that scan chunks at the same time; a context manager, which ends them."""

    def __init__(self, task: ScanTask[Any], count: int) -> None:
        """Each process starts with its first chunk, and again if it died."""
        self._workers = [_Worker(task) for _ in range(count)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count)

    def __exit__(self, *error: object) -> None:
        """Kill the processes, also in the middle of a chunk, and wait for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._threads.shutdown()
        for worker in self._workers:
            worker.close()  # also one that a thread started meanwhile

    def scanned(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Found[Any] | None]]:
        """Each chunk with what was found in it alone, in order; None where a process failed or died."""
        waiting: deque[tuple[Chunk, Future[Found[Any] | None]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, self._threads.submit(self._scan, chunk)))
            if len(waiting) > _AHEAD * len(self._workers):
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()

    def _scan(self, chunk: Chunk) -> Found[Any] | None:
        worker = self._idle.get()
        try:
            return worker.scan(chunk)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process, which starts when it is needed."""

    def __init__(self, task: ScanTask[Any]) -> None:
        self._task = task
        self._process: subprocess.Popen[bytes] | None = None

    def scan(self, chunk: Chunk) -> Found[Any] | None:
        """Let the process scan a chunk; None if it failed or died."""
        try:
            process = self._process = self._process or self._start()
            assert process.stdin and process.stdout, "Popen opens both pipes"
            pickle.dump(chunk, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            found: Found[Any] | None = pickle.load(process.stdout)  # noqa: S301 - from our own process
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):  # it died, or was ended
            self.close()
            return None
        return found

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-P", *_PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
        )
        assert process.stdin, "Popen opens both pipes"
        pickle.dump(self._task, process.stdin, pickle.HIGHEST_PROTOCOL)
        return process

    def close(self) -> None:
        """Kill the process and wait for it."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    if pipe:
                        pipe.close()


def main() -> None:
    """Answer chunks until the input ends."""
    jobs, results = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what anything prints is no result
    task: ScanTask[Any] = pickle.load(jobs)  # noqa: S301 - from the process that started this one
    scanner, rows = Scanner(task), task.table.rows
    assert isinstance(rows, JsonLines), "only lines are sent to other processes"
    with suppress(EOFError):
        while True:
            chunk: Chunk = pickle.load(jobs)  # noqa: S301 - as above
            try:
                found = scanner.read_alone(map(rows.row, chunk))
            except Exception:  # whatever it is, the parent meets it again and reports it
                found = None
            pickle.dump(found, results, pickle.HIGHEST_PROTOCOL)
            results.flush()


if __name__ == "__main__":
    main()
