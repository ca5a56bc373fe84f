"""Converts frozen dataclasses to JSON rows and back, by the annotations of their fields."""

import sys
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin

MERGED = {"row": ""}
"""Metadata of a field whose entries are merged into the record's JSON row: `field(metadata=MERGED)`.

`field(metadata={"row": "id"})` gives a field another name in the row.
"""

T = TypeVar("T")
_DESCRIPTIONS = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}


def to_row(record: Any) -> dict[str, Any]:
    """Make the JSON row of a record: one entry for each field, defaults included."""
    row: dict[str, Any] = {}
    for attribute in fields(record):
        value, name = _plain(getattr(record, attribute.name)), _row_name(attribute)
        entries = {name: value} if name else value
        twice = sorted(row.keys() & entries.keys())
        if twice:
            raise ValueError(f"two fields of one row are named {', '.join(twice)}")
        row |= entries
    return row


def from_row(kind: type[T], row: Mapping[str, object]) -> T:
    """Make the record of a JSON row. Raises ValueError naming a missing, wrong or unknown field."""
    return _read_record(kind, row, lenient=False)


def from_row_or_none(kind: type[T], row: Mapping[str, object]) -> T | None:
    """Make the record of a JSON row, or None where it cannot be read; unknown fields are ignored."""
    try:
        return _read_record(kind, row, lenient=True)
    except ValueError:
        return None


def _row_name(attribute: "Field[Any]") -> str:
    """The field's name in the row; empty for a field whose entries are merged into it."""
    return str(attribute.metadata.get("row", attribute.name))


def _plain(value: Any) -> Any:
    """Convert a value to JSON types: records and mappings to objects, tuples to lists, bytes to Base64."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, bytes):
        return b64encode(value).decode("ascii")
    if isinstance(value, Enum):
        return value.value
    return to_row(value) if is_dataclass(value) else value


class _Attribute(NamedTuple):
    """What reading a row needs to know of a field; `merges`: names that a merged record takes of the row."""

    name: str
    row_name: str
    type: Any
    required: bool
    merges: frozenset[str] | None


@cache
def _attributes(kind: type) -> tuple[_Attribute, ...]:
    """The fields of a record, merged ones last: they take what the others leave."""
    found = []
    for field in fields(kind):
        merges = None
        if is_dataclass(field.type):
            merges = frozenset(_row_name(inner) for inner in fields(field.type))
        required = field.default is MISSING and field.default_factory is MISSING
        found.append(_Attribute(field.name, _row_name(field), field.type, required, merges))
    return tuple(sorted(found, key=lambda attribute: not attribute.row_name))


def _read_record(kind: type[T], row: Mapping[str, object], *, lenient: bool) -> T:
    left, values = dict(row), dict[str, Any]()
    for attribute in _attributes(cast(Any, kind)):
        name = attribute.row_name
        if not name:
            merged = left.keys() if attribute.merges is None else attribute.merges & left.keys()
            entry: Any = {key: left.pop(key) for key in list(merged)}
        elif name in left:
            entry = left.pop(name)
        elif attribute.required:
            raise ValueError(f"{name} is missing")
        else:
            continue
        values[attribute.name] = _read_value(attribute.type, entry, name, lenient=lenient)
    if left and not lenient:
        raise ValueError(f"unknown fields: {', '.join(left)}")
    return kind(**values)


def _read_value(kind: Any, value: Any, name: str, *, lenient: bool) -> Any:
    """Convert a JSON value to the type `kind` of a field. Raises ValueError naming the field."""
    if kind is Any or (type(value) is kind and kind is not float):
        return value
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
    elif origin is Literal and value in options:
        return value
    shown = repr(value)
    raise ValueError(f"{name} must be {_wanted(kind)}, not {shown[:40]}{'...' if len(shown) > 40 else ''}")


def _read_option(options: tuple[Any, ...], value: Any, name: str, *, lenient: bool) -> Any:
    """Convert a JSON value to the first type of a union that accepts it; the last one raises the error."""
    if value is None and NoneType in options:
        return None
    *others, last = (option for option in options if option is not NoneType)
    for option in others:
        try:
            return _read_value(option, value, name, lenient=lenient)
        except ValueError:
            continue
    return _read_value(last, value, name, lenient=lenient)


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
    """Describe the values that an annotation accepts."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(each.value for each in kind)}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return _DESCRIPTIONS.get(kind) or ("a list" if get_origin(kind) is tuple else "an object")
