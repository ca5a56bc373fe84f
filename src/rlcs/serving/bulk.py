"""Answers to a file of questions: in the file's order, written as they come, resumable."""

from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlcs.data.loading import load
from rlcs.data.rows import BadRow
from rlcs.errors import DataError, UserError
from rlcs.progress import screen
from rlcs.recipe.schema import Data, Images
from rlcs.records import Problem
from rlcs.serving.session import Answer, Session, Settings, Stream
from rlcs.signals import StopFlag
from rlcs.storage import append_jsonl, read_jsonl


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """What became of the rows: answered now, answered before, and not to be asked."""

    answered: int
    before: int
    bad: tuple[BadRow, ...]


def answer_file(
    session: Session, source: str, out: Path, settings: Settings, *, ahead: int, stop: StopFlag, json: bool
) -> Tally:
    """Answer every question of a data source that has no answer in `out` yet, `ahead` of them at once.

    Rows without a usable question or image are left out and counted. Raises DataError when the source
    cannot be used as a whole, UserError when `out` holds answers of another model, with other settings or to
    other questions, and Stopped with everything that was answered on disk.
    """
    loaded = load(source, Data(), decode_limit=Images().decode_limit, role="ask")
    said_by = {"model": session.name, **asdict(settings)}
    before = _answered(out, said_by)
    problems = [row.problem for row in loaded.rows]
    left = [problem for problem in problems if problem.id not in before]
    for problem in problems:
        if problem.id in before and before[problem.id] != _asked(problem):
            what = f"the file holds an answer to another question {problem.id!r}"
            fix = "write to another file, or give rows an `id` that stays when others come or go"
            raise UserError(what, where=str(out), fix=fix)
    known = len(loaded.rows) - len(left)
    bad, done = list(loaded.bad), 0
    under_way: deque[tuple[Problem, Stream]] = deque()
    with screen("generate", len(loaded.rows), json=json) as view:
        try:
            while left or under_way:
                stop.check(str(out))
                while left and len(under_way) < ahead:
                    problem = left.pop(0)
                    try:
                        stream = session.start(session.chat.prompt(problem), settings)
                        under_way.append((problem, stream))
                    except DataError as error:
                        bad.append(BadRow(where=source, reason=str(error), id=problem.id))
                if under_way:
                    problem, stream = under_way.popleft()
                    append_jsonl(out, [_row(problem, stream.answer, said_by)])
                    done += 1
                    view.advance(known + done)
        finally:
            for _, stream in under_way:
                stream.close()
    return Tally(answered=done, before=known, bad=tuple(bad))


def _asked(problem: Problem) -> dict[str, Any]:
    """What tells a question from another with the same id."""
    return {"question": problem.question, "images_sha256": [image.sha256 for image in problem.images]}


def _row(problem: Problem, answer: Answer, said_by: dict[str, Any]) -> dict[str, Any]:
    """One line of the output; with the gold answer, where there is one, so that `rlcs grade` can read it."""
    gold = {"answer": problem.answer} if problem.answer else {}
    choices = {"choices": list(problem.choices)} if problem.choices else {}
    return {
        "id": problem.id,
        **_asked(problem),
        **choices,
        **gold,
        "response": answer.text,
        "extracted": answer.answer,
        "stop": answer.stop,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "seconds": round(answer.seconds, 3),
        "said_by": said_by,
    }


def _answered(out: Path, said_by: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The questions that `out` has answers to, by id. Raises UserError if others gave them."""
    if not out.exists():
        return {}
    rows = read_jsonl(out)
    other = next((row for row in rows if row.get("said_by") != said_by), None)
    if other is not None:
        what = f"the file holds answers of {other.get('said_by') or 'something else'}, not of {said_by}"
        raise UserError(what, where=str(out), fix="write to another file, or remove this one")
    return {row["id"]: {key: row.get(key) for key in ("question", "images_sha256")} for row in rows}
