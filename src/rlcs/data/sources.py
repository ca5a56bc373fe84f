"""Sources of rows: data files and folders of them, Hugging Face data sets, built-in tasks.

Each source becomes a `Table` of raw rows; `rows` interprets their columns.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlcs.data.files import BATCH, KINDS, RawRow, batch_rows, files_of, is_data_file, read_file
from rlcs.data.hub import cache_where_unreachable
from rlcs.errors import DataError
from rlcs.recipe.schema import Data
from rlcs.records import Problem
from rlcs.storage import at_home

Role = Literal["cold_start", "rl", "test", "ask"]
"""The use of a source: cold start, RL, test, or questions without answers."""
_SHOWN_FILES = 5
_SHOWN_WORD, _SHOWN_WORDS = 60, 30
"""Characters of a known word and number of words in an error message."""
ROLES: tuple[Role, ...] = ("rl", "test", "cold_start")
"""The uses in a run."""
DATASET_OPTIONS = ("split", "config")
"""Options of a data set folder or hub id, as in `owner/name?split=val`."""
_BUILTIN = "builtin:"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """An open source: its rows, its columns if they are known beforehand, and the folders of its images.

    A relative image path starts at one of `folders`, or of `roots`, and must stay below it (without any,
    relative paths are not allowed); an absolute one must lie below one of `roots`. The rows change when one
    of `files` or the `fingerprint` does; with neither it is not known whether they changed.
    """

    source: str
    rows: Iterable[RawRow]
    columns: tuple[str, ...] | None
    folders: tuple[Path, ...]
    roots: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    fingerprint: str = ""


def suggest(word: str, known: Iterable[str]) -> str:
    """End an error message with the known word nearest to `word`, if one is near, and all known words."""
    options = [
        str(each) if len(str(each)) <= _SHOWN_WORD else f"{str(each)[:_SHOWN_WORD]}..." for each in known
    ]
    matches = difflib.get_close_matches(word, options, n=1)
    listed = ", ".join(options[:_SHOWN_WORDS]) or "none"
    more = f" and {len(options) - _SHOWN_WORDS:,} more" if len(options) > _SHOWN_WORDS else ""
    return (f"did you mean {matches[0]}? " if matches else "") + f"known: {listed}{more}"


def open_table(source: str, settings: Data, role: Role) -> Table:
    """Open a file, a folder or a hub data set. Raises DataError when it cannot be used as a whole."""
    if not source.strip():
        raise DataError(
            "the source is empty", fix="name a file, a data set folder or hub id, or builtin:NAME"
        )
    path = at_home(source)
    roots = (at_home(settings.image_root),) if settings.image_root else ()
    if is_data_file(path):
        columns, rows = read_file(path)
        return Table(
            source=source, rows=rows, columns=columns, folders=(path.parent,), roots=roots, files=(path,)
        )
    name, options = split_query(source, DATASET_OPTIONS)
    folder = at_home(name)
    split, config = options.get("split") or settings.split, options.get("config")
    by_role = split or ("test" if role == "test" else "train")
    if folder.is_dir():
        if not _is_saved(folder) and config is None and (files := files_of(folder, split, by_role)):
            return _joined(source, folder, files, roots)
        data, folders = _local_dataset(folder, by_role, config), [folder]
        roots = (folder, *roots)
    elif folder.exists() or name.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(name):
        what = "not a data file (or one with ?options)" if folder.exists() else "no such file or folder"
        known = f"a {', '.join(KINDS)} file, a data set folder, a hub id owner/name, or builtin:NAME"
        raise DataError(what, where=source, fix=f"name {known}")
    else:
        data, folders = _load_dataset(name, by_role, config), []
        roots = (*_hub_caches(), *roots)
    rows, columns = batch_rows(data.with_format("arrow").iter(BATCH), name), tuple(data.column_names)
    return Table(
        source=source,
        rows=rows,
        columns=columns,
        folders=tuple(folders),
        roots=roots,
        files=tuple(Path(each["filename"]) for each in data.cache_files),
        fingerprint=str(getattr(data, "_fingerprint", "")),
    )


def _joined(source: str, folder: Path, files: Sequence[Path], roots: tuple[Path, ...]) -> Table:
    """The rows of the data files of a folder, numbered through if there are several."""
    parents = dict.fromkeys([*(file.parent for file in files), folder])
    parts = [read_file(file) for file in files]
    notes = []
    columns, rows = parts[0]
    if len(files) > 1:
        columns, rows = None, _numbered(rows for _, rows in parts)
        names = ", ".join(str(file.relative_to(folder)) for file in files[:_SHOWN_FILES])
        more = f" and {len(files) - _SHOWN_FILES:,} more" if len(files) > _SHOWN_FILES else ""
        notes.append(f"rows are read from {len(files):,} files: {names}{more}")
    return Table(
        source=source,
        rows=rows,
        columns=columns,
        folders=tuple(parents),
        roots=(folder, *roots),
        notes=tuple(notes),
        files=tuple(files),
    )


def _numbered(parts: Iterable[Iterable[RawRow]]) -> Iterator[RawRow]:
    for number, raw in enumerate(raw for rows in parts for raw in rows):
        yield replace(raw, number=number)


# ---------------------------------------------------------------------------------- data sets


def _is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`; LLaMA-Factory has a dataset_info.json of its own."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _local_dataset(folder: Path, split: str, config: str | None) -> Any:
    """Open a split of a data set saved with `save_to_disk`, or of a folder with data files."""
    import datasets

    if not _is_saved(folder):
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


def split_query(source: str, allowed: tuple[str, ...]) -> tuple[str, dict[str, str]]:
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

    name, options = split_query(source, ("count", "seed", "split", "levels", "families"))
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
