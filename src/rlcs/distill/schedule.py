"""Asks until every problem has enough answers to keep, or all its tries.

A problem that needs m more answers to keep has at most m tries under way, so the set of tries that are
asked does not depend on which answer arrives first: a run that was killed ends like an undisturbed one.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rlcs.distill.chains import Chain, Turn, formatted
from rlcs.distill.filters import CUT, reason_to_reject
from rlcs.distill.teachers import Asked, Failed, Reply, Voice
from rlcs.distill.tries import Said, Try, TryLog
from rlcs.grading import GradePool
from rlcs.progress import Screen
from rlcs.recipe.schema import Teacher
from rlcs.records import Problem
from rlcs.signals import StopFlag

_ROUNDS = 3  # what failed for a reason that may pass is asked again at the end
_SHOW_S = 0.2


def why_not(problem: Problem, made: Try, teacher: Teacher) -> str:
    """Why a try is not to be imitated; "" if it may be."""
    if teacher.keep == "all":
        return "" if made.response.strip() else "empty"
    if not made.correct:
        return made.why or "wrong"
    if made.stop == "length":
        return CUT
    return "" if teacher.who == "builtin" else reason_to_reject(problem.asked, made.response, teacher.filters)


def cost(teacher: Teacher, prompt_tokens: int, completion_tokens: int) -> float | None:
    """In the currency of the prices; None without any."""
    prices = (teacher.prompt_price, teacher.completion_price)
    if prices == (None, None):
        return None
    return (prompt_tokens * (prices[0] or 0.0) + completion_tokens * (prices[1] or 0.0)) / 1e6


class Asking:
    """Some problems before one teacher.

    `failed` says what was not answered for a reason that may pass, `refused` what never will be; and why.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        teacher: Teacher,
        *,
        chain: Chain | None,
        log: TryLog,
        pool: GradePool,
    ) -> None:
        """`chain` is None for the built-in teacher, which writes all turns at once."""
        self._problems = {problem.id: problem for problem in problems}
        self._teacher, self._chain, self._log, self._pool = teacher, chain, log, pool
        self._ready: deque[tuple[str, int, int]] = deque()
        self._again: list[tuple[str, int, int]] = []
        self._under_way: dict[str, set[int]] = {problem.id: set() for problem in problems}
        self._usable: Counter[str] = Counter()
        self._tries = self._right = self._done = self._new_tokens = 0
        self._spent = 0.0
        self.failed: dict[tuple[str, int], str] = {}
        self.refused: dict[tuple[str, int], str] = {}

    def run(self, voice: Voice, *, view: Screen | None, stop: StopFlag | None) -> None:
        """Ask what is not answered yet; returns early, with all answers on disk, when `stop` is set."""
        for made in list(self._log.tries.values()):
            self._count(made)
        for name in self._problems:
            self._open(name)
        self._new_tokens, started, shown = 0, time.monotonic(), 0.0
        for _ in range(_ROUNDS):
            for name, attempt, turn in self._again:
                del self.failed[name, attempt]
                self._ready.append((name, attempt, turn))
            self._again.clear()
            while self._ready and not (stop and stop.is_set):
                for replies in voice.answers(self._drawn(), stop):
                    self._take(replies)
                    now = time.monotonic()
                    if view is not None and now - shown > _SHOW_S:
                        shown = now
                        view.advance(self._done, **self._figures(now - started))
        if view is not None:
            view.advance(self._done, **self._figures(time.monotonic() - started))

    def _figures(self, seconds: float) -> dict[str, float]:
        figures = {
            "pass_rate": self._right / max(1, self._tries),
            "kept": float(sum(min(n, self._teacher.keep_most) for n in self._usable.values())),
            "tokens_per_s": round(self._new_tokens / max(seconds, 1e-3), 1),
        }
        return figures if cost(self._teacher, 0, 0) is None else {**figures, "cost": self._spent}

    def _open(self, name: str) -> None:
        """Start the tries that a problem surely needs; count it as done when it needs none."""
        teacher, waiting = self._teacher, self._under_way[name]
        missing = [n for n in range(teacher.tries) if (name, n) not in self._log.tries and n not in waiting]
        wanted = teacher.enough - self._usable[name] - len(waiting) if teacher.enough else len(missing)
        for attempt in missing[: max(0, wanted)]:
            waiting.add(attempt)
            self._ready.append((name, attempt, len(self._turns(name, attempt))))
        self._done += not waiting

    def _turns(self, name: str, attempt: int) -> list[Said]:
        """The answers to the earlier requests of a try, as far as they are known."""
        turns: list[Said] = []
        while (said := self._log.turns.get((name, attempt, len(turns)))) is not None:
            turns.append(said)
        return turns

    def _drawn(self) -> Iterator[Asked]:
        while self._ready:
            name, attempt, turn = self._ready.popleft()
            problem = self._problems[name]
            if self._chain is not None:
                problem = self._chain.request(problem, _spoken(self._turns(name, attempt)))
            yield Asked(problem=problem, attempt=attempt, turn=turn)

    def _take(self, replies: Sequence[Reply]) -> None:
        finished: list[tuple[list[Said], str]] = []
        for reply in replies:
            if isinstance(reply, Failed):
                key = (reply.asked.problem.id, reply.asked.attempt)
                (self.failed if reply.again else self.refused)[key] = reply.error
                if reply.again:
                    self._again.append((*key, reply.asked.turn))
                continue
            asked, said = reply
            turns = [*self._turns(said.id, said.attempt), said]
            if self._chain is None:
                finished.append((turns, formatted(said.response, "", self._teacher.format)))
            elif len(turns) == self._chain.length:
                finished.append((turns, self._chain.response(_spoken(turns))))
            else:
                self._log.add_turn(said)
                self._ready.appendleft((said.id, asked.attempt, asked.turn + 1))
        self._finish(finished)

    def _finish(self, finished: Sequence[tuple[list[Said], str]]) -> None:
        """Grade tries, write them, and see what their problems still need."""
        answers = [(self._problems[turns[0].id], response) for turns, response in finished]
        for (turns, response), grade in zip(finished, self._pool.grade(answers), strict=True):
            last = turns[-1]
            made = Try(
                id=last.id,
                attempt=last.attempt,
                response=response,
                **asdict(grade),
                stop=last.stop,
                prompt_tokens=sum(turn.prompt_tokens for turn in turns),
                completion_tokens=sum(turn.completion_tokens for turn in turns),
                seconds=round(sum(turn.seconds for turn in turns), 3),
            )
            self._log.add_try(made)
            self._count(made)
            self._under_way[made.id].discard(made.attempt)
            self._open(made.id)

    def _count(self, made: Try) -> None:
        if made.attempt >= self._teacher.tries:
            return  # more were asked for once
        self._tries += 1
        self._right += made.correct is True
        self._new_tokens += made.completion_tokens
        self._spent += cost(self._teacher, made.prompt_tokens, made.completion_tokens) or 0.0
        self._usable[made.id] += not why_not(self._problems[made.id], made, self._teacher)


def _spoken(turns: Sequence[Said]) -> list[Turn]:
    return [Turn(text=turn.response, reasoning=turn.reasoning) for turn in turns]
