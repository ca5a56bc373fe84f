"""Sources of rows: JSONL, JSON and Parquet files, Hugging Face data sets, built-in tasks.

Each source becomes a `Table` of raw rows; `rows` interprets their columns.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlcs.data.hub import cache_where_unreachable
from rlcs.errors import DataError
from rlcs.recipe.schema import Data
from rlcs.records import Problem
from rlcs.storage import jsonl_lines, parse_object, read_json, require_regular

Role = Literal["cold_start", "rl", "test", "ask"]
"""The use of a source: cold start, RL, test, or questions without answers."""
ROLES: tuple[Role, ...] = ("rl", "test", "cold_start")
"""The uses in a run."""
_BATCH = 64
"""Rows that are read at once; few, because embedded images may be megabytes each."""
_BUILTIN = "builtin:"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """One row with its columns unchanged; `number` is the line (from 1) or the row (from 0).

    A row that cannot be parsed has a `reason` and no `fields`.
    """

    where: str
    number: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """An open source: its rows, its columns if they are known beforehand, and the folders of its images.

    A relative image path starts at `folder` and must stay below it (None: relative paths are not allowed); an
    absolute one must lie below one of `roots`.
    """

    source: str
    rows: Iterable[RawRow]
    columns: tuple[str, ...] | None
    folder: Path | None
    roots: tuple[Path, ...]


def suggest(word: str, known: Iterable[str]) -> str:
    """End an error message with the known word nearest to `word`, if one is near, and all known words."""
    options = list(known)
    matches = difflib.get_close_matches(word, options, n=1)
    return (f"did you mean {matches[0]}? " if matches else "") + f"known: {', '.join(options) or 'none'}"


def open_table(source: str, settings: Data, role: Role) -> Table:
    """Open a file, a folder or a hub data set. Raises DataError when it cannot be used as a whole."""
    if not source.strip():
        raise DataError(
            "the source is empty", fix="name a file, a data set folder or hub id, or builtin:NAME"
        )
    path = Path(source).expanduser()
    kind = path.suffix.lower()
    roots = (Path(settings.image_root).expanduser(),) if settings.image_root else ()
    if kind in (".jsonl", ".json", ".parquet"):
        columns, rows = _read_file(path, kind)
        return Table(source=source, rows=rows, columns=columns, folder=path.parent, roots=roots)
    name, options = _split_query(source, ("split", "config"))
    folder = Path(name).expanduser()
    split = options.get("split") or settings.split or ("test" if role == "test" else "train")
    local = folder.is_dir()
    if local:
        data, roots = _local_dataset(folder, split, options.get("config")), (folder, *roots)
    elif folder.exists() or name.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(name):
        what = "not a data file (or one with ?options)" if folder.exists() else "no such file or folder"
        known = "a .jsonl, .json or .parquet file, a data set folder, a hub id owner/name, or builtin:NAME"
        raise DataError(what, where=source, fix=f"name {known}")
    else:
        data, roots = _load_dataset(name, split, options.get("config")), (*_hub_caches(), *roots)
    rows, columns = _batches(data.with_format("arrow").iter(_BATCH), name), tuple(data.column_names)
    return Table(source=source, rows=rows, columns=columns, folder=folder if local else None, roots=roots)


# ---------------------------------------------------------------------------------- files


def _read_file(path: Path, kind: str) -> tuple[tuple[str, ...] | None, Iterable[RawRow]]:
    if kind == ".parquet":
        return _parquet(path)
    return None, _jsonl(path) if kind == ".jsonl" else _json_list(path)


def _jsonl(path: Path) -> Iterator[RawRow]:
    for number, line in jsonl_lines(path):
        try:
            yield RawRow(where=f"{path}:{number}", number=number, fields=parse_object(line))
        except ValueError as error:
            yield RawRow(where=f"{path}:{number}", number=number, reason=str(error))


def _json_list(path: Path) -> Iterator[RawRow]:
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(
            f"the file holds one {type(content).__name__}, not a list of rows",
            where=str(path),
            fix="write a JSON list of objects, or one object a line in a .jsonl file",
        )
    for number, value in enumerate(content):
        if isinstance(value, dict):
            yield RawRow(where=f"{path}#{number}", number=number, fields=value)
        else:
            reason = f"a row must be a JSON object, not {type(value).__name__}"
            yield RawRow(where=f"{path}#{number}", number=number, reason=reason)


def _parquet(path: Path) -> tuple[tuple[str, ...], Iterator[RawRow]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    require_regular(path)
    try:
        file = ParquetFile(path, page_checksum_verification=True)
    except (ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file: {error}", where=str(path), fix="copy or download it again"
        ) from error
    return tuple(file.schema_arrow.names), _batches(file.iter_batches(_BATCH), str(path))


def _batches(batches: Iterator[Any], name: str) -> Iterator[RawRow]:
    """Yield the rows of Arrow batches, converted one by one, so that invalid UTF-8 spoils only its row."""
    from pyarrow import ArrowException

    number = 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ArrowException, OSError) as error:
            raise DataError(
                f"cannot be read beyond row {number}: {error}", where=name, fix="copy or download it again"
            ) from error
        for offset in range(batch.num_rows):
            where = f"{name}#{number}"
            try:
                fields = batch.slice(offset, 1).to_pylist()[0]
                yield RawRow(where=where, number=number, fields=fields)
            except (ArrowException, ValueError, OverflowError) as error:
                yield RawRow(where=where, number=number, reason=f"cannot be decoded: {error}")
            number += 1


# ---------------------------------------------------------------------------------- data sets


def _local_dataset(folder: Path, split: str, config: str | None) -> Any:
    """Open a split of a data set saved with `save_to_disk`, or of a folder with data files."""
    import datasets

    saved = (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists()
    if not saved:
        return _load_dataset(str(folder), split, config)
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # readers of damaged Arrow or JSON files share no base class of errors
        raise DataError(
            f"not a readable data set: {error}", where=str(folder), fix="save or download it again"
        ) from error
    if isinstance(data, datasets.Dataset):
        return data
    if split not in data:
        raise DataError(
            f"no split {split}", where=str(folder), fix=f"{suggest(split, data)}; add ?split=NAME"
        )
    return data[split]


def _load_dataset(name: str, split: str, config: str | None) -> Any:
    import datasets

    try:
        with cache_where_unreachable(name):
            return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # network, hub and builder errors share no base class
        raise DataError(
            f"this data set cannot be loaded: {error}",
            where=name,
            fix="check the name (owner/name or a folder), the network, and ?split=NAME&config=NAME",
        ) from error


def _hub_caches() -> tuple[Path, Path]:
    """The folders in which `datasets` stores images that a hub data set names by path."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)


