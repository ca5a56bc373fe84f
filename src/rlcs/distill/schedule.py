"""Requests samples until every problem has enough answers to keep, or as many samples as are allowed.

A problem that needs m more answers to keep has at most m samples under way. So the samples that are requested
do not depend on the order of arrival, and a run that was killed and resumed ends like an undisturbed one.
"""

import re
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping

from rlcs.distill.budget import Budget
from rlcs.distill.chains import Chain, formatted
from rlcs.distill.filters import CUT, reason_to_reject
from rlcs.engines.openai_client import EndpointClient
from rlcs.generation import Entry, SampleLog, Sampler
from rlcs.grading import GradePool
from rlcs.progress import Screen
from rlcs.recipe.schema import Teacher
from rlcs.records import Problem, Request, Sample, SampleKey, StopReason, to_row
from rlcs.signals import StopFlag

_ROUNDS = 3  # samples with a retryable error are requested again at the end
_SHOW_S = 0.2


def why_not(problem: Problem, answer: Entry, teacher: Teacher) -> str:
    """The reason why an answer must not be imitated, or ""."""
    if teacher.keep == "all":
        return "" if answer.response.strip() else "empty"
    if not answer.grade.correct:
        return answer.grade.why or "wrong"
    if answer.sample.stop is StopReason.LENGTH:
        return CUT
    if teacher.who == "builtin":
        return ""
    return reason_to_reject(problem.transcript, answer.response, teacher.filters)


