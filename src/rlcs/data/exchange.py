"""Exports demonstrations and problems in the layouts of other tools.

`published`: Parquet with the columns of Multimodal-Cold-Start (`images` embedded, `problem`, `answer`, where
the answer of a demonstration is its whole response); `ms-swift`: JSONL with query, response, images;
`llama-factory`: ShareGPT with `dataset_info.json`. The turns before a question are in a column `history` (in
`published` of {role, text}, in `ms-swift` pairs beside `system`). Each export is a folder with a card.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rlcs.data.images import image_kind, portable_image
from rlcs.data.problem_store import copy_image
from rlcs.data.rows import Row
from rlcs.errors import RunFolderError
from rlcs.records import ImageRef, Problem, to_row
from rlcs.storage import atomic_write, write_json, write_jsonl

Layout = Literal["published", "ms-swift", "llama-factory"]
LAYOUTS: tuple[Layout, ...] = ("published", "ms-swift", "llama-factory")
_BATCH = 256


def export(rows: Sequence[Row], folder: Path, *, layout: Layout, source: str) -> list[Path]:
    """Write rows into a new folder; return its files. Raises RunFolderError if it is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise RunFolderError("the folder is not empty", where=str(folder), fix="name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "published":
        _write_parquet(rows, folder / "data" / "train-00000-of-00001.parquet")
    elif layout == "ms-swift":
        write_jsonl(folder / "train.jsonl", (_swift(row, folder) for row in rows))
    else:
        write_jsonl(folder / "train.jsonl", (_sharegpt(row, folder) for row in rows))
        write_json(folder / "dataset_info.json", _LLAMA_FACTORY)
    atomic_write(folder / "README.md", card(rows, folder.name, layout=layout, source=source))
    return sorted(path for path in folder.rglob("*") if path.is_file())


_LLAMA_FACTORY = {
    "rlcs": {
        "file_name": "train.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "images": "images"},
    }
}


def _query(problem: Problem) -> str:
    """The question with its choices, and a slot for each of its images."""
    choices = problem.question_with_choices.removeprefix(problem.question)
    return problem.turns[-1].text + choices


def _earlier(problem: Problem, role: str) -> list[str]:
    """The texts of the turns of this role before the question, with a slot for each of their images."""
    return [turn.text for turn in problem.turns[:-1] if turn.role == role]


def _response(row: Row) -> str:
    """The text that a model is to learn: the response, or else the answer of the problem."""
    return row.problem.answer if row.response is None else row.response


def _images(row: Row, folder: Path) -> list[str | None]:
    return [copy_image(ref, folder).path for ref in row.problem.images]


def _swift(row: Row, folder: Path) -> dict[str, Any]:
    problem = row.problem
    system, questions, replies = (_earlier(problem, role) for role in ("system", "user", "assistant"))
    rounds = [list(each) for each in zip(questions, replies, strict=True)]
    return {
        **({"system": system[0]} if system else {}),
        **({"history": rounds} if rounds else {}),
        "query": _query(problem),
        "response": _response(row),
        "images": _images(row, folder),
        "solution": problem.answer,
    }


def _sharegpt(row: Row, folder: Path) -> dict[str, Any]:
    problem, names = row.problem, {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn.role], "value": turn.text} for turn in problem.turns[:-1]]
    turns += [{"from": "human", "value": _query(problem)}, {"from": "gpt", "value": _response(row)}]
    return {"conversations": turns, "images": _images(row, folder), "solution": problem.answer}


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    import pyarrow as pa
    from datasets import Features, Image, Value
    from datasets import List as ListOf
    from pyarrow.parquet import ParquetWriter

    text, columns = Value("string"), dict[str, Any]()
    if any(row.problem.history for row in rows):
        columns["history"] = ListOf({"role": text, "text": text})
    features = Features({"images": ListOf(Image()), **columns, "problem": text, "answer": text})
    schema = features.arrow_schema  # with the metadata by which `datasets` knows the images
    path.parent.mkdir(parents=True, exist_ok=True)
    with ParquetWriter(path, schema) as writer:
        for start in range(0, len(rows), _BATCH):
            table = [
                {
                    "images": [_embedded(ref) for ref in row.problem.images],
                    "history": [to_row(turn) for turn in row.problem.turns[:-1]],
                    "problem": _query(row.problem),
                    "answer": _response(row),
                }
                for row in rows[start : start + _BATCH]
            ]
            writer.write_table(pa.Table.from_pylist(table, schema=schema))


def _embedded(ref: ImageRef) -> dict[str, Any]:
    data = portable_image(ref)
    return {"bytes": data, "path": f"{ref.sha256[:24]}.{image_kind(data)}"}


def card(rows: Sequence[Row], name: str, *, layout: Layout, source: str) -> str:
    """Write the data set card: contents, number of rows, source, teachers, and the licence left open."""
    demonstrations = sum(row.response is not None for row in rows)
    counts = Counter(len(row.problem.images) for row in rows)
    files = "data/*.parquet" if layout == "published" else "train.jsonl"
    images = ", ".join(f"{n:,} rows with {k}" for k, n in sorted(counts.items()))
    teachers = Counter(
        str(row.problem.metadata["teacher"]) for row in rows if "teacher" in row.problem.metadata
    )
    written = ", ".join(f"{who} ({n:,})" for who, n in teachers.most_common(10)) or "not recorded"
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    facts = {"files": files, "name": name, "layout": layout, "source": source, "written": written}
    return template.format(**facts, rows=len(rows), demonstrations=demonstrations, images=images or "none")
