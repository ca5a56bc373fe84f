"""Lists the files of a folder for the Hugging Face hub, and uploads them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlcs.errors import DataError, UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One file that would be sent: its path in the folder, with `/`."""

    path: str
    size: int
    sha256: str


def listing(folder: Path) -> list[Entry]:
    """The files below a folder. Raises UserError where there is no card."""
    if not (folder / "README.md").is_file():
        fix = "name a folder that `rlcs export` or `rlcs data export` wrote"
        raise UserError("no exported folder is here", where=str(folder), fix=fix)
    return [_entry(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]


def _entry(folder: Path, path: Path) -> Entry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Entry(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=digest)


def lines(entries: Sequence[Entry], repo: str) -> list[str]:
    """The lines of a dry run: size, start of the hash and name of every file, then the sum of sizes."""
    total = sum(entry.size for entry in entries)
    rows = [f"{entry.size:>14,}  {entry.sha256[:16]}  {entry.path}" for entry in entries]
    return [*rows, f"{total:>14,}  bytes in {len(entries):,} files would go to {repo}"]


def push(
    folder: Path, repo: str, entries: Sequence[Entry], *, kind: Literal["model", "dataset"], private: bool
) -> str:
    """Upload the listed files in one commit, creating the repository if needed; returns its address.

    Raises DataError when the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    client_errors: Any = HfHubHTTPError.__bases__  # of the HTTP client that the hub library uses
    files = [CommitOperationAdd(entry.path, folder / entry.path) for entry in entries]
    try:
        made = api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        api.create_commit(repo, files, commit_message="Upload with rlcs", repo_type=kind)
    except (*client_errors, OSError, ValueError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        verb, fix = "refuses it", "check the name, and log in with `hf auth login`"
        if not isinstance(error, HfHubHTTPError | ValueError):
            verb, fix = "cannot be used", f"check the connection to {api.endpoint}"
        raise DataError(f"the hub {verb}: {what}", where=repo, fix=fix) from error
    return str(made)