class Schedule:
    """The requests that are still to be made to one teacher about some problems.

    An answer is the log's entry of a sample's last turn: its `response` is composed of all turns, and graded.
    `failed` holds retryable errors by problem and index, `refused` final ones.
    """

    def __init__(
        self,
        problems: Mapping[str, Problem],
        teacher: Teacher,
        *,
        chain: Chain | None,
        log: SampleLog,
        pool: GradePool,
    ) -> None:
        """Take problems by id; `chain` is None for the built-in teacher, which writes all turns at once."""
        self._problems, self._teacher, self._chain = problems, teacher, chain
        self._log, self._pool = log, pool
        self._last_turn = chain.length - 1 if chain else 0
        self._ready: deque[SampleKey] = deque()
        self._retry: list[SampleKey] = []
        self._under_way: dict[str, set[int]] = {name: set() for name in problems}
        self._usable: Counter[str] = Counter()
        self._answers = self._right = self._done = self._tokens = 0
        self._lost = (0, 0)  # tokens of replies without an answer: refusals are paid too
        self._repeated = (0, 0)  # tokens of attempts that were repeated
        self._retries: Mapping[str, int] = {}
        self._budget = Budget(teacher)
        self.failed: dict[tuple[str, int], str] = {}
        self.refused: dict[tuple[str, int], str] = {}

    def answers(self, problem: Problem) -> list[Entry]:
        """The logged answers to one problem, in the order of their indices."""
        keys = ((problem.id, index, self._last_turn) for index in range(self._teacher.max_samples))
        return [self._log.entries[key] for key in keys if key in self._log.entries]

    def spent(self) -> dict[str, object]:
        """Tokens and cost; failed and refused samples and repeated attempts, with their reasons.

        What was refused or repeated is of this run alone: the log does not keep it.
        """
        wanted = range(self._teacher.max_samples)
        samples = [e.sample for e in self._log.entries.values() if e.sample.index in wanted]
        prompt = self._lost[0] + sum(s.prompt_tokens for s in samples)
        completion = self._lost[1] + sum(s.tokens for s in samples)
        repeated_prompt, repeated_completion = self._repeated
        errors = (
            re.split("[:(]", error)[0].strip() for error in (*self.failed.values(), *self.refused.values())
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "cost": self._teacher.cost(prompt + repeated_prompt, completion + repeated_completion),
            "repeated_tokens": repeated_prompt + repeated_completion,
            "failed": len(self.failed),
            "refused": len(self.refused),
            "errors": dict(sorted(Counter(errors).items())),
            "retries": dict(sorted(self._retries.items())),
        }

    @property
    def over_budget(self) -> str:
        """Why samples are still missing that may not be requested, in words; "" if there are none."""
        return self._budget.reached if self._ready or self._retry else ""

    def run(self, sampler: Sampler, *, view: Screen | None, stop: StopFlag | None) -> None:
        """Request the missing samples.

        Returns early, with all answers on disk, when `stop` is set or the teacher's budget is spent.
        """
        for entry in self._log.entries.values():
            self._count(entry)
        for name in self._problems:
            self._open(name)
        self._tokens, started, shown = 0, time.monotonic(), 0.0
        for _ in range(_ROUNDS):
            for name, index, turn in self._retry:
                del self.failed[name, index]
                self._ready.append((name, index, turn))
            self._retry.clear()
            while self._ready and self._budget.is_left and not (stop and stop.is_set):
                for sample in sampler.samples(self._requests(), stop=stop):
                    if isinstance(sampler, EndpointClient):
                        self._count_repeated(sampler.lost)
                    if view is not None and not (sample.error or self._tokens) and sample.tokens:
                        view.say(self._first_reply(sample))
                    self._take(sample)
                    now = time.monotonic()
                    if view is not None and now - shown > _SHOW_S:
                        shown = now
                        view.advance(self._done, **self._figures(now - started))
        if view is not None:
            view.advance(self._done, **self._figures(time.monotonic() - started))
        if isinstance(sampler, EndpointClient):
            self._retries = sampler.retries

    def _first_reply(self, sample: Sample) -> str:
        """What the first answer of this run took, and what one like it to each problem would cost."""
        text = (
            f"first answer: {sample.seconds:.1f} s, {sample.prompt_tokens:,} prompt tokens, "
            f"{sample.tokens:,} answer tokens"
        )
        cost = self._teacher.cost(sample.prompt_tokens, sample.tokens)
        if cost is None:
            return text
        requests = (self._last_turn + 1) * (len(self._problems) - self._done)
        return f"{text}, cost {cost:.4g}; {requests:,} such answers cost {cost * requests:,.4g}"

    def _figures(self, seconds: float) -> dict[str, float]:
        figures = {
            "pass_rate": self._right / max(1, self._answers),
            "kept": float(sum(min(n, self._teacher.max_kept) for n in self._usable.values())),
            "tokens_per_s": round(self._tokens / max(seconds, 1e-3), 1),
        }
        return figures if self._teacher.cost(0, 0) is None else {**figures, "cost": self._budget.cost}

    def _open(self, name: str) -> None:
        """Queue the samples that a problem certainly needs; count it as done if it needs none."""
        teacher, waiting = self._teacher, self._under_way[name]
        known = {answer.sample.index for answer in self.answers(self._problems[name])} | waiting
        missing = [index for index in range(teacher.max_samples) if index not in known]
        if teacher.enough_kept:
            missing = missing[: max(0, teacher.enough_kept - self._usable[name] - len(waiting))]
        waiting.update(missing)
        self._ready.extend((name, index, len(self._turns(name, index))) for index in missing)
        self._done += not waiting

    def _turns(self, name: str, index: int) -> list[Sample]:
        """The logged turns of a sample."""
        turns: list[Sample] = []
        while (entry := self._log.entries.get((name, index, len(turns)))) is not None:
            turns.append(entry.sample)
        return turns

    def _requests(self) -> Iterator[Request]:
        while self._ready and self._budget.is_left:
            name, index, _ = self._ready.popleft()
            self._budget.request()
            problem = self._problems[name]
            if self._chain is None:
                yield Request.of(problem, index=index)
            else:
                yield self._chain.request(problem, self._turns(name, index), index=index)

    def _take(self, sample: Sample) -> None:
        """Log a sample, graded if it is the last turn, and queue the samples that its problem still needs."""
        name, index, turn = sample.key
        self._budget.arrive()
        if sample.error:
            (self.failed if sample.retryable else self.refused)[name, index] = sample.error
            prompt, completion = self._lost
            self._lost = (prompt + sample.prompt_tokens, completion + sample.tokens)
            self._budget.spend(sample.prompt_tokens, sample.tokens)
            if sample.retryable:
                self._retry.append(sample.key)
            return
        if turn < self._last_turn:
            self._count(self._log.add(sample))
            self._ready.appendleft((name, index, turn + 1))
            return
        turns = [*self._turns(name, index), sample]
        if self._chain is None:
            response = formatted(sample.text, "", self._teacher.format)
        else:
            response = self._chain.response(turns)
        (grade,) = self._pool.grade([(self._problems[name], response)])
        composed = {} if response == sample.text else {"composed": response}
        self._count(self._log.add(sample, {**composed, **to_row(grade)}))
        self._under_way[name].discard(index)
        self._open(name)

    def _count_repeated(self, lost: tuple[int, int]) -> None:
        before, self._repeated = self._repeated, lost
        self._budget.spend(lost[0] - before[0], lost[1] - before[1], answers=0)

    def _count(self, entry: Entry) -> None:
        sample, teacher = entry.sample, self._teacher
        self._budget.spend(sample.prompt_tokens, sample.tokens)
        if sample.index >= teacher.max_samples:
            return  # more were requested in an earlier run
        self._tokens += sample.tokens
        if sample.turn == self._last_turn:
            self._answers += 1
            self._right += entry.grade.correct is True
            self._usable[sample.id] += not why_not(self._problems[sample.id], entry, teacher)
