"""Converts raw rows to problems and demonstrations, or to a reason why a row cannot be used.

No content of a row raises an error: a faulty row becomes a `BadRow`, which names it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from rlcs.data.images import image_from_bytes, image_from_path, open_image
from rlcs.data.sources import RawRow, Role, Table, suggest
from rlcs.errors import DataError
from rlcs.grading.extraction import extract
from rlcs.grading.golds import unwrap
from rlcs.grading.inspection import gold_fault
from rlcs.recipe.schema import Data
from rlcs.records import IMAGE_SLOT, ImageRef, Json, Problem, Turn, from_row

_METADATA_TEXT = 200
"""Characters; longer texts in further columns are left out of the metadata."""
_WORKED_WORDS = 6
"""An answer with at least so many words around its box is a worked solution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that cannot be used; `where` is `FILE:line`, or `SOURCE#row` counted from 0.

    `subject` is the part of the reason that names the thing at fault, such as an image's path.
    """

    where: str
    reason: str
    id: str = ""
    subject: str = ""

    def __str__(self) -> str:
        """One line for messages."""
        return f"{self.where}{f' (id {self.id})' if self.id else ''}: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A usable row; one with a `response` is a demonstration.

    `given` is the gold answer as the row has it, if it was unwrapped, and `mark` what it was unwrapped from.
    `where` is as in `BadRow`. A response is `gradable` if the rule can compare it with the gold answer: not
    where that was taken out of the response itself, or is left as given.
    `own_system`: the row had a system prompt, which is in `problem.history` unless `data.system` is `recipe`.
    """

    problem: Problem
    response: str | None
    given: str = ""
    mark: str = ""
    where: str = ""
    gradable: bool = True
    own_system: bool = False

    def refused(self, reason: str) -> BadRow:
        """This row as one that cannot be used."""
        return BadRow(where=self.where or self.problem.source, id=self.problem.id, reason=reason)


