"""The recipe's dotted keys (`grpo.kl.kind`): the list, allowed values in words, suggestions for typos."""

import difflib
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import JsonValue
from pydantic.fields import FieldInfo

from rlcs.recipe.schema import Recipe
from rlcs.recipe.section import Section

_NAMES: Mapping[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    JsonValue: "any value",
}
_BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or None where it holds a value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def recipe_keys(section: type[Section] = Recipe, prefix: str = "") -> dict[str, FieldInfo]:
    """Every key that holds a value, in the order of the schema."""
    keys: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        inner = section_of(field)
        keys |= recipe_keys(inner, f"{prefix}{name}.") if inner else {f"{prefix}{name}": field}
    return keys


def allowed(field: FieldInfo) -> str:
    """The allowed values of a key in words: `a number at least 0`, `one of token, example`."""
    return _words(field.annotation, field.metadata)


def takes_text(field: FieldInfo) -> bool:
    """Whether the value of this key is free text; a list of texts, or a mapping of them, is not."""
    kind = field.annotation
    return kind is str or (get_origin(kind) in (Union, types.UnionType) and str in get_args(kind))


def options(field: FieldInfo) -> list[str]:
    """The words among which the value of a key is chosen; empty where it is no choice."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return [str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]


def nearest(unknown: str) -> list[str]:
    """Up to three keys or sections that resemble a mistyped one most; empty when none does.

    The last word counts most, so that a right name in the wrong section (`grpo.lr` for `grpo.optimizer.lr`)
    is found; of equally similar names all are given.
    """
    section, _, word = unknown.rpartition(".")
    keys = list(recipe_keys())
    scores: dict[str, float] = {}
    for name in (*keys, *dict.fromkeys(key.rpartition(".")[0] for key in keys)):
        its_section, _, its_word = name.rpartition(".")
        near = _likeness(section, its_section) if section else 0.0
        begun = near == 1 and its_word.startswith(word)
        likeness = 0.9 if begun else _likeness(word, its_word)
        if likeness >= (0.6 if near == 1 else 0.8):
            scores[name] = likeness + 0.5 * near
    best = max(scores.values(), default=0.0)
    return [name for name, score in scores.items() if score > best - 0.01][:3]


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _words(annotation: object, metadata: Sequence[object]) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [bound for item in parts[1:] for bound in getattr(item, "metadata", [item])]
        return _words(parts[0], inner)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part, metadata) for part in parts)
    if origin is tuple:
        length = "" if Ellipsis in parts else f" of {len(parts)}"
        return f"a list{length}, each item {_words(parts[0], ())}"
    if origin is Mapping:
        return f"a mapping {{{_words(parts[0], ())}: {_words(parts[1], ())}}}"
    bounds = [
        f"{words} {getattr(item, name):,}"
        for item in metadata
        for name, words in _BOUNDS
        if hasattr(item, name)
    ]
    return _NAMES[annotation] + (f" {' and '.join(bounds)}" if bounds else "")
