"""Answers a file of questions, in the file's order; each answer is written at once, and a run can resume."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlcs.data.loading import load
from rlcs.data.rows import BadRow
from rlcs.errors import DataError, UserError
from rlcs.generation import SampleLog
from rlcs.grading.extraction import extract
from rlcs.progress import screen
from rlcs.recipe.schema import Data, Images
from rlcs.records import Problem, Request, Sample, StopReason, to_row
from rlcs.serving.session import Session, Settings, Stream
from rlcs.signals import StopFlag
from rlcs.storage import read_jsonl


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """How many rows were answered now and before, and which could not be used."""

    answered: int
    before: int
    bad: tuple[BadRow, ...]


@dataclass(frozen=True, kw_only=True)
class SessionSampler:
    """A loaded model with `ahead` requests under way; samples are yielded in the order of the requests."""

    session: Session
    settings: Settings
    ahead: int

    def samples(self, requests: Iterable[Request], *, stop: StopFlag | None = None) -> Iterator[Sample]:
        """See `Sampler.samples`."""
        source, under_way = iter(requests), deque[tuple[Request, Stream]]()
        try:
            while not (stop and stop.is_set):
                while len(under_way) < self.ahead and (request := next(source, None)) is not None:
                    try:
                        chat = self.session.chat
                        prompt = chat.checked(chat.conversation(request.messages, name=request.id))
                        under_way.append((request, self.session.start(prompt, self.settings)))
                    except DataError as error:
                        yield request.sample(error=str(error))
                if not under_way:
                    return
                request, stream = under_way.popleft()
                answer = stream.answer
                yield request.sample(
                    text=answer.text,
                    stop=StopReason.LENGTH if answer.stop == "length" else StopReason.EOS,
                    prompt_tokens=answer.prompt_tokens,
                    tokens=answer.tokens,
                    seconds=round(answer.seconds, 3),
                )
        finally:
            for _, stream in under_way:
                stream.close()


def answer_questions(sampler: SessionSampler, source: str, out: Path, *, stop: StopFlag, json: bool) -> Tally:
    """Answer every question of a data source that has no answer in `out` yet.

    Rows without a usable question or image are left out and counted. Raises DataError when the source
    cannot be used as a whole, UserError when `out` holds answers of another model, with other settings or to
    other questions, and Stopped with everything that was answered on disk.
    """
    loaded = load(source, Data(), decode_limit=Images().decode_limit, role="ask")
    settings = {"model": sampler.session.name, **asdict(sampler.settings)}
    _require_same(out, settings)
    problems = {row.problem.id: row.problem for row in loaded.rows}
    digests = {name: replace(problem, answer="").digest for name, problem in problems.items()}
    bad = list(loaded.bad)
    with SampleLog(out, digests) as log, screen("generate", len(problems), json=json) as view:
        before = len(log.entries)
        requests = log.unanswered(Request.of(problem) for problem in problems.values())
        for sample in sampler.samples(requests, stop=stop):
            if sample.error:
                bad.append(BadRow(where=source, reason=sample.error, id=sample.id))
                continue
            log.add(sample, {**_columns(problems[sample.id], sample), "settings": settings})
            view.advance(len(log.entries))
    stop.check(str(out))
    return Tally(answered=len(log.entries) - before, before=before, bad=tuple(bad))


def _columns(problem: Problem, sample: Sample) -> dict[str, Any]:
    """Columns beside the sample; the gold answer, where there is one, makes `rlcs grade` read the file."""
    gold = {"answer": problem.answer} if problem.answer else {}
    choices = {"choices": list(problem.choices)} if problem.choices else {}
    history = {"history": [to_row(turn) for turn in problem.history]} if problem.history else {}
    return {
        **history,
        "question": problem.question,
        **choices,
        **gold,
        "extracted": extract(sample.text).text,
    }


def _require_same(out: Path, settings: dict[str, Any]) -> None:
    """Raise UserError if `out` holds answers that were not given under these settings."""
    rows = read_jsonl(out) if out.exists() else []
    other = next((row for row in rows if row.get("settings") != settings), None)
    if other is not None:
        what = f"the file holds answers of {other.get('settings') or 'something else'}, not of {settings}"
        raise UserError(what, where=str(out), fix="write to another file, or remove this one")
