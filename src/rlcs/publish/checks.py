"""What a published model may hold: known files alone, none of them a secret."""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from rlcs.hub import Entry

BELONGS = (
    "README.md",
    "LICENSE*",
    "NOTICE*",
    ".gitattributes",
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "chat_template.jinja*",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
"""Names of the files of a model folder; everything else is refused unless it is allowed by name."""

REASONS = {
    "*optim*": "optimiser state",
    "*checkpoint*": "a training checkpoint",
    "*rng*": "state of a training",
    "manifest.json": "a training checkpoint",
    "*.bin": "weights as a pickle, which runs code when loaded",
    "*.pt": "weights as a pickle, which runs code when loaded",
    "*.pth": "weights as a pickle, which runs code when loaded",
    "*.pkl": "a pickle, which runs code when loaded",
    "*.jsonl": "training or evaluation data",
    "*.parquet": "training or evaluation data",
    "*.png": "an image, perhaps of the training data",
    "*.jp*g": "an image, perhaps of the training data",
    "*.webp": "an image, perhaps of the training data",
    "*.env*": "perhaps a key",
    "*.pem": "perhaps a key",
    "*.key": "perhaps a key",
    "*id_rsa*": "perhaps a key",
    "*.py": "code, which would run on other machines",
    "*.log": "a log",
}
"""Patterns on paths that say what a file is that does not belong."""

_SECRET = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_LARGEST_TEXT = 50_000_000


def refusals(folder: Path, entries: Sequence[Entry], allowed: Sequence[str]) -> list[tuple[str, str]]:
    """(path, why) of every file that must not be sent; `allowed` are patterns of a person's own.

    A secret, or a link out of the folder, is refused even where its name is allowed.
    """
    found = []
    for entry in entries:
        path = folder / entry.path
        if not path.resolve().is_relative_to(folder.resolve()):
            found.append((entry.path, "a link to a file outside the folder"))
        elif _holds_secret(path):
            found.append((entry.path, "it holds what looks like a key"))
        elif not any(fnmatch(entry.path, pattern) for pattern in allowed) and not _belongs(entry.path):
            why = (reason for pattern, reason in REASONS.items() if fnmatch(entry.path.lower(), pattern))
            found.append((entry.path, next(why, "not a file of a model folder")))
    return found


def _belongs(path: str) -> bool:
    known = "/" not in path and any(fnmatch(path, pattern) for pattern in BELONGS)
    return known and not any(fnmatch(path.lower(), pattern) for pattern in ("*optim*", "*checkpoint*"))


def _holds_secret(path: Path) -> bool:
    if path.suffix == ".safetensors" or path.stat().st_size > _LARGEST_TEXT:
        return False
    return _SECRET.search(path.read_bytes()) is not None
