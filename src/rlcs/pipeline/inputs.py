"""What a run is made from, written down at its first start and compared at every later one.

Without it a run that was stopped would go on with edited gold answers, other images or another model, and
its numbers would be of neither. `inputs.json` in the run's folder has a digest of every row of data, and the
size, time and checksum of every file of the model. A file with the size and time of before is not read again:
weights may be large. Of a model on the hub it has the commit, with which the run goes on.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlcs.data.run_data import RunData, key_of
from rlcs.data.stored import digests_of, id_of
from rlcs.errors import ModelError, RunFolderError
from rlcs.model.loading import load_config
from rlcs.model.source import find_source
from rlcs.pipeline.run_folder import holds_results
from rlcs.storage import MANIFEST, file_sum, read_json, write_json

INPUTS = "inputs.json"
_OF_A_FORMAT = (".json", ".jinja", ".model", ".txt", ".py")
_OF_A_MODEL = (*_OF_A_FORMAT, ".safetensors", ".bin")
_SOURCES = ("cold_start", "rl", "test", "validation")
_DIGITS = 8
"""Characters of a row's digest."""
_SHOWN = 3


def check_inputs(
    folder: Path, data: RunData, model: str, *, revision: str | None = None, dry: bool = False
) -> str | None:
    """Compare the data and the model with the record in a run folder, and write what is new; rank 0 alone.

    A run without results may take others. A `dry` check writes nothing. Returns the revision of the model to
    load: of one on the hub the commit of the first start. Raises RunFolderError with what changed.
    """
    path = folder / INPUTS
    before = read_json(path) if path.exists() else {"data": {}, "model": {}}
    rows: dict[str, Sequence[Any]] = {name: getattr(data, name) for name in _SOURCES}
    now = {"data": {name: digests_of(each) for name, each in rows.items() if each}}
    changed = [
        text
        for name, digests in now["data"].items()
        if name in before["data"]
        for text in _changed_rows(key_of(name), before["data"][name], digests, rows[name])
    ]
    files = _files_of(model, revision, before["model"])
    changed += [f"{model}: {name}" for name in _changed_files(before["model"], files)]
    if changed and holds_results(folder, ["data", "model"]):
        more = f"; and {len(changed) - _SHOWN:,} more" if len(changed) > _SHOWN else ""
        raise RunFolderError(
            f"what the run is made from has changed since it began: {'; '.join(changed[:_SHOWN])}{more}",
            where=str(folder),
            fix="restore it, or choose another --out for a run of what is there now",
        )
    record = {"data": {**before["data"], **now["data"]}, "model": files}
    if record != before and not dry:
        write_json(path, record)
    return files[_on_hub(model, revision)]["sha256"] if _on_hub(model, revision) in files else revision


def _on_hub(model: str, revision: str | None) -> str:
    """The name of a model on the hub in the record."""
    return f"{model}@{revision or 'main'}"


def _changed_rows(key: str, before: str, now: str, rows: Sequence[Any]) -> Iterator[str]:
    """What changed in the rows of a source, whose digests stand one after the other."""
    if len(before) != len(now):
        yield f"{key} has {len(now) // _DIGITS:,} rows instead of {len(before) // _DIGITS:,}"
        return
    starts = range(0, len(now), _DIGITS)
    other = [at // _DIGITS for at in starts if before[at : at + _DIGITS] != now[at : at + _DIGITS]]
    if other:
        listed = ", ".join(repr(id_of(rows[at])) for at in other[:_SHOWN])
        yield f"{key}: {len(other):,} rows (with their images and gold answers), first {listed}"


def _files_of(model: str, revision: str | None, before: Mapping[str, Any]) -> dict[str, Any]:
    """Size, time and checksum of the files of a model in a folder; of a checkpoint its manifest has them.

    Of a model on the hub its commit, which stands for all of its files.
    """
    try:
        source = find_source(model)
        folder, name = source.files, _on_hub(model, revision)
        if not folder.is_dir():
            return {name: before.get(name) or {"sha256": load_config(model, revision)._commit_hash}}
    except ModelError:  # loading the model says what is wrong, and with which key
        return {}
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in _OF_A_MODEL and (source.checkpoint is None or path.name == MANIFEST):
            facts = path.stat()
            known = before.get(path.name, {})
            stamp = {"size": facts.st_size, "time": facts.st_mtime_ns}
            unread = known and {**known, **stamp} == known
            found[path.name] = known if unread else {**stamp, "sha256": file_sum(path).sha256}
    return found


def format_of(model: str, revision: str | None) -> dict[str, str]:
    """Checksums of the files of a model but its weights; of one on the hub its commit. Raises ModelError."""
    source = find_source(model)
    if not source.files.is_dir():
        return {_on_hub(model, revision): str(load_config(model, revision)._commit_hash)}
    files = (path for path in sorted(source.files.iterdir()) if path.suffix in _OF_A_FORMAT)
    return {path.name: file_sum(path).sha256 for path in files}


def _changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if not before or not now:  # of an earlier version, or on the hub
        return []
    sums = [{name: facts["sha256"] for name, facts in each.items()} for each in (before, now)]
    return sorted({name for name, _ in sums[0].items() ^ sums[1].items()})
