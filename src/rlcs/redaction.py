"""Takes secrets out of texts: the one place that knows the secrets of this process.

They are the values of environment variables that are named as keys, and passwords in addresses. Errors, logs,
what is printed and every file of text pass through here.
"""

import base64
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import TextIOWrapper
from urllib.parse import urlsplit

DECLARED = "RLCS_KEYS"
"""The environment variable in which a user names further variables that hold keys of model servers."""
HIDDEN = "***"
"""What stands where a secret stood."""
_KEY = re.compile(r"(^|_)API_KEY$", re.IGNORECASE)
_SECRET = re.compile(r"(^|_)(API_KEY|ACCESS_KEY|TOKEN|SECRET)$|^OPENAI_(ORG|PROJECT)_ID$", re.IGNORECASE)
_OF_THE_HUB = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}
_PROXY = re.compile(r"_PROXY$", re.IGNORECASE)
_SHORTEST = 8  # shorter values (EMPTY, none) are placeholders, and words of answers
_IN_ADDRESS = re.compile(
    r"(?<=://)[^/?#\s@'\"]*@|(?<=[?&])(([\w-]*(?:key|token|secret|passw(?:or)?d|auth|signature))=)[^&#\s'\"]+",
    re.IGNORECASE,
)
_NAMED_ENTITIES = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}


def is_key(name: str) -> bool:
    """Whether a variable holds a key that may be sent to model servers: by its name, or declared as one.

    A recipe may come from a stranger, so its word alone is not enough: it could name any secret.
    """
    return bool(_KEY.search(name)) or name in _declared(os.environ)


def without_keys(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a program whose log is its own: what it does not have it cannot write there.

    The hub's token stays, by which it may load models.
    """
    declared = _declared(environment)
    return {
        name: value
        for name, value in environment.items()
        if name in _OF_THE_HUB or not (_SECRET.search(name) or name in declared)
    }


def redacted(text: str, *, is_json: bool = False) -> str:
    """The text with `***` for secrets, also in the forms of a URL, JSON, HTML, base64 and hexadecimal.

    Names of JSON objects stay, or a placeholder for a key like `question` would spoil a file of ours.
    """
    forms = _forms(frozenset(_secrets(os.environ)))
    if not any(hint in text for hint in forms.hints):
        return text
    pattern = forms.values if is_json else forms.pattern
    return pattern.sub(HIDDEN, text)


def shown(text: str) -> str:
    """A text for people to read: `redacted`, and without user, password or key in any address."""
    return _IN_ADDRESS.sub(lambda found: f"{found[1] or ''}{HIDDEN}{'' if found[1] else '@'}", redacted(text))


class RedactingFormatter(logging.Formatter):
    """Formats a log record, its traceback included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return shown(super().format(record))


class _RedactingStream(TextIOWrapper):
    """Another stream of text on the same bytes, that leaves secrets out, each within one call."""

    def __init__(self, stream: TextIOWrapper) -> None:
        super().__init__(
            stream.buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering
        )
        self._unguarded = stream  # which would close the bytes when nothing holds it any more

    def write(self, text: str, /) -> int:
        super().write(shown(text))
        return len(text)


def guard_streams() -> None:
    """Let standard output and standard error leave secrets out; what they cannot encode is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is TextIOWrapper:
            stream.flush()
            setattr(sys, name, _RedactingStream(stream))
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _declared(environment: Mapping[str, str]) -> list[str]:
    return re.split(r"[\s,;:]+", environment.get(DECLARED, ""))


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    declared = _declared(environment)
    for name, value in environment.items():
        if _SECRET.search(name) or name in declared:
            yield from (form for form in (value.strip(), cleaned(value)) if len(form) >= _SHORTEST)
        elif _PROXY.search(name) and len(password := _password(value)) >= _SHORTEST:
            yield password


def _password(url: str) -> str:
    try:
        return urlsplit(url).password or ""
    except ValueError:
        return ""


def cleaned(key: str) -> str:
    """A key without the line break, quotes or `Bearer` that came with it."""
    return re.sub(r"^bearer\s+", "", key.strip().strip("\"'").strip(), flags=re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Forms:
    """Patterns of all forms of all secrets, and texts of which every match holds one, as a faster test.

    `values` leaves names of JSON objects out.
    """

    pattern: re.Pattern[str]
    values: re.Pattern[str]
    hints: tuple[str, ...]


@lru_cache(maxsize=8)
def _forms(secrets: frozenset[str]) -> _Forms:
    patterns, hints = list[str](), set[str]()
    for secret in sorted(secrets, key=len, reverse=True):
        data = secret.encode("utf-8", "surrogateescape")
        encoded = [data.hex(), *_base64(data)]
        patterns += ["".join(map(_written, secret)), f"(?i:{encoded[0]})", *map(_base64_pattern, encoded[1:])]
        hints |= {_longest_run(form) for form in (secret, *encoded)} | {encoded[0].upper()}
        code = ord(_longest_run(secret)[0])  # where every character is escaped
        hints |= {
            f"{mark}{code:{kind}}" for mark in ("%", "\\x", "u00", "#x", "#X") for kind in ("02x", "02X")
        }
        hints.add(f"#{code};")
    pattern = f"(?:{'|'.join(patterns)})"
    values = re.compile(rf'{pattern}(?!":)')
    return _Forms(pattern=re.compile(pattern), values=values, hints=tuple(sorted(hints)))


def _longest_run(form: str) -> str:
    """The longest part of letters and digits, which mostly no format escapes."""
    runs: list[str] = re.findall(r"[^\W_]+", form) or [form]
    return max(runs, key=len)


def _base64(data: bytes) -> Iterator[str]:
    """What base64 certainly holds of the data, behind 0, 1 or 2 bytes more than a multiple of 3."""
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + data).decode()
        yield encoded[(8 * offset + 5) // 6 : 8 * (offset + len(data)) // 6]


def _base64_pattern(encoded: str) -> str:
    chars = {"+": r"(?:[+-]|%2[Bb])", "/": r"(?:\\?/|_|%2[Ff])"}
    return "".join(chars.get(char, char) for char in encoded) + r"[\w+/-]?={0,2}"


def _written(char: str) -> str:
    """The pattern of one character as URLs, JSON and HTML may write it."""
    plain = re.escape(char)
    words = [plain if char.isalnum() else rf"\\*{plain}", rf"[%\\&]{_ESCAPE.format(ord(char))}"]
    words += [r"\+"] if char == " " else []
    words += [f"&{_NAMED_ENTITIES[char]};"] if char in _NAMED_ENTITIES else []
    return f"(?:{'|'.join(words)})"


_ESCAPE = r"(?:\\*(?i:u00|x)?(?i:{0:02x})|#0*{0};|#(?i:x0*{0:x});)"
