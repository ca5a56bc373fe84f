"""The samples of one run on disk: a JSONL file, appended to on arrival, so that no request is made twice.

If the process is killed, at most the last line is torn, and it is cut off when the file is opened again.
Answers to other questions, or under other settings, are detected and not reused.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from rlcs.errors import DataError, RunFolderError, UserError
from rlcs.records import MERGED, Grade, Request, Sample, SampleKey, from_row, to_row
from rlcs.storage import JsonlAppender, read_json, read_jsonl, write_json, write_jsonl

SETTINGS = "settings.json"
"""The file beside the log with the settings that its answers depend on."""
_SYNC_S = 1.0  # a power cut loses at most the samples of this time; a kill loses none
_GRADE = frozenset(each.name for each in fields(Grade))


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of the log: a sample, and the columns `added` to it (such as its grade)."""

    sample: Sample = field(metadata=MERGED)
    added: Mapping[str, Any] = field(default_factory=dict, hash=False, metadata=MERGED)

    @property
    def response(self) -> str:
        """The text that is graded: composed of several turns (column `composed`), or the sample's."""
        return str(self.added.get("composed", self.sample.text))

    @property
    def grade(self) -> Grade:
        """The grade in the added columns; unscored if there is none."""
        columns = {name: value for name, value in self.added.items() if name in _GRADE}
        return Grade(**{"reward": None, "correct": None} | columns)


class SampleLog:
    """A file of samples; a context manager. `entries` are those of the current problems, by sample key."""

    def __init__(
        self,
        path: Path,
        digests: Mapping[str, str] | None,
        *,
        settings: Mapping[str, object] | None = None,
        may_change: bool = False,
    ) -> None:
        """Take the digests of the current problems, by id, and the settings that answers depend on.

        An answer to a problem that was edited since is an error; with `may_change` it is ignored. Without
        digests an id stands for the whole content of its request, and all samples are current.
        """
        self.entries: dict[SampleKey, Entry] = {}
        self._path, self._digests = path, None if digests is None else dict(digests)
        self._settings, self._may_change = settings, may_change

    def __enter__(self) -> Self:
        """Read the file if it exists, and open it for appending.

        Raises RunFolderError for a file that cannot be written or holds answers under other settings,
        UserError for an answer to a problem that was edited since, DataError for a line without a sample.
        """
        if self._settings is not None:
            check_settings(self._path, self._settings)
        rows = read_jsonl(self._path) if self._path.exists() else []
        if len(unique := _without_repetitions(rows)) < len(rows):
            write_jsonl(self._path, unique)
        for number, row in enumerate(unique, start=1):
            digest = self._digest(row.get("id", ""))
            if digest is not None and row.get("digest") != digest and not self._may_change:
                raise UserError(
                    f"the data changed: the answer to {row['id']!r} is to another question",
                    where=str(self._path),
                    fix="restore the data, or choose another --out, or remove this file to ask anew",
                )
            if digest is not None and row.pop("digest", None) == digest:
                try:
                    entry = from_row(Entry, row)
                except ValueError as error:
                    raise DataError(
                        f"sample {number} cannot be read: {error}",
                        where=str(self._path),
                        fix="remove its line: the question is asked again",
                    ) from error
                self.entries[entry.sample.key] = entry
        self._file = JsonlAppender(self._path, sync_s=_SYNC_S)
        return self

    def __exit__(self, *error: object) -> None:
        """Flush to disk and close."""
        self._file.__exit__(*error)

    def _digest(self, name: str) -> str | None:
        return name if self._digests is None else self._digests.get(name)

    def unanswered(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The requests without a sample in the log, drawn lazily."""
        return (request for request in requests if request.key not in self.entries)

    def add(self, sample: Sample, added: Mapping[str, Any] | None = None) -> Entry:
        """Append a sample with the `added` columns, unless it failed with a retryable error.

        Raises RunFolderError when the disk is full; complete lines stay readable.
        """
        entry = Entry(sample=sample, added=added or {})
        if sample.retryable:
            return entry
        self._file.append([to_row(entry) | {"digest": self._digest(sample.id)}])
        self.entries[sample.key] = entry
        return entry


def _without_repetitions(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row for each question: others are of two processes at once, or were of no use."""
    keys = ((row.get("digest"), row.get("id"), row.get("index"), row.get("turn")) for row in rows)
    return list(dict(zip(map(repr, keys), rows, strict=True)).values())


def annotate(path: Path, added: Mapping[SampleKey, Mapping[str, Any]]) -> None:
    """Add columns to lines of a closed log, by sample key; its other lines are unchanged."""
    rows = [{**row, **added.get((row["id"], row["index"], row["turn"]), {})} for row in read_jsonl(path)]
    write_jsonl(path, rows)


def check_settings(path: Path, settings: Mapping[str, object]) -> None:
    """Write the settings that answers depend on beside a new log, or compare them with those of an old one.

    Raises RunFolderError for answers under other settings: they never share a folder. A log without answers
    (after a mistyped model or a wrong port) takes the new settings.
    """
    file = path.with_name(SETTINGS)
    old = read_json(file) if file.exists() else {}
    changed = [f"{k} was {old.get(k)!r}, is {v!r}" for k, v in settings.items() if old.get(k) != v]
    has_answers = path.is_file() and bool(read_jsonl(path))
    if not file.exists() or (changed and not has_answers):
        write_json(file, settings)
    elif changed:
        raise RunFolderError(
            f"the folder holds answers given under other settings: {'; '.join(changed)}",
            where=str(path.parent),
            fix="choose another --out, or another name for the model, or remove the folder",
        )
