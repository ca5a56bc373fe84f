"""Frozen dataclasses to JSON rows and back, by the annotations of their fields."""

import sys
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

MERGED = {"row": ""}
"""Metadata of a field whose entries stand directly in the record's JSON row: `field(metadata=MERGED)`.

`field(metadata={"row": "id"})` gives a field another name in the row.
"""

T = TypeVar("T")
_WORDS = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}


def to_row(record: Any) -> dict[str, Any]:
    """Make the JSON row of a record: one entry a field, also where a field has its default."""
    row: dict[str, Any] = {}
    for each in fields(record):
        value, name = _plain(getattr(record, each.name)), _row_name(each)
        entries = {name: value} if name else value
        twice = sorted(row.keys() & entries.keys())
        if twice:
            raise ValueError(f"two fields of one row are named {', '.join(twice)}")
        row |= entries
    return row


def from_row(kind: type[T], row: Mapping[str, object]) -> T:
    """Make the record of a JSON row. Raises ValueError saying which field is missing, odd or unknown."""
    return _read_record(kind, row, lenient=False)


def from_row_or_none(kind: type[T], row: Mapping[str, object]) -> T | None:
    """Make the record of a JSON row, or None where it cannot be read; unknown fields are ignored."""
    try:
        return _read_record(kind, row, lenient=True)
    except ValueError:
        return None


def _row_name(each: "Field[Any]") -> str:
    """The field's name in the row; empty for a field whose entries are merged into it."""
    return str(each.metadata.get("row", each.name))


def _plain(value: Any) -> Any:
    """The value as JSON has it: records and mappings as objects, tuples as lists, bytes as Base64."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, bytes):
        return b64encode(value).decode("ascii")
    if isinstance(value, Enum):
        return value.value
    return to_row(value) if is_dataclass(value) else value


def _read_record(kind: type[T], row: Mapping[str, object], *, lenient: bool) -> T:
    left, values = dict(row), dict[str, Any]()
    every: tuple[Field[Any], ...] = fields(kind)  # type: ignore[arg-type]
    for each in sorted(every, key=lambda one: not _row_name(one)):  # what is merged takes from the rest
        name = _row_name(each)
        if not name:
            own = {_row_name(one) for one in fields(each.type)} if is_dataclass(each.type) else set(left)
            entry: Any = {key: left.pop(key) for key in own & left.keys()}
        elif name in left:
            entry = left.pop(name)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{name} is missing")
        else:
            continue
        values[each.name] = _read_value(each.type, entry, name, lenient=lenient)
    if left and not lenient:
        raise ValueError(f"unknown fields: {', '.join(left)}")
    return kind(**values)


def _read_value(kind: Any, value: Any, name: str, *, lenient: bool) -> Any:
    """The value as a field annotated with `kind` holds it. Raises ValueError naming the field."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _read_option(options, value, name, lenient=lenient)
    if origin is tuple and isinstance(value, list):
        kinds = options[:1] * len(value) if options[1:] == (...,) else options
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_read_value(k, entry, f"{name}[{i}]", lenient=lenient) for i, (k, entry) in pairs)
    elif origin is Mapping and isinstance(value, dict):
        return _read_mapping(options[1], value, name, lenient=lenient)
    elif is_dataclass(kind) and isinstance(value, dict):
        try:
            return _read_record(cast(type[Any], kind), value, lenient=lenient)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from error
    elif kind is float:
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:  # neither NaN nor infinite
            return float(value)
    elif kind is bytes and isinstance(value, str):
        return b64decode(value, validate=True)
    elif isinstance(kind, type) and issubclass(kind, Enum) and value in [each.value for each in kind]:
        return kind(value)
    elif kind is Any or type(value) is kind or (origin is Literal and value in options):
        return value
    shown = repr(value)
    raise ValueError(f"{name} must be {_wanted(kind)}, not {shown[:40]}{'...' if len(shown) > 40 else ''}")


def _read_option(options: tuple[Any, ...], value: Any, name: str, *, lenient: bool) -> Any:
    """The value as the first annotation of a union that takes it; a lone one beside None says why not."""
    if value is None and NoneType in options:
        return None
    real = [option for option in options if option is not NoneType]
    for option in real[:-1]:
        try:
            return _read_value(option, value, name, lenient=lenient)
        except ValueError:
            continue
    return _read_value(real[-1], value, name, lenient=lenient)


def _read_mapping(kind: Any, value: dict[str, Any], name: str, *, lenient: bool) -> dict[str, Any]:
    read = {}
    for key, entry in value.items():
        try:
            read[key] = _read_value(kind, entry, f"{name}.{key}".lstrip("."), lenient=lenient)
        except ValueError:
            if not lenient:
                raise
    return read


def _wanted(kind: Any) -> str:
    """What an annotation asks for, in words."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(each.value for each in kind)}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return _WORDS.get(kind) or ("a list" if get_origin(kind) is tuple else "an object")