# ---------------------------------------------------------------------------------- built-in tasks


def _split_query(source: str, allowed: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """Split `NAME?key=value&...` into the name and its options. Raises DataError."""
    name, _, query = source.partition("?")
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        key, equals, value = part.partition("=")
        if key not in allowed:
            raise DataError(f"unknown option {key!r}", where=source, fix=suggest(key, allowed))
        if not equals or not value or key in options:
            raise DataError(f"option {key} needs one value", where=source, fix=f"write {key}=VALUE once")
        options[key] = value
    return name, options


def is_builtin(source: str) -> bool:
    """Whether the source names built-in tasks."""
    return source.startswith(_BUILTIN)


def open_builtin(source: str, role: Role) -> tuple[Problem, ...]:
    """Draw the problems of `builtin:NAME?count=N&seed=N&split=train|test&levels=1-3&families=a,b`.

    Defaults: 1,000 problems, seed 0, the test split for the role `test` and train otherwise, every
    level and every family. Raises DataError.
    """
    from rlcs.data import puzzles

    name, options = _split_query(source, ("count", "seed", "split", "levels", "families"))
    split = options.get("split", "test" if role == "test" else "train")
    if split not in ("train", "test"):
        raise DataError(f"no split {split}", where=source, fix=suggest(split, ("train", "test")))
    families = options.get("families")
    return puzzles.load(
        name.removeprefix(_BUILTIN),
        split="test" if split == "test" else "train",
        count=_whole(options.get("count", "1000"), "count", source, least=1),
        seed=_whole(options.get("seed", "0"), "seed", source, least=0),
        levels=_levels(options["levels"], source) if "levels" in options else puzzles.LEVELS,
        families=tuple(families.split(",")) if families else None,
    )


def _whole(text: str, key: str, source: str, *, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        what = f"{key}={text} is not a whole number from {least} up"
        raise DataError(what, where=source, fix=f"write {key}={max(least, 1)}, say")
    return int(text)


def _levels(text: str, source: str) -> tuple[int, ...]:
    """Parse levels such as `2`, `1-3` or `1,3`. Raises DataError."""
    if match := re.fullmatch(r"(\d)-(\d)", text):
        levels = tuple(range(int(match[1]), int(match[2]) + 1))
    else:
        levels = tuple(int(part) for part in text.split(",")) if re.fullmatch(r"\d(,\d)*", text) else ()
    if not levels or len(set(levels)) < len(levels):
        raise DataError(f"levels={text} cannot be read", where=source, fix="write levels=1-3 or levels=1,3")
    return levels
