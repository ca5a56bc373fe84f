"""YAML as a recipe means it: plain values, no duplicate keys, and the line of every value.

PyYAML follows YAML 1.1, where `1e-5` is text, `12:30` is 750, `no` is false and `010` is 8. Here
plain scalars follow YAML 1.2's core schema instead: numbers (also `1_204_224`), true and false,
null; everything else is text. Nothing but text, lists and mappings is ever built, so a recipe
cannot run code. Aliases and tags are refused: recipes share values by `extends`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from rlcs.errors import RecipeError

_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LONGEST = 300
"""Digits of an integer: more would be no float, and Python itself reads and prints 4,300 at most."""
_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))
_WORDS: Mapping[str, object] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    ".inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """A value (dict, list, text, number, bool, None) and the line of every mapping key in it."""

    value: object
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict)


def scalar(text: str) -> object:
    """What an unquoted word means."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) and len(text) <= _LONGEST:
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    return text


def parse(text: str, *, where: str) -> Parsed:
    """Read one YAML document; any flaw is a `RecipeError` that names its line."""
    lines: dict[tuple[str, ...], int] = {}
    try:
        node = yaml.compose(text, yaml.BaseLoader)
        value = _build(node, _Walk(where=where, lines=lines), ()) if node else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(
            f"this is not valid YAML ({error.problem or error.context})",
            where=where + line,
            fix="check indentation, brackets and quotes on this line and the one before",
        ) from None
    except yaml.reader.ReaderError as error:
        raise RecipeError(
            f"character number {error.position + 1} (U+{error.character:04X}) cannot stand in YAML",
            where=where,
            fix="delete it, or write it as an escape in double quotes",
        ) from None
    except RecursionError:
        what, fix = "its brackets or sections are nested too deeply", "a recipe has a few levels at most"
        raise RecipeError(what, where=where, fix=fix) from None
    return Parsed(value=value, lines=lines)


def write(value: object) -> str:
    """YAML that `parse` reads back as the same value; mappings keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


@dataclass(frozen=True, slots=True)
class _Walk:
    where: str
    lines: dict[tuple[str, ...], int]
    seen: set[int] = field(default_factory=set)

    def refuse(self, node: yaml.Node, what: str, fix: str) -> RecipeError:
        return RecipeError(what, where=f"{self.where}:{node.start_mark.line + 1}", fix=fix)


def _build(node: yaml.Node, walk: _Walk, path: tuple[str, ...]) -> object:
    if id(node) in walk.seen:  # also what keeps a self-containing alias from recursing for ever
        raise walk.refuse(node, "an alias (*name) cannot be used in a recipe", "write the value out again")
    walk.seen.add(id(node))
    if node.tag not in _TAGS:
        raise walk.refuse(node, f"a tag ({node.tag}) cannot be used in a recipe", "leave the tag out")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, walk, path)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, walk, path) for item in node.value]
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    if not quoted and len(node.value) > _LONGEST and _INT.fullmatch(node.value):
        what = f"a number of {len(node.value):,} digits cannot be used in a recipe"
        raise walk.refuse(node, what, "write fewer digits, or put it in quotes if it is text")
    return node.value if quoted else scalar(node.value)


def _mapping(node: yaml.MappingNode, walk: _Walk, path: tuple[str, ...]) -> dict[str, object]:
    built: dict[str, object] = {}
    for key, item in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise walk.refuse(key, "a key must be a word", "quote the key, or check the brackets")
        here = (*path, key.value)
        if key.value in built:
            first = walk.lines[here]
            raise walk.refuse(key, f"{'.'.join(here)} is given twice, first on line {first}", "keep one")
        walk.lines[here] = key.start_mark.line + 1
        built[key.value] = _build(item, walk, here)
    return built


class _Dumper(yaml.SafeDumper):
    """Quotes all text that `scalar` would not read back as text."""

    def ignore_aliases(self, data: object) -> bool:
        """Write equal values out again instead of referring to the first."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = scalar(text) is text and text.isprintable()  # PyYAML folds U+0085 away in other quotes
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)
