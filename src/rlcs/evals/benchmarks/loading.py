"""Loads a benchmark's questions with their images, from the hub or from a folder with its official files.

A question whose image is missing or damaged is left out and reported: scores state how many questions they
cover.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rlcs.data.images import image_from_bytes, image_from_path
from rlcs.data.rows import BadRow
from rlcs.data.sources import open_table, suggest
from rlcs.errors import DataError, UserError
from rlcs.evals.benchmarks.base import Benchmark, Question
from rlcs.recipe.schema import Data
from rlcs.records import ImageRef
from rlcs.storage import read_json


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A benchmark's questions with their images, and the questions without a usable one, with reasons.

    `source` is the file or hub data set that was read.
    """

    benchmark: Benchmark
    split: str
    source: str
    questions: tuple[tuple[Question, tuple[ImageRef, ...]], ...]
    missing: tuple[BadRow, ...] = ()

    @property
    def of(self) -> int:
        """Number of questions in the split as published."""
        return self.benchmark.splits[self.split]


def load_benchmark(
    benchmark: Benchmark, *, split: str | None, data: Path | None, limit: int | None, decode_limit: int
) -> Loaded:
    """Read a split (None: the benchmark's default), at most its first `limit` rows.

    `data` is a folder with the official files, or with a subfolder of the benchmark's name that has them;
    None reads from the hub. Raises UserError or DataError if there is no usable question.
    """
    split = split or next(iter(benchmark.splits))
    if split not in benchmark.splits:
        fix = suggest(split, benchmark.splits)
        raise UserError(f"{benchmark.title} has no split {split!r}", where="--split", fix=fix)
    folder = None if data is None else _folder(benchmark, data)
    source, rows = _hub_rows(benchmark, split) if folder is None else _local_rows(benchmark, split, folder)
    questions: list[tuple[Question, tuple[ImageRef, ...]]] = []
    missing: list[BadRow] = []
    seen: set[str] = set()
    for number, (where, fields) in enumerate(islice(rows, limit)):
        question = _question(benchmark, {"id": number, **fields}, where)
        if question.id in seen:
            raise DataError(f"the id {question.id!r} comes twice", where=where, fix="take the official file")
        seen.add(question.id)
        try:
            questions.append((question, _images(question, folder, decode_limit)))
        except DataError as error:
            missing.append(BadRow(where=error.where or where, reason=error.what, id=question.id))
    if not questions:
        what = f"none of {len(missing):,} questions has its image" if missing else "there are no questions"
        named = f", first {missing[0]}" if missing else ""
        fix = "put the benchmark's images beside its file, as its authors publish them"
        raise DataError(what + named, where=source, fix=fix)
    return Loaded(
        benchmark=benchmark, split=split, source=source, questions=tuple(questions), missing=tuple(missing)
    )


def _question(benchmark: Benchmark, fields: dict[str, Any], where: str) -> Question:
    try:
        return benchmark.read(fields)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"column {error} is missing" if isinstance(error, KeyError) else str(error)
        fix = f"is this a file of {benchmark.title}? its columns must be as published on {benchmark.hub_id}"
        raise DataError(f"not a row of {benchmark.title}: {what}", where=where, fix=fix) from error


def _folder(benchmark: Benchmark, data: Path) -> Path:
    if not data.is_dir():
        raise UserError("no such folder", where=f"--data {data}", fix="name a folder with benchmark files")
    subfolder = data / benchmark.name
    return subfolder if subfolder.is_dir() else data


def _hub_rows(benchmark: Benchmark, split: str) -> tuple[str, Iterator[tuple[str, dict[str, Any]]]]:
    config = f"&config={benchmark.config}" if benchmark.config else ""
    source = f"{benchmark.hub_id}?split={split}{config}"
    return source, _table_rows([source])


def _local_rows(
    benchmark: Benchmark, split: str, folder: Path
) -> tuple[str, Iterator[tuple[str, dict[str, Any]]]]:
    """Read the first of SPLIT.jsonl, SPLIT.json, SPLIT.parquet, SPLIT-*.parquet, also from `data/`."""
    for parent in (folder, folder / "data"):
        for pattern in (f"{split}.jsonl", f"{split}.json", f"{split}.parquet", f"{split}-*.parquet"):
            if files := sorted(parent.glob(pattern)):
                rows = _json_rows(files[0]) if pattern.endswith(".json") else _table_rows(files)
                return str(files[0]), rows
    raise UserError(
        f"there is no {split}.jsonl, {split}.json, {split}.parquet or {split}-*.parquet",
        where=str(folder),
        fix=f"put the official files of {benchmark.title} there, or into {folder / benchmark.name}; "
        "without --data they come from the hub",
    )


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a JSON file, which holds a list of rows or a mapping from id to row."""
    content = read_json(path)
    rows = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError("not a list or mapping of rows", where=str(path), fix="take the official file")
    for number, row in enumerate(rows):
        yield f"{path}#{number}", row


def _table_rows(sources: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for source in sources:
        for raw in open_table(str(source), Data(), "test").rows:
            if raw.reason:
                raise DataError(raw.reason, where=raw.where, fix="copy or download the file again")
            yield raw.where, dict(raw.fields)


def _images(question: Question, folder: Path | None, limit: int) -> tuple[ImageRef, ...]:
    """Open the question's image, if it has one. Raises DataError if it is missing or damaged."""
    picture = question.picture
    if isinstance(picture, dict):
        picture = picture["path"] if picture.get("bytes") is None else picture["bytes"]
    if picture is None:
        return ()
    if isinstance(picture, bytes):
        return (image_from_bytes(picture, limit=limit, where=f"image of {question.id}"),)
    if folder is None:
        raise DataError("the row has a path instead of an image", where=str(picture))
    roots = (folder, folder / "images", folder / "data")
    root = next((root for root in roots if (root / str(picture)).exists()), folder)
    return (image_from_path(str(picture), root=root, limit=limit),)
