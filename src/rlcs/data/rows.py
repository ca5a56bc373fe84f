"""Converts raw rows to problems and demonstrations, or to a reason why a row cannot be used.

No content of a row raises an error: a faulty row becomes a `BadRow`, which names it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlcs.data.files import RawRow
from rlcs.data.layouts import LAYOUTS, Converted, Layout, may_be_read, possible, recognise
from rlcs.data.row_images import RowImages, image_items, looks_like_image
from rlcs.data.row_notes import RowNotes
from rlcs.data.sources import Role, Table, suggest
from rlcs.data.values import (
    checked_text,
    choices_of,
    first_filled,
    gold_text,
    is_filled,
    shown,
    undamaged,
)
from rlcs.errors import DataError
from rlcs.grading.answers import compare
from rlcs.grading.extraction import extract
from rlcs.grading.golds import unwrap
from rlcs.grading.inspection import gold_fault
from rlcs.recipe.schema import Data
from rlcs.records import IMAGE_SLOT, ImageRef, Json, Problem, Turn

_METADATA_TEXT = 200
"""Characters; longer texts in further columns are left out of the metadata."""
_WORKED_WORDS = 6
"""An answer with at least so many words around its box is a worked solution."""
_MAX_REASON = 400
"""Characters of a reason, so that no message shows the content of a file."""
_MAX_ID = 200
_MAX_PATH = 150
"""Characters of a path that a reason shows, its last ones."""
_QWEN_SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
"""How Qwen's own chat template marks the place of an image."""
_OTHER_MEDIA = ("videos", "audios")
_NOT_CONVERTED = Converted(values={})
"""What is read from a row in our own columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that cannot be used; `where` is `FILE:line`, or `SOURCE#row` counted from 0.

    `subject` is the part of the reason that names the thing at fault, such as an image's path. `file` is the
    image that could not be used, where that is a file: once it is put right, the row can be.
    """

    where: str
    reason: str
    id: str = ""
    subject: str = ""
    file: str = field(default="", compare=False, repr=False)

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
    """Reads the rows of one table; detects duplicate ids, and holds each image once.

    `notes` counts what a user should know: the layout, columns that differ, columns that are not read.
    `ids` are those of the rows so far, and where these are; `images` opens theirs. `looks_back`: a row may
    show the image of another row before it, so that it cannot be read without that.
    """

    def __init__(
        self,
        table: Table,
        settings: Data,
        *,
        role: Role,
        limit: int,
        decode: bool,
        store: Path | None = None,
    ) -> None:
        """Take a table; `limit`, `decode` and `store` are those of its `RowImages`.

        Raises DataError when the table is known to lack a column that every row needs.
        """
        self.forget()
        self._table = table
        self._as_given = settings.answers == "as_given"
        self._system = settings.system
        self._role = role
        self.images = RowImages(
            folders=table.folders, roots=table.roots, limit=limit, decode=decode, store=store
        )
        columns = settings.columns
        self._id_column = columns.id
        self._columns: dict[str, tuple[str, ...]] = columns.model_dump(exclude={"id"})
        self._mapped = {columns.id, *(name for group in self._columns.values() for name in group)}
        self._plans: dict[_Names, _Plan] = {}
        if table.columns is not None and not may_be_read(table.columns):
            self._require_columns(table.columns)

    def forget(self) -> None:
        """Go on as if no row had been read; images stay known."""
        self.notes = RowNotes()
        self.ids: dict[str, str] = {}
        self.looks_back = False
        self._pictures: dict[str, tuple[ImageRef, ...]] = {}

    def _require_columns(self, present: tuple[str, ...]) -> None:
        fields = dict.fromkeys(present)
        responded = self._role == "cold_start" and first_filled(fields, self._columns["response"]) is not None
        for group in ("question",) if self._role == "ask" or responded else ("question", "answer"):
            names = self._columns[group]
            if first_filled(fields, names) is None:
                raise DataError(
                    f"no {group} column: none of {', '.join(names)}",
                    where=self._table.source,
                    fix=f"set data.columns.{group}=[NAME]; {suggest(names[0], present)}",
                )

    def read(self, raw: RawRow) -> Row | BadRow:
        """Convert a row, or return why it cannot be used."""
        name, reason, subject = "", raw.reason, ""
        self.images.failed = ""
        try:
            if not reason:
                row = _Cells(raw.fields, self._columns, self._plans)
                name = self._id(raw, row)
                return self._row(raw, row, name)
        except DataError as error:
            subject = error.where if len(error.where) <= _MAX_PATH else f"...{error.where[-_MAX_PATH:]}"
            parts = [part for part in (subject, error.what) if part]
            reason = ": ".join(parts) + (f" ({error.fix})" if error.fix else "")
        except ValueError as error:
            reason = str(error)
        reason = "".join(
            char if char.isprintable() else ascii(char)[1:-1] for char in reason[: 2 * _MAX_REASON]
        )
        if len(reason) > _MAX_REASON:
            reason = f"{reason[:_MAX_REASON]}..."
        return BadRow(where=raw.where, reason=reason, id=name, subject=subject, file=self.images.failed)

    def _id(self, raw: RawRow, row: "_Cells") -> str:
        """The row's id, by default its number. Raises ValueError if it is empty, odd or a duplicate."""
        named = self._id_column in raw.fields
        value = raw.fields[self._id_column] if named else row.own_id(raw.number)
        if type(value) is int or (isinstance(value, float) and value.is_integer()):
            value = str(int(value))
        if not is_filled(value):
            raise ValueError("the id is empty")
        if not isinstance(value, str) or not value.isprintable():
            raise ValueError(f"the id must be a printable text or a whole number, not {shown(value)}")
        if len(value) > _MAX_ID:
            raise ValueError(f"the id has {len(value):,} characters, more than {_MAX_ID}")
        if value in self.ids and row.layout:  # LLaVA names several rows after one image
            self.notes.repeated_id(raw.where)
            value = f"{value}#{raw.number}"
        if value in self.ids:
            raise ValueError(f"duplicate id {value!r}, first at {self.ids[value]}")
        self.ids[value] = raw.where
        return value

    def _row(self, raw: RawRow, row: "_Cells", name: str) -> Row:
        self.looks_back = self.looks_back or bool(row.layout and row.layout.id)
        question, present = row.get("question")
        if not present:
            names = self._columns["question"]
            raise ValueError(f"no question: none of {', '.join(names)} ({suggest(names[0], raw.fields)})")
        if question is None:
            raise ValueError("the question is empty")
        for media in _OTHER_MEDIA:
            if media in row.filled:
                raise ValueError(f"the row has {media}: only texts and images can be used")
        given, response, own_gold = self._answer_and_response(row)
        choices = choices_of(row.get("choices")[0])
        needed = response is None and self._role != "ask"
        answer, mark = (given, "") if self._as_given else _unwrapped(given, choices, needed=needed)
        images = self._pictures.get(row.image_of_row) or ()
        if not images and (own := row.images()):
            images = self.images.read(own)
        if row.layout and row.layout.id:
            self._pictures[name] = images
        question, history = _with_slots(checked_text(question, "question"), row, images)
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
            question=question,
            answer=answer,
            images=images,
            choices=choices,
            metadata=self._metadata(row),
            history=history,
        )
        self._note(raw, row, problem)
        return Row(
            problem=problem,
            response=response,
            given=given if mark else "",
            mark=mark,
            where=raw.where,
            gradable=own_gold and not self._as_given,
            own_system=own_system,
        )

    def _answer_and_response(self, row: "_Cells") -> tuple[str, str | None, bool]:
        """The gold answer, the response, and whether the gold answer stands apart from the response."""
        gold, has_gold = row.get("answer")
        if self._role == "ask":
            return (gold_text(gold) if is_filled(gold) else ""), None, True
        response, _ = row.get("response")
        if response is not None and not checked_text(response, "response").strip():
            raise ValueError("the response is empty")
        if response is not None and self._role == "cold_start":
            same = row.column("answer") is not None and row.column("answer") == row.column("response")
            text = "" if same or not is_filled(gold) else gold_text(gold)
            return text or extract(response).text or "", response, bool(text.strip())
        if row.layout and response is not None and not is_filled(gold):
            return response, None, True  # the last turn of a conversation without a column for the answer
        if not has_gold:
            raise ValueError(f"no answer: none of {', '.join(self._columns['answer'])}")
        if not is_filled(gold):
            raise ValueError("the answer is empty")
        answer = gold_text(gold)
        if self._role == "cold_start" and (worked := demonstrated(answer)) is not None:
            return worked, answer, False
        return answer, None, True

    def _metadata(self, row: "_Cells") -> dict[str, Json]:
        """Short plain values of the further columns, such as category and level."""
        read = self._mapped | row.layout_columns if row.layout else self._mapped
        return {
            checked_text(key, "name of a column"): value
            for key, value in row.fields.items()
            if key not in read
            and (
                isinstance(value, bool | int)
                or (isinstance(value, float) and math.isfinite(value))
                or (
                    isinstance(value, str)
                    and len(value) <= _METADATA_TEXT
                    and checked_text(value, key) is value
                )
            )
        }

    def _note(self, raw: RawRow, row: "_Cells", problem: Problem) -> None:
        if row.layout and row.layout.name:
            self.notes.layout(row.layout.name)
        for kept, other in row.differing():
            self.notes.differing(kept, other, raw.where)
        if not problem.images:
            known = self._mapped | row.layout_columns if row.layout else self._mapped
            for name, value in raw.fields.items():
                if name not in known and looks_like_image(value):
                    self.notes.unread_image(str(name), raw.where)