class RowReader:
    """Reads the rows of one table; detects duplicate ids, and holds each image once."""

    def __init__(self, table: Table, settings: Data, *, role: Role, limit: int, decode: bool) -> None:
        """Take a table; `limit` is in pixels an image, with `decode` every image is decoded in full.

        Raises DataError when the table is known to lack a column that every row needs.
        """
        self._table = table
        self._columns = settings.columns
        self._as_given = settings.answers == "as_given"
        self._system = settings.system
        self._role = role
        self._limit = limit
        self._decode = decode
        self._ids: dict[str, str] = {}
        self._paths: dict[str, ImageRef] = {}
        self._bytes: dict[str, ImageRef] = {}
        columns = settings.columns
        names = (columns.question, columns.images, columns.answer, columns.response, columns.choices)
        self._mapped = {columns.id, *(name for group in names for name in group)}
        if table.columns is not None:
            self._require_columns(table.columns)

    def _require_columns(self, present: tuple[str, ...]) -> None:
        fields = dict.fromkeys(present)
        needed = {"question": self._columns.question}
        responded = self._role == "cold_start" and _first(fields, self._columns.response) is not None
        if self._role != "ask" and not responded:
            needed["answer"] = self._columns.answer
        for key, names in needed.items():
            if _first(fields, names) is None:
                raise DataError(
                    f"no {key} column: none of {', '.join(names)}",
                    where=self._table.source,
                    fix=f"set data.columns.{key}=[NAME]; {suggest(names[0], present)}",
                )

    def read(self, raw: RawRow) -> Row | BadRow:
        """Convert a row, or return why it cannot be used."""
        if raw.reason:
            return BadRow(where=raw.where, reason=raw.reason)
        name = ""
        try:
            name = self._id(raw)
            return self._row(raw, name)
        except DataError as error:
            parts = [part for part in (error.where, error.what) if part]
            reason = ": ".join(parts) + (f" ({error.fix})" if error.fix else "")
            return BadRow(where=raw.where, reason=reason, id=name, subject=error.where)
        except ValueError as error:
            return BadRow(where=raw.where, reason=str(error), id=name)

    def _id(self, raw: RawRow) -> str:
        """The row's id, by default its number. Raises ValueError if it is empty, odd or a duplicate."""
        value = raw.fields.get(self._columns.id, raw.number)
        if type(value) is int:
            value = str(value)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise ValueError("the id is empty")
        if not isinstance(value, str) or not value.isprintable():
            raise ValueError(f"the id must be a printable text or a whole number, not {_shown(value)}")
        if value in self._ids:
            raise ValueError(f"duplicate id {value!r}, first at {self._ids[value]}")
        self._ids[value] = raw.where
        return value

    def _row(self, raw: RawRow, name: str) -> Row:
        fields, columns = raw.fields, self._columns
        column = _first(fields, columns.question)
        if column is None:
            known = suggest(columns.question[0], fields)
            raise ValueError(f"no question: none of {', '.join(columns.question)} ({known})")
        given, response, own_gold = self._answer_and_response(fields)
        choices = _choices(fields.get(_first(fields, columns.choices) or ""))
        needed = response is None and self._role != "ask"
        answer, mark = (given, "") if self._as_given else _unwrapped(given, choices, needed=needed)
        history = _history(fields.get("history"))
        own_system = bool(history) and history[0].role == "system"
        if own_system and self._system == "recipe":
            if IMAGE_SLOT in history[0].text:
                raise ValueError(
                    "the row's system prompt shows an image, which data.system=recipe would lose"
                )
            history = history[1:]
        problem = Problem(
            id=name,
            source=self._table.source,
            question=_text(fields[column], "question"),
            answer=answer,
            images=self._images(raw),
            choices=choices,
            metadata=self._metadata(fields),
            history=history,
        )
        given = given if mark else ""
        gradable = own_gold and not self._as_given
        return Row(
            problem=problem, response=response, given=given, mark=mark, own_system=own_system,
            where=raw.where, gradable=gradable,
        )  # fmt: skip

    def _answer_and_response(self, fields: Mapping[str, Any]) -> tuple[str, str | None, bool]:
        """The gold answer, the response, and whether the gold answer stands apart from the response."""
        answer_column = _first(fields, self._columns.answer)
        if self._role == "ask":
            gold = fields.get(answer_column or "")
            return ("" if gold is None else gold_text(gold)), None, True
        response_column = _first(fields, self._columns.response)
        response = None if response_column is None else fields[response_column]
        if response is not None and not _text(response, "response").strip():
            raise ValueError("the response is empty")
        if response is not None and self._role == "cold_start":
            gold = None if answer_column in (None, response_column) else fields.get(answer_column or "")
            text = "" if gold is None else gold_text(gold)
            return text or extract(response).text or "", response, bool(text.strip())
        if answer_column is None:
            raise ValueError(f"no answer: none of {', '.join(self._columns.answer)}")
        answer = gold_text(fields[answer_column])
        if not answer.strip():
            raise ValueError("the answer is empty")
        if self._role == "cold_start" and (worked := demonstrated(answer)) is not None:
            return worked, answer, False
        return answer, response, True

    def _images(self, raw: RawRow) -> tuple[ImageRef, ...]:
        column = _first(raw.fields, self._columns.images)
        value = raw.fields[column] if column else None
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        return tuple(self._image(item, f"image {i}") for i, item in enumerate(items))

    def _image(self, item: object, where: str) -> ImageRef:
        """Open an image: a path, bytes, or a mapping with one of them. Raises DataError or ValueError."""
        if isinstance(item, Mapping):
            item = item.get("path") if item.get("bytes") is None else item["bytes"]
        if isinstance(item, bytes):
            key = hashlib.sha256(item).hexdigest()
            if key not in self._bytes:
                self._bytes[key] = self._checked(image_from_bytes(item, limit=self._limit, where=where))
            return self._bytes[key]
        if not isinstance(item, str):
            raise ValueError(f"an image must be a path or embedded bytes, not {_shown(item)}")
        if item not in self._paths:
            ref = image_from_path(item, root=self._root(item), limit=self._limit)
            self._paths[item] = self._checked(ref)
        return self._paths[item]

    def _checked(self, ref: ImageRef) -> ImageRef:
        if self._decode:
            open_image(ref, limit=self._limit)
        return ref

    def _root(self, path: str) -> Path:
        """The folder in which the image of this path must lie."""
        if not path.startswith("/"):
            if self._table.folder is None:
                raise DataError("a relative image path in a hub data set", where=path)
            return self._table.folder
        roots = self._table.roots
        if not roots:
            fix = "make it relative to the data file, or set data.image_root"
            raise DataError("absolute image path", where=path, fix=fix)
        real = Path(path).resolve()
        inside = (root for root in roots if real.is_relative_to(root.resolve()))
        return next(inside, roots[-1])

    def _metadata(self, fields: Mapping[str, Any]) -> dict[str, Json]:
        """Short plain values of the further columns, such as category and level."""
        return {
            str(key): value
            for key, value in fields.items()
            if key not in self._mapped
            and (
                isinstance(value, bool | int)
                or (isinstance(value, float) and math.isfinite(value))
                or (isinstance(value, str) and len(value) <= _METADATA_TEXT)
            )
        }


