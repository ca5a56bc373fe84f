"""What was answered, on disk: one line a try, appended as it arrives, so that a stop costs nothing twice.

`tries.jsonl` holds finished tries with their grades; `turns.jsonl` the answers to the earlier requests of
a try that takes several. Whatever moment a kill picks, at most the last line is torn, and that is cut off.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlcs.errors import RunFolderError
from rlcs.records import Grade, Problem
from rlcs.storage import append_jsonl, read_json, read_jsonl, write_json

TRIES, TURNS, SETTINGS = "tries.jsonl", "turns.jsonl", "settings.json"
ANSWERS = (TRIES, TURNS, "predictions.jsonl")
"""What may hold answers in a folder that is claimed."""
_SYNC_S = 1.0  # a power cut may cost this much; a kill costs nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """The answer to one request, number `turn` of try `attempt`; tokens are of this request."""

    id: str
    attempt: int
    turn: int
    response: str
    reasoning: str = ""
    stop: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Try:
    """One finished try: the response as composed, its verdict, and what all its requests took."""

    id: str
    attempt: int
    response: str
    reward: float | None
    correct: bool | None
    extracted: str | None
    why: str
    stop: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float

    @property
    def grade(self) -> Grade:
        """The verdict."""
        return Grade(reward=self.reward, correct=self.correct, extracted=self.extracted, why=self.why)


class TryLog:
    """The folder's log; a context manager. `tries` and `turns` are all that is known, by their keys."""

    def __init__(self, folder: Path, problems: Iterable[Problem]) -> None:
        """Answers to other problems than these, or to what they were before an edit, do not count."""
        self._digests = {problem.id: problem.digest for problem in problems}
        self.tries: dict[tuple[str, int], Try] = {}
        self.turns: dict[tuple[str, int, int], Said] = {}
        self._folder = folder
        self._handles: dict[str, int] = {}
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        """Open for appending. Raises RunFolderError for a folder that cannot be written."""
        for name in (TRIES, TURNS):
            append_jsonl(self._folder / name, [])  # cuts off what a kill has torn
            self._handles[name] = os.open(self._folder / name, os.O_WRONLY | os.O_APPEND)
        for row in self._rows(TRIES):
            self.tries[row["id"], row["attempt"]] = Try(**row)
        for row in self._rows(TURNS):
            self.turns[row["id"], row["attempt"], row["turn"]] = Said(**row)
        return self

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        for row in read_jsonl(self._folder / name):
            if row.pop("problem") == self._digests.get(row["id"]):
                yield row

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Make everything survive a power cut too."""
        for handle in self._handles.values():
            os.fsync(handle)
            os.close(handle)

    def add_try(self, made: Try) -> None:
        """Remember a finished try."""
        self.tries[made.id, made.attempt] = made
        self._append(TRIES, made)

    def add_turn(self, said: Said) -> None:
        """Remember the answer to one of several requests."""
        self.turns[said.id, said.attempt, said.turn] = said
        self._append(TURNS, said)

    def _append(self, name: str, row: Try | Said) -> None:
        facts = asdict(row) | {"problem": self._digests[row.id]}
        line = (dumps(facts, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        try:
            if os.write(self._handles[name], line) < len(line):
                raise OSError("the disk is full")
            if time.monotonic() - self._synced > _SYNC_S:
                os.fsync(self._handles[name])
                self._synced = time.monotonic()
        except OSError as error:
            raise RunFolderError(
                f"cannot write an answer: {error.strerror or error}",
                where=str(self._folder / name),
                fix="make room; the same command goes on from here",
            ) from error


def has_rows(paths: Iterable[Path]) -> bool:
    """Whether any of these JSONL files, which need not exist, holds a whole row."""
    return any(path.is_file() and bool(read_jsonl(path)) for path in paths)


def claim(folder: Path, settings: Mapping[str, object]) -> None:
    """Write what decides an answer into a new folder, or check that an old one has the same.

    Raises RunFolderError for answers given under other settings: they never share a folder. A start that
    got no answer (a mistyped model, a wrong port) leaves nothing to protect.
    """
    path = folder / SETTINGS
    old = read_json(path) if path.exists() else {}
    changed = [f"{k} was {old.get(k)!r}, is {v!r}" for k, v in settings.items() if old.get(k) != v]
    if not path.exists() or (changed and not has_rows(folder / name for name in ANSWERS)):
        write_json(path, settings)
    elif changed:
        raise RunFolderError(
            f"the folder holds answers given under other settings: {'; '.join(changed)}",
            where=str(folder),
            fix="choose another --out, or another name for the model, or remove the folder",
        )