_Names = tuple[tuple[str, ...], tuple[str, ...]]
"""The columns of a row, and those with a value."""
_MAX_PLANS = 1_000
"""Plans that are kept; a table of more kinds of rows has no columns to speak of."""


class _Plan:
    """What follows from the columns of a row and from which of them have a value: alike for most rows."""

    def __init__(self, names: _Names, columns: Mapping[str, tuple[str, ...]]) -> None:
        """`columns` are the names of our own for each group."""
        present, filled = names
        self.column: dict[str, str | None] = {}
        """For each group the column that counts: the first with a value, or else the first that is there."""
        for group, known in columns.items():
            own = [name for name in known if name in filled] or [name for name in known if name in present]
            self.column[group] = own[0] if own else None
        self.layouts = possible(filled)
        self.has_question = any(name in filled for name in columns["question"])
        self.has_rivals = any(sum(name in filled for name in known) > 1 for known in columns.values())
        """Whether several columns of a group have a value."""


class _Cells:
    """The values of one row by the groups of our columns: those of our own columns, then of its layout."""

    def __init__(
        self,
        fields: Mapping[str, Any],
        columns: Mapping[str, tuple[str, ...]],
        plans: dict[_Names, _Plan],
    ) -> None:
        """Take the columns of a row, the names of our own for each group, and the plans that are known."""
        self.fields = fields
        self._columns = columns
        self.filled = {name: value for name, value in fields.items() if is_filled(value)}
        names = tuple(fields), tuple(self.filled)
        plan = plans.get(names)
        if plan is None:
            if len(plans) >= _MAX_PLANS:
                plans.clear()
            plan = plans[names] = _Plan(names, columns)
        self._plan = plan
        self.layout: Layout | None = None
        if plan.layouts:
            self.layout = recognise(self.filled, has_question=plan.has_question, among=plan.layouts)
        self._converted = None if self.layout else _NOT_CONVERTED

    @property
    def converted(self) -> Converted:
        """What the layout reads. Raises ValueError when it cannot be read."""
        if self._converted is None:
            self._converted = self.layout.read(self.fields) if self.layout else _NOT_CONVERTED
        return self._converted

    def own_id(self, number: int) -> Any:
        """The id that the layout has in a column of its own, or else the row number."""
        value = self.fields.get(self.layout.id) if self.layout else None
        return value if is_filled(value) else number

    @property
    def layout_columns(self) -> set[str]:
        """The columns that the layout of the row reads."""
        return {*self.layout.needs, *self.layout.also} if self.layout else set()

    def column(self, group: str) -> str | None:
        """The column of ours that counts: the first with a value, or else the first that is there."""
        return self._plan.column[group]

    def get(self, group: str) -> tuple[Any, bool]:
        """The value of a group, and whether there is one at all (it may be empty)."""
        column = self.column(group)
        value = None if column is None else self.fields[column]
        if self.layout and column not in self.filled and is_filled(self.converted.values.get(group)):
            return self.converted.values[group], True
        return value, column is not None

    def images(self) -> list[object]:
        """The images of the row: those in its messages, and for the others those of its image column."""
        if not self.layout and self.column("images") is None:
            return []
        own = image_items(self.get("images")[0])
        inline = self.converted.images
        if not inline:
            return own
        places = sum(image is None for image in inline)
        if places and places != len(own):
            raise ValueError(
                f"the messages have {places} places for images, but the row has {len(own)} images"
            )
        left = iter(own)
        return [next(left) if image is None else image for image in inline]

    @property
    def image_of_row(self) -> str:
        """The id of an earlier row whose image this row shows; VLMEvalKit writes it instead of the image."""
        value = self.get("images")[0] if self.layout and self.layout.id else None
        return str(value) if isinstance(value, str | int) else ""

    def history(self) -> tuple[Turn, ...]:
        """The turns before the question; without those of a conversation that asks another question."""
        question = self.converted.values.get("question")
        return self.converted.history if question in (None, self.get("question")[0]) else ()

    def differing(self) -> list[tuple[str, str]]:
        """Columns that hold another value than the one that counts, each with that one."""
        if not self.layout and not self._plan.has_rivals:
            return []
        found = []
        for group, names in self._columns.items():
            values = {name: self.filled[name] for name in names if name in self.filled}
            converted = self.converted.values.get(group)
            if group == "images" and None not in self.converted.images:
                converted = self.converted.images
            if values and self.layout and is_filled(converted):
                own = {self.layout.needs[0]: converted}
                values = own | values if group == "images" else values | own  # as in `images` and `get`
            if len(values) > 1:
                kept, *others = {name: _comparable(group, value) for name, value in values.items()}.items()
                found += [(kept[0], name) for name, other in others if _differ(group, kept[1], other)]
        return found + self._other_conversations()

    def _other_conversations(self) -> list[tuple[str, str]]:
        """Columns with another conversation than the one that counts, each with that one."""
        if self.layout is None or not self.converted.values:
            return []
        found = []
        for other in LAYOUTS:
            is_other = other.needs[0] not in self.layout_columns  # such as the history of an Alpaca row
            if is_other and other.lists and other.fits(self.filled, has_question=True):
                try:
                    values = other.read(self.fields).values
                except ValueError:
                    values = {}
                if values != self.converted.values:
                    found.append((self.layout.needs[0], other.needs[0]))
        return found


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