def demonstrated(answer: str) -> str | None:
    r"""The gold answer inside a worked solution, or None if `answer` is only an answer.

    Data sets for cold start (WaltonFuture/Multimodal-Cold-Start among them) have the response in
    their `answer` column. A text with a complete `\boxed{}` and six or more words around it counts
    as a response; with `data.columns.response=[answer]` every text does.
    """
    boxed = extract(answer).text
    if boxed is None:
        return None
    around = len(answer.split()) - len(boxed.split())
    return boxed if around >= _WORKED_WORDS else None


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of `names` that is among the columns."""
    return next((name for name in names if name in fields), None)


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"


def _text(value: object, what: str) -> str:
    """Check that a value is a text that UTF-8 can encode. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"the {what} must be a text, not {_shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the {what} has half a character (a lone surrogate) at {error.start}") from error
    return value


def _answer(value: object) -> str:
    """Convert an answer to text; numbers are written plainly (3.0 as 3). Raises ValueError."""
    if isinstance(value, bool):
        raise ValueError(f"the answer must be a text or a number, not {_shown(value)}")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        plain = format(Decimal(str(value)), "f")
        return plain.rstrip("0").rstrip(".") if "." in plain else plain
    if isinstance(value, str):
        return _text(value, "answer")
    raise ValueError(f"the answer must be a text or a number, not {_shown(value)}")


def gold_text(value: object) -> str:
    """Convert a gold answer to text; a list is written as JSON, which `unwrap` reads. Raises ValueError."""
    if isinstance(value, list) and value:
        return json.dumps([_answer(item) for item in value], ensure_ascii=False)
    return _answer(value)


def _unwrapped(gold: str, choices: tuple[str, ...], *, needed: bool) -> tuple[str, str]:
    """The plain gold answer, and the mark around it. Raises ValueError if nothing can match a needed one."""
    if needed and (fault := gold_fault(gold, choices)):
        raise ValueError(fault)
    found = unwrap(gold)
    return (gold, "") if found.text is None else (found.text, found.why)


def _history(value: object) -> tuple[Turn, ...]:
    """The turns before the question: a list of {role, text}, as `kept.jsonl` and exports have it."""
    if not isinstance(value, list):
        return ()  # another column of this name
    try:
        return tuple(from_row(Turn, turn) for turn in value)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"the history must be a list of {{role, text}}: {error}") from error


def _choices(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"the choices must be a list of texts, not {_shown(value)}")
    return tuple(_answer(choice) for choice in value)
