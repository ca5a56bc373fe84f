"""Grades in bounded time: math-verify runs in worker processes that are killed at a deadline.

Most answers are decided without a process. Formulas that `compare` cannot decide are sent to workers, each
different pair once; with a user's reward function, every answer is. An answer on which a worker runs out of
time or dies is unscored. Workers start when first needed and are new interpreters, never forks: the parent
may hold torch, threads and a GPU. Each has a `guard`, so that no process which it starts survives it.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from rlcs.cores import usable_cores
from rlcs.errors import RecipeError, RlcsError
from rlcs.grading.channel import VARIABLE, Channel
from rlcs.grading.compare import Verdict
from rlcs.grading.inspection import Doubt, inspect_gold
from rlcs.grading.own import KEY, problem_json
from rlcs.grading.rewards import Undecided, quick_grade
from rlcs.patience import OwnTime, Patience
from rlcs.records import Grade, Problem, from_row

Gold = tuple[str, tuple[str, ...]]
"""A gold answer, and the choices of its problem."""

Pair = tuple[str, str]
"""Two formulas, or a problem and a response."""

_START_S = 120.0
_END_S = 60.0
_TICK_S = 0.5
_MAX_FAILED_STARTS = 3
_NOT_READY = "not ready after"


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

        Those are seconds that the worker had (`Patience`), so that a busy machine fails no answer.

        `function` (`FILE.py:NAME`, see `own.check_function`) replaces the rule in `grade`.
        """
        if workers < 0 or deadline_s <= 0:
            raise ValueError(f"{workers} workers with a deadline of {deadline_s} s")
        self.deadline_s = deadline_s
        self.allow_fallbacks = allow_fallbacks
        self._function = function
        self._size = workers or max(1, usable_cores() // 2)
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

        Each must be right as an answer to itself, and be read as a formula where it is one (`inspect_gold`).
        """
        faults = dict[Gold, str]()
        doubts = dict[Gold, Doubt]()
        for problem in problems:
            gold = problem.answer, problem.choices
            found = inspect_gold(*gold)
            if isinstance(found, Doubt):
                doubts[gold] = found
            elif found:
                faults[gold] = found
        return faults | self.settle_golds(doubts)

    def settle_golds(self, doubts: Mapping[Gold, Doubt]) -> dict[Gold, str]:
        """Let math-verify judge gold answers that are in doubt; the reasons why some cannot be matched."""
        open_pairs = [each.verdict.formulas for each in doubts.values() if each.verdict.correct is None]
        grades = self._decide([*open_pairs, *(pair for each in doubts.values() for pair in each.parts)])
        faults = dict[Gold, str]()
        for gold, doubt in doubts.items():
            wrong = [grades[pair] for pair in doubt.parts if not grades[pair].correct]
            whys = [each.why if each.correct is None else "it is not a formula" for each in wrong]
            itself = doubt.verdict if doubt.verdict.correct is not None else grades[doubt.verdict.formulas]
            whys += [] if itself.correct else [itself.why]
            if whys:
                faults[gold] = f"the gold answer {gold[0][:60]!r} cannot be read: {whys[0]}"
        return faults

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
        for worker in self._workers:
            worker.end()
        while self._workers:
            self._workers.pop().kill()

    def _distribute(self, pairs: list[Pair]) -> dict[Pair, Grade]:
        """Send pairs to free workers until every one has a grade."""
        for worker in [w for w in self._workers if w.process.poll() is not None]:
            worker.kill()  # it died while idle, so that no answer is the cause
            self._workers.remove(worker)
        waiting, grades = deque(pairs), dict[Pair, Grade]()
        wanted = min(self._size, len(pairs))
        while len(grades) < len(pairs):
            while waiting and len(self._workers) < wanted:
                self._workers.append(_Worker(self.deadline_s, self._function))
            for worker in self._workers:
                if waiting and worker.ready and worker.pair is None:
                    worker.send(waiting.popleft())
            self._wait()
            for worker in list(self._workers):
                grades.update(worker.receive())
                if why := worker.failure():
                    self._remove(worker, why, grades)
        return grades

    def _wait(self) -> None:
        """Sleep until a worker has written output or ended, or its patience is to be looked at."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                assert worker.process.stdout, "Popen opens the pipe"
                selector.register(worker.process.stdout, selectors.EVENT_READ)
                for handle, writes in worker.channel.sockets:
                    selector.register(handle, selectors.EVENT_WRITE if writes else selectors.EVENT_READ)
            busy = [worker.patience.own.next_look_s for worker in self._workers if worker.is_busy]
            selector.select(min(busy, default=0.0))

    def _remove(self, worker: "_Worker", why: str, grades: dict[Pair, Grade]) -> None:
        """Kill a worker that failed: its pair is unscored. Raises RecipeError, RlcsError if none starts."""
        worker.kill()
        self._workers.remove(worker)
        self._failed_starts = 0 if worker.ready else self._failed_starts + 1
        if self._failed_starts >= _MAX_FAILED_STARTS or why.startswith(_NOT_READY):
            if self._function is not None:
                file = self._function.rpartition(":")[0]
                fix = f"see what `python {file}` does: its top level must neither end the process nor wait"
                raise RecipeError(f"{file} cannot be imported: {why}", where=KEY, fix=fix)
            raise RlcsError(
                f"the grader does not start: {why}",
                where="grading",
                fix=f"see what `{' '.join(worker.command)}` prints; is math-verify installed?",
            )
        if worker.pair is not None:
            name = "" if self._function is None else f"{self._function.rpartition(':')[2]}: "
            grades[worker.pair] = Verdict(correct=None, why=name + why).grade()


class _Worker:
    """One process and its guard: `pair` is what it has to grade now, `ready` whether it has begun."""

    def __init__(self, deadline_s: float, function: str | None) -> None:
        self.channel = Channel()
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.command = [sys.executable, "-P", "-m", "rlcs.grading.worker"]
        self.command += [] if function is None else [function]
        guard = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))]
        self.process = subprocess.Popen(
            [*guard, *self.command],
            stdin=subprocess.PIPE,  # the guard ends with it
            stdout=subprocess.PIPE,  # is closed when the guard has ended
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": path,
                VARIABLE: json.dumps([self.channel.address, self.channel.secret]),
            },
            start_new_session=True,  # Ctrl-C reaches the parent alone
        )
        self._own_time = OwnTime(self.process.pid, min(_TICK_S, deadline_s / 10))
        self.patience = Patience(self._own_time, _START_S)
        self._deadline_s = deadline_s
        self.ready = False
        self.pair: Pair | None = None

    @property
    def is_busy(self) -> bool:
        """Whether it starts or grades."""
        return self.pair is not None or not self.ready

    def send(self, pair: Pair) -> None:
        """Send a pair; its clock starts."""
        self.pair = pair
        self.patience = Patience(self._own_time, self._deadline_s)
        self.channel.send(pair)

    def receive(self) -> list[tuple[Pair, Grade]]:
        """The grade of its pair, if that has arrived."""
        arrived: list[tuple[Pair, Grade]] = []
        for row in self.channel.receive():
            if self.pair is not None:
                arrived.append((self.pair, from_row(Grade, row)))
            self.pair, self.ready = None, True
        return arrived

    def failure(self) -> str:
        """The reason why this worker cannot be used any more, or ""."""
        if (code := self.process.poll()) is not None:
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return f"the grader process died ({cause})"
        if not self.is_busy or not self.patience.is_over:
            return ""
        return f"timed out after {self._deadline_s:g} s" if self.ready else f"{_NOT_READY} {_START_S:g} s"

    def end(self) -> None:
        """Let the guard kill the worker and its descendants."""
        assert self.process.stdin, "Popen opens the pipe"
        self.process.stdin.close()

    def kill(self) -> None:
        """Kill the worker and its descendants, and wait for their end."""
        self.end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)
        self.process.kill()  # the kernel then ends the worker
        self.process.wait()
        assert self.process.stdout, "Popen opens the pipe"
        self.process.stdout.close()
        self.channel.close()