def _comparable(group: str, value: Any) -> Any:
    """A value in the form in which two columns of a group are compared; None: it cannot be compared."""
    try:
        if group == "answer":
            return unwrap(gold_text(value)).text
        if group == "images":
            return list(value) if isinstance(value, tuple) else image_items(value)
        return choices_of(value) if group == "choices" else value
    except ValueError:
        return None


def _differ(group: str, kept: Any, other: Any) -> bool:
    if kept is None or other is None or kept == other:
        return False
    if group == "answer":
        return compare(other, kept).correct is False
    return not (group == "images" and all(item in kept for item in other))


def _with_slots(question: str, row: _Cells, images: tuple[ImageRef, ...]) -> tuple[str, tuple[Turn, ...]]:
    """The question and the history, where Qwen's marks for images are slots if the row has images."""
    if row.converted.hint:
        question = f"{row.converted.hint}\n{question}"
    history = row.history()
    if not images:
        return question, history
    texts = [*(turn.text for turn in history), question]
    if any(IMAGE_SLOT in text for text in texts):
        return question, history
    *earlier, question = [text.replace(_QWEN_SLOT, IMAGE_SLOT) for text in texts]
    return question, tuple(
        Turn(role=turn.role, text=text) for turn, text in zip(history, earlier, strict=True)
    )


def _unwrapped(gold: str, choices: tuple[str, ...], *, needed: bool) -> tuple[str, str]:
    """The plain gold answer, and the mark around it. Raises ValueError if nothing can match a needed one."""
    if needed and (fault := gold_fault(undamaged(gold), choices)):
        raise ValueError(fault)
    found = unwrap(gold)
    return (gold, "") if found.text is None else (found.text, found.why)
