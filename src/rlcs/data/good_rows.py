"""Writes the rows of a source that can be used into a new JSONL file."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlcs.data.files import JsonLines
from rlcs.data.problem_store import copy_image
from rlcs.data.rows import Row
from rlcs.errors import UserError
from rlcs.recipe.schema import Columns
from rlcs.records import ImageRef, to_row
from rlcs.storage import at_home, atomic_write, jsonl_lines, parse_object


def require_new_file(path: Path, source: str, *, option: str = "--write") -> None:
    """Raise UserError unless `path` (of a command's `option`) is a new .jsonl file, no part of `source`."""
    where, name = f"{option} {path}", source.partition("?")[0]
    if path.suffix != ".jsonl":
        raise UserError("the file's name must end in .jsonl", where=where, fix=f"{option} {path.stem}.jsonl")
    if path.exists():
        is_source = Path(name).exists() and path.samefile(name)
        what = "this is the source itself" if is_source else "there is such a file already"
        raise UserError(what, where=where, fix="name a new file")
    if Path(name).is_dir() and path.resolve().is_relative_to(Path(name).resolve()):
        raise UserError(
            "the file would become part of the source, which is this folder",
            where=where,
            fix="name a file in another folder",
        )


def copies_lines(source: str, path: Path) -> bool:
    """Whether rows of `source`, which has a line for each, are written to `path` as these lines are."""
    lines = at_home(source)
    return lines.suffix.lower() == ".jsonl" and lines.resolve().parent == path.resolve().parent


def write_lines(source: str, path: Path, numbers: Iterable[int]) -> None:
    """Write the lines of these numbers (from 1) of the JSONL file `source` to another one, atomically.

    Raises RunFolderError.
    """
    wanted, content = set(numbers), bytearray()
    for number, line in JsonLines(at_home(source)).lines():
        if number in wanted:
            content += line.strip() + b"\n"
    atomic_write(path, bytes(content))


def write_rows(
    rows: Sequence[Row],
    source: str,
    path: Path,
    columns: Columns,
    *,
    added: Mapping[str, Mapping[str, Any]] = {},
) -> None:
    """Write rows of `source` to a JSONL file, atomically, each with the values `added` to its id.

    A row of a JSONL file keeps its layout, others get our columns. Images that are not below the new file's
    folder, or not in files, are copied into `images/` beside it. Raises ImageError, RunFolderError.
    """
    writer = _Writer(path.parent, columns)
    lines = _source_lines(rows, source)
    if lines is None:
        texts = [_json_line(writer.own(row)) for row in rows]
    else:
        own_folder = at_home(source).resolve().parent
        texts = [
            line if own_folder == path.resolve().parent else _json_line(writer.moved(row, line))
            for row, line in zip(rows, lines, strict=True)
        ]
    pairs = zip(rows, texts, strict=True)
    texts = [
        _json_line({**parse_object(text), **values}) if (values := added.get(row.problem.id)) else text
        for row, text in pairs
    ]
    atomic_write(path, b"\n".join(texts) + b"\n")


def _source_lines(rows: Sequence[Row], source: str) -> list[bytes] | None:
    """The lines of a JSONL file from which the rows were read; None if they are from no such file."""
    path = at_home(source)
    numbers = [re.fullmatch(rf"{re.escape(str(path))}:(\d+)", row.where) for row in rows]
    if path.suffix.lower() != ".jsonl" or not all(numbers):
        return None
    wanted = {int(number[1]) for number in numbers if number}
    lines = {number: line.strip() for number, line in jsonl_lines(path) if number in wanted}
    return [lines[int(number[1])] for number in numbers if number]


def _json_line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")


_MAX_PATH = 1024


class _Writer:
    """Writes rows for a file in one folder."""

    def __init__(self, folder: Path, columns: Columns) -> None:
        self._folder, self._columns = folder, columns
        self._root = folder.resolve()

    def _path(self, ref: ImageRef) -> str:
        """The path of an image from the folder; one that does not lie below is copied."""
        if ref.path is not None and Path(ref.path).is_relative_to(self._root):
            return Path(ref.path).relative_to(self._root).as_posix()
        return str(copy_image(ref, self._folder).path)

    def moved(self, row: Row, line: bytes) -> dict[str, Any]:
        """The row as its source has it, with new relative paths of its images; or else in our own columns."""
        files = {str(ref.path): ref for ref in row.problem.images if ref.path is not None}
        left = set(files)

        def renamed(value: Any) -> Any:
            if isinstance(value, list):
                return [renamed(item) for item in value]
            if isinstance(value, dict):
                return {key: renamed(item) for key, item in value.items()}
            if not isinstance(value, str) or len(value) > _MAX_PATH:
                return value
            tail = f"/{os.path.normpath(value).removeprefix('/')}"
            path = next((path for path in files if path.endswith(tail)), None)
            left.discard(path or "")
            return value if path is None or value.startswith("/") else self._path(files[path])

        columns = self._columns
        texts = {columns.id, *columns.question, *columns.answer, *columns.response, *columns.choices}
        fields = parse_object(line)
        made = {key: value if key in texts else renamed(value) for key, value in fields.items()}
        return self.own(row) if left else made  # paths inside of texts, say

    def own(self, row: Row) -> dict[str, Any]:
        """The row in our own columns, by the names that the recipe reads."""
        problem, columns = row.problem, self._columns
        images = [self._path(ref) for ref in problem.images]
        made: dict[str, Any] = {**problem.metadata, columns.id: problem.id}
        made |= {"history": [to_row(turn) for turn in problem.history]} if problem.history else {}
        made[columns.question[0]] = problem.question
        made |= {} if row.response is None else {columns.response[0]: row.response}
        made |= {columns.images[0]: images} if images else {}
        made |= {columns.choices[0]: list(problem.choices)} if problem.choices else {}
        made |= {columns.answer[0]: problem.answer} if problem.answer else {}
        return made
