"""Grades in bounded time: math-verify runs in worker processes that are killed at a deadline.

Most answers are decided without a process. Formulas that `compare` cannot decide are sent to workers, in
small batches and each different pair once; with a user's reward function, every answer is. An answer on which
a worker runs out of time or dies is unscored; the others of its batch are sent again. Workers start when
first needed and are new interpreters, never forks: the parent may hold torch, threads and a GPU.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from rlcs.errors import RlcsError
from rlcs.grading.compare import Verdict
from rlcs.grading.extraction import BOXED, Extraction
from rlcs.grading.golds import unwrap
from rlcs.grading.inspection import formulas_of, gold_fault
from rlcs.grading.own import problem_json
from rlcs.grading.rewards import Undecided, grade_extracted, quick_grade
from rlcs.records import Grade, Problem, from_row

Gold = tuple[str, tuple[str, ...]]
"""A gold answer, and the choices of its problem."""

Pair = tuple[str, str]
"""Two formulas, or a problem and a response."""

_BATCH = 16
_BATCH_BYTES = 60_000  # below the size of a pipe's buffer, so that writing to an idle worker never waits
_START_S = 120.0
_MAX_FAILED_STARTS = 3


class GradePool(AbstractContextManager["GradePool"]):
    """Grades responses in order; a context manager. Safe to call from any thread."""

    def __init__(
        self,
        *,
        workers: int = 1,
        deadline_s: float = 5.0,
        allow_fallbacks: bool = False,
        function: str | None = None,
    ) -> None:
        """Use `workers` processes (0: one for every two CPU cores), `deadline_s` seconds for each decision.

        `function` (`FILE.py:NAME`, see `own.check_function`) replaces the rule in `grade`.
        """
        if workers < 0 or deadline_s <= 0:
            raise ValueError(f"{workers} workers with a deadline of {deadline_s} s")
        self.deadline_s = deadline_s
        self.allow_fallbacks = allow_fallbacks
        self._function = function
        self._size = workers or max(1, (os.cpu_count() or 1) // 2)
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._lock = threading.Lock()

    def __exit__(self, *error: object) -> None:
        """Stop the workers."""
        self.close()

    def close(self) -> None:
        """Kill the workers and wait for them; the pool can be used again and starts new ones."""
        with self._lock:
            self._kill_workers()

    def grade(self, answers: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Grade every (problem, response), in order."""
        if self._function is not None:
            pairs = [(problem_json(problem), text) for problem, text in answers]
            grades = self._decide(pairs)
            return [grades[pair] for pair in pairs]
        return self.settle(
            [quick_grade(p, text, allow_fallbacks=self.allow_fallbacks) for p, text in answers]
        )

    def settle(self, results: Sequence[Grade | Undecided]) -> list[Grade]:
        """Decide undecided results by math-verify; return all grades, in order."""
        grades = self._decide(r.formulas for r in results if isinstance(r, Undecided))
        return [r.grade(grades[r.formulas]) if isinstance(r, Undecided) else r for r in results]

    def gold_faults(self, problems: Iterable[Problem]) -> dict[Gold, str]:
        """Find gold answers (with their choices) that no answer can match, and the reasons.

        Each is graded as an answer to itself, written with one more space so that it must be read; what is
        not right, or cannot be read as a formula, is named.
        """
        different = {(problem.answer, problem.choices): problem for problem in problems}
        faults = {gold: gold_fault(*gold) for gold in different}
        sound = [gold for gold in different if not faults[gold]]
        given = [Extraction(text=f"\\,{unwrap(gold).text}", why=BOXED) for gold, _ in sound]
        itself = self.settle(
            [grade_extracted(different[g], text) for g, text in zip(sound, given, strict=True)]
        )
        read = self._decide(pair for gold in sound for pair in formulas_of(*gold))
        for gold, grade in zip(sound, itself, strict=True):
            parts = [read[pair] for pair in formulas_of(*gold)]
            whys = [p.why if p.correct is None else "it is not a formula" for p in parts if not p.correct]
            whys += [] if grade.correct else [grade.why]
            faults[gold] = f"the gold answer {gold[0][:60]!r} cannot be read: {whys[0]}" if whys else ""
        return {gold: fault for gold, fault in faults.items() if fault}

    def _decide(self, pairs: Iterable[Pair]) -> dict[Pair, Grade]:
        """Let the workers grade each different pair."""
        different = list(dict.fromkeys(pairs))
        with self._lock:
            try:
                return self._distribute(different) if different else {}
            except BaseException:  # also Ctrl-C: a worker in the middle of a batch cannot be reused
                self._kill_workers()
                raise

    def _kill_workers(self) -> None:
        while self._workers:
            self._workers.pop().kill()

    def _distribute(self, pairs: list[Pair]) -> dict[Pair, Grade]:
        """Send batches to free workers until every pair has a grade."""
        for worker in [w for w in self._workers if w.process.poll() is not None]:
            worker.kill()  # it died while idle, so that no answer is the cause
            self._workers.remove(worker)
        waiting, grades = deque(pairs), dict[Pair, Grade]()
        batch = max(1, min(_BATCH, len(pairs) // (2 * self._size)))
        wanted = min(self._size, len(pairs))
        while len(grades) < len(pairs):
            while waiting and len(self._workers) < wanted:
                self._workers.append(_Worker(self.deadline_s, self._function))
            for worker in self._workers:
                if waiting and worker.ready and not worker.pending:
                    worker.send(_next_batch(waiting, batch))
            self._wait()
            for worker in list(self._workers):
                grades.update(worker.receive())
                if why := worker.failure():
                    self._remove(worker, why, waiting, grades)
        return grades

    def _wait(self) -> None:
        """Sleep until a worker has written output or the next deadline is reached."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.output, selectors.EVENT_READ)
            nearest = min(worker.deadline for worker in self._workers)
            selector.select(min(1.0, max(0.0, nearest - time.monotonic())))

    def _remove(self, worker: "_Worker", why: str, waiting: deque[Pair], grades: dict[Pair, Grade]) -> None:
        """Kill a worker that failed: its current pair is unscored, the rest of its batch is queued again."""
        worker.kill()
        self._workers.remove(worker)
        self._failed_starts = 0 if worker.ready else self._failed_starts + 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise RlcsError(
                f"the grader does not start: {why}",
                where="grading",
                fix=f"see what `{' '.join(worker.command)}` prints; is math-verify installed?",
            )
        if worker.pending:
            grades[worker.pending.popleft()] = Verdict(correct=None, why=why).grade()
            waiting.extendleft(reversed(worker.pending))


def _next_batch(waiting: deque[Pair], most: int) -> list[Pair]:
    batch: list[Pair] = []
    size = 0
    while waiting and len(batch) < most:
        size += len(json.dumps(waiting[0])) + 2
        if batch and size > _BATCH_BYTES:
            break
        batch.append(waiting.popleft())
    return batch


class _Worker:
    """One process: `pending` are the pairs that it has to grade, `deadline` is on the monotonic clock."""

    def __init__(self, deadline_s: float, function: str | None) -> None:
        self.deadline_s = deadline_s
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.command = [sys.executable, "-P", "-m", "rlcs.grading.worker", f"{deadline_s:g}"]
        self.command += [] if function is None else [function]
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C reaches the parent alone, and a kill reaches the children too
        )
        assert self.process.stdin and self.process.stdout, "Popen opens both pipes"
        self.input, self.output = self.process.stdin, self.process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.deadline = time.monotonic() + _START_S
        self.ready = False
        self.ended = False
        self.pending: deque[Pair] = deque()
        self._text = b""

    def send(self, batch: list[Pair]) -> None:
        """Send a batch; the clock of its first pair starts."""
        self.pending = deque(batch)
        self.deadline = time.monotonic() + self.deadline_s
        with contextlib.suppress(BrokenPipeError):  # it died: `failure` reports the end of its output
            self.input.write(json.dumps(batch).encode() + b"\n")
            self.input.flush()

    def receive(self) -> list[tuple[Pair, Grade]]:
        """Read the grades that have arrived; each one restarts the clock."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.output.fileno(), 1 << 16):
                self._text += chunk
            self.ended = True
        *lines, self._text = self._text.split(b"\n")
        arrived: list[tuple[Pair, Grade]] = []
        for line in lines:
            if self.ready:
                arrived.append((self.pending.popleft(), from_row(Grade, json.loads(line))))
            self.ready = True
            self.deadline = time.monotonic() + self.deadline_s if self.pending else float("inf")
        return arrived

    def failure(self) -> str:
        """The reason why this worker cannot be used any more, or ""."""
        if self.ended:
            code = self.process.wait()
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return f"the grader process died ({cause})"
        if time.monotonic() < self.deadline:
            return ""
        return f"timed out after {self.deadline_s:g} s" if self.ready else f"not ready after {_START_S:g} s"

    def kill(self) -> None:
        """Kill the process and its children, and wait for its end."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.input, self.output):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
