"""Checks the files of a model before they are published: only known files, and no secrets."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from rlcs.publish.hub import Entry

BELONGS = (
    "README.md LICENSE* NOTICE* .gitattributes *.safetensors *.safetensors.index.json *config.json "
    "chat_template.jinja* tokenizer.json tokenizer.model vocab.json merges.txt added_tokens.json "
    "special_tokens_map.json"
).split()
"""Names of the files of a model folder; everything else is refused unless it is allowed by name."""

_TRAINING = {
    "optimiser state": "*optim*",
    "a training checkpoint": "*checkpoint* manifest.json *rng*",
}
REASONS = _TRAINING | {
    "weights as a pickle, which runs code when loaded": "*.bin *.pt *.pth *.pkl",
    "training or evaluation data": "*.jsonl *.parquet",
    "an image, perhaps of the training data": "*.png *.jp*g *.webp",
    "perhaps a key": "*.env* *.pem *.key *id_rsa*",
    "code, which would run on other machines": "*.py",
    "a log": "*.log",
}
"""Kinds of files that do not belong in a published model, with patterns of their names."""

_SECRET = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_LARGEST_TEXT = 50_000_000


def refusals(folder: Path, entries: Sequence[Entry], allowed: Sequence[str]) -> list[tuple[str, str]]:
    """The (path, reason) of every file that must not be sent; names that match `allowed` may be.

    A secret, or a link out of the folder, is refused even where its name is allowed.
    """
    found = []
    for entry in entries:
        path = folder / entry.path
        if not path.resolve().is_relative_to(folder.resolve()):
            found.append((entry.path, "a link to a file outside the folder"))
        elif _holds_secret(path):
            found.append((entry.path, "it holds what looks like a key"))
        elif not any(fnmatch(entry.path, pattern) for pattern in allowed):
            known = "/" not in entry.path and any(fnmatch(entry.path, pattern) for pattern in BELONGS)
            why = _reason(entry.path, _TRAINING if known else REASONS)
            if why or not known:
                found.append((entry.path, why or "not a file of a model folder"))
    return found


def _reason(path: str, reasons: Mapping[str, str]) -> str:
    """The first reason with a matching pattern, or an empty text."""
    for reason, patterns in reasons.items():
        if any(fnmatch(path.lower(), pattern) for pattern in patterns.split()):
            return reason
    return ""


def _holds_secret(path: Path) -> bool:
    if path.suffix == ".safetensors" or path.stat().st_size > _LARGEST_TEXT:
        return False
    return _SECRET.search(path.read_bytes()) is not None
