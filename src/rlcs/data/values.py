"""Reads the values of columns as people write them: texts, gold answers, choices, lists as text.

Everything here raises ValueError with a reason of bounded length.
"""

import ast
import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any
from urllib.parse import unquote_to_bytes

from rlcs.grading.choices import without_label
from rlcs.grading.golds import with_commas
from rlcs.records import option_letter

MAX_CHOICES = 26
"""Choices have the letters A to Z."""
_DAMAGED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]|\t(ext|frac|imes|heta|an)\b|\r(ightarrow|ho)\b")
"""What JSON makes of single backslashes before LaTeX commands: of `\\boxed` a backspace and `oxed`."""
_MAX_LITERAL = 1_000_000
"""Characters; a longer text is not read as a Python list."""
_SHOWN = 40
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_NOTHING = ("[]", "{}", "[null]", "[None]")
"""Empty lists and mappings as tables hold them: as text."""


def is_filled(value: object) -> bool:
    """Whether a value holds anything: not null or NaN, no blank text, no list or mapping of such values."""
    if isinstance(value, str):
        text = value.strip()
        return bool(text) and text not in _NOTHING
    if value is None:
        return False
    if isinstance(value, list | tuple | Mapping):
        items = value.values() if isinstance(value, Mapping) else value
        return any(map(is_filled, items))
    return value != b"" and value == value  # only NaN differs from itself


def first_filled(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of `names` that is a column with a value, or else the first that is a column at all."""
    present = [name for name in names if name in fields]
    return next((name for name in present if is_filled(fields[name])), present[0] if present else None)


def shown(value: object) -> str:
    """A value for messages: its type and its first characters, never the content of a file."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, list | tuple | Mapping) and value:
        return f"{type(value).__name__} of {len(value):,}"
    text = repr(value[: 2 * _SHOWN] if isinstance(value, str) else value)
    return f"{type(value).__name__} {text[:_SHOWN]}{'...' if len(text) > _SHOWN else ''}"


def structured(value: object) -> object:
    """The list or mapping that a text holds, as JSON or as Python prints it; any other value unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    for parse in (json.loads, ast.literal_eval):
        if parse is ast.literal_eval and len(value) > _MAX_LITERAL:
            break
        try:
            found = parse(value.strip() if parse is json.loads else with_commas(value.strip()))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list | dict):
            return found
    return value


IMAGE_KEYS = ("bytes", "path", "image", "url", "image_url", "data", "base64", "source")
"""Where a mapping has its image, the first that is filled."""


def image_in(value: object) -> object:
    """The path, URL or bytes of an image that a mapping holds, also inside another; None if it has none."""
    while isinstance(value, Mapping):
        value = value.get(first_filled(value, IMAGE_KEYS) or "")
    return value if is_filled(value) else None


def decoded_base64(content: str | bytes) -> bytes:
    """Decode Base64, also with the alphabet or the `%` escapes of URLs, white space, and no padding.

    Raises ValueError.
    """
    plain = unquote_to_bytes(content).translate(_STANDARD_ALPHABET, b" \t\r\n\f\v").rstrip(b"=")
    return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)


def checked_text(value: object, what: str) -> str:
    """Check that a value is a text that UTF-8 can encode. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"the {what} must be a text, not {shown(value)}")
    if value.isascii():
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the {what} has half a character (a lone surrogate) at {error.start}") from error
    return value


def answer_text(value: object) -> str:
    """Convert an answer to text: numbers and dates are written plainly (3.0 as 3). Raises ValueError."""
    if isinstance(value, bool):
        raise ValueError(f"the answer must be a text or a number, not {shown(value)}")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        plain = format(Decimal(str(value)), "f")
        return plain.rstrip("0").rstrip(".") if "." in plain else plain
    if isinstance(value, datetime):  # a date that a table keeps as a time stamp is that date
        midnight = value.time() == time() and value.tzinfo is None
        return value.date().isoformat() if midnight else value.isoformat(sep=" ")
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, str):
        return checked_text(value, "answer")
    raise ValueError(f"the answer must be a text or a number, not {shown(value)}")


def gold_text(value: object) -> str:
    """Convert a gold answer to text; a list is written as JSON, which `unwrap` reads. Raises ValueError."""
    if isinstance(value, list) and value:
        return json.dumps([answer_text(item) for item in value], ensure_ascii=False)
    found = structured(value)
    if not isinstance(found, str) and isinstance(found, Mapping):
        raise ValueError(f"the answer must be a text or a number, not {shown(found)}")
    return answer_text(value)


def undamaged(gold: str) -> str:
    """A gold answer without control characters. Raises ValueError."""
    if _DAMAGED.search(gold):
        raise ValueError(
            "the answer has a control character: JSON needs LaTeX's backslashes doubled (\\\\frac)"
        )
    return gold


def choices_of(value: object) -> tuple[str, ...]:
    """Read the options of a question, without their letters where all have consecutive ones.

    A list, a mapping from letters (`{"A": ...}`), a pair of lists (`{"label": ..., "text": ...}`), the text
    of one of these, or one option a line (`A. x`). Raises ValueError.
    """
    if not is_filled(value) and not (isinstance(value, list) and None in value):
        return ()
    items = structured(value)
    if isinstance(items, Mapping):
        items = _lettered(items)
    elif isinstance(items, str):
        items = [line.strip() for line in items.splitlines() if line.strip()]
        if _labels(items) is None or len(items) < 2:
            raise ValueError(f"the choices must be a list of texts, or lines A. ..., not {shown(value)}")
    if not isinstance(items, list):
        raise ValueError(f"the choices must be a list of texts, not {shown(value)}")
    if len(items) > MAX_CHOICES:
        raise ValueError(f"{len(items):,} choices are more than the letters A to Z")
    texts = [answer_text(item) for item in items]
    return tuple(_labels(texts) or texts)


def _lettered(items: Mapping[Any, Any]) -> list[Any]:
    """The options of a mapping, in the order of their letters; unused letters at its end are null."""
    if items.keys() == {"label", "text"} and isinstance(items["text"], list):
        labels, texts = items["label"], items["text"]
        if not isinstance(labels, list) or len(labels) != len(texts):
            raise ValueError(f"the choices have {len(texts)} texts, but not as many labels")
        lettered = all(isinstance(label, str) and label.strip("().: ").isalpha() for label in labels)
        return _lettered(dict(zip(labels, texts, strict=True))) if lettered else list(texts)
    ordered = {str(key).strip("().: ").upper(): item for key, item in items.items()}
    letters = sorted(key for key, item in ordered.items() if item is not None)
    if letters != [option_letter(index) for index in range(len(letters))]:
        raise ValueError(f"the choices must have the letters A, B, ..., not {shown(', '.join(letters))}")
    return [ordered[letter] for letter in letters]


def _labels(texts: Sequence[str]) -> list[str] | None:
    """The texts without their labels, if they have consecutive ones from A on."""
    plain = [without_label(text, index) for index, text in enumerate(texts)]
    return plain if all(bare != text for bare, text in zip(plain, texts, strict=True)) else None
