"""The samples of one run on disk: one JSONL file, appended to as they come, so that nothing is asked twice.

Whatever moment a kill picks, at most the last line is torn, and that one is cut off when the file is opened
again. Answers to other questions, or given under other settings, are never taken for these.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from rlcs.errors import DataError, RunFolderError, UserError
from rlcs.records import MERGED, Grade, Request, Sample, SampleKey, from_row, to_row
from rlcs.storage import JsonlAppender, read_json, read_jsonl, write_json, write_jsonl

SETTINGS = "settings.json"
"""Beside the log: what decides an answer."""
_SYNC_S = 1.0  # a power cut may cost this much; a kill costs nothing
_GRADE = frozenset(each.name for each in fields(Grade))


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of the log: a sample, and what the policy `added` to it (its grade, say)."""

    sample: Sample = field(metadata=MERGED)
    added: Mapping[str, Any] = field(default_factory=dict, hash=False, metadata=MERGED)

    @property
    def response(self) -> str:
        """The text that is graded: what the policy composed of several turns, or the sample's own."""
        return str(self.added.get("composed", self.sample.text))

    @property
    def grade(self) -> Grade:
        """The grade that the policy added; unscored where it added none."""
        known = {name: value for name, value in self.added.items() if name in _GRADE}
        return Grade(**{"reward": None, "correct": None} | known)


class SampleLog:
    """One file of samples; a context manager. `entries` are those of the problems in hand, by their keys."""

    def __init__(
        self,
        path: Path,
        digests: Mapping[str, str],
        *,
        settings: Mapping[str, object] | None = None,
        may_change: bool = False,
    ) -> None:
        """`digests` are those of the problems in hand, by id; `settings` is what decides an answer.

        An answer to what a problem was before an edit is an error, or with `may_change` not an answer.
        """
        self.entries: dict[SampleKey, Entry] = {}
        self._path, self._digests = path, dict(digests)
        self._settings, self._may_change = settings, may_change

    def __enter__(self) -> Self:
        """Read what is there and open for appending.

        Raises RunFolderError for a file that cannot be written or holds answers under other settings,
        UserError for an answer to a problem that was edited since, DataError for a line that is no sample.
        """
        if self._settings is not None:
            check_settings(self._path, self._settings)
        for number, row in enumerate(read_jsonl(self._path) if self._path.exists() else (), start=1):
            digest = self._digests.get(row.get("id", ""))
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
        """Make everything survive a power cut too."""
        self._file.__exit__(*error)

    def unanswered(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The requests without a sample here, drawn lazily."""
        return (request for request in requests if request.key not in self.entries)

    def add(self, sample: Sample, added: Mapping[str, Any] | None = None) -> Entry:
        """Append a sample with what the policy adds. A failure that may pass is no answer: it is not kept.

        Raises RunFolderError when the disk is full; what is complete stays readable.
        """
        entry = Entry(sample=sample, added=added or {})
        if sample.retryable:
            return entry
        self._file.append([to_row(entry) | {"digest": self._digests[sample.id]}])
        self.entries[sample.key] = entry
        return entry


def annotate(path: Path, added: Mapping[SampleKey, Mapping[str, Any]]) -> None:
    """Add columns to lines of a finished log, which is closed; its other lines stay as they are."""
    rows = [{**row, **added.get((row["id"], row["index"], row["turn"]), {})} for row in read_jsonl(path)]
    write_jsonl(path, rows)


def check_settings(path: Path, settings: Mapping[str, object]) -> None:
    """Write what decides an answer beside a new log, or check that an old one has the same.

    Raises RunFolderError for answers given under other settings: they never share a folder. A start that
    got no answer (a mistyped model, a wrong port) leaves nothing to protect.
    """
    place = path.with_name(SETTINGS)
    old = read_json(place) if place.exists() else {}
    changed = [f"{k} was {old.get(k)!r}, is {v!r}" for k, v in settings.items() if old.get(k) != v]
    has_answers = path.is_file() and bool(read_jsonl(path))
    if not place.exists() or (changed and not has_answers):
        write_json(place, settings)
    elif changed:
        raise RunFolderError(
            f"the folder holds answers given under other settings: {'; '.join(changed)}",
            where=str(path.parent),
            fix="choose another --out, or another name for the model, or remove the folder",
        )
