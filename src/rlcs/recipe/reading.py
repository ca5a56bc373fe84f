"""Reads and writes the YAML 1.2 of recipes: text, numbers, lists and mappings, with the line of every key.

No other objects are built, so a recipe cannot run code. Aliases and tags are refused: recipes share values
by `extends`, and text that looks like a number is quoted.
"""

import io
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from ruamel.yaml import YAML, MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

from rlcs.errors import RecipeError

_MAX_DIGITS = 300
"""Most digits of an integer: a float holds no larger number, and Python reads and prints at most 4,300."""
_TAG = "tag:yaml.org,2002:"
_CONVERTED = tuple(f"{_TAG}{kind}" for kind in ("int", "float", "bool", "null"))
_POINT_FIRST = re.compile(r"[-+]?\.\d+[eE][-+]?\d+")
"""`.5e-5`, a number in YAML 1.2 that ruamel.yaml takes for text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """A value (dict, list, text, number, bool, None), and the line of every mapping key in it."""

    value: Any  # nested data of any of these types, which a precise type would make every reader cast
    where: str
    """The source in messages: a file, or the command line."""
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict)

    def place(self, path: tuple[str, ...]) -> str:
        """The source with the line of a key, where the line is known."""
        return f"{self.where}:{self.lines[path]}" if path in self.lines else self.where


def parse(text: str, *, where: str) -> Parsed:
    """Read one YAML document. Raises RecipeError with the line of the error."""
    parsed = _parsed(text, where)
    return replace(parsed, value=deepcopy(parsed.value))


@lru_cache(maxsize=32)  # a command reads the same few recipes several times, which takes as long as a step
def _parsed(text: str, where: str) -> Parsed:
    builder = _Builder(_yaml(), where)
    try:
        node = builder.yaml.compose(text)
        value = builder.build(node, ()) if node else None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(
            f"this is not valid YAML ({error.problem or error.context})",
            where=where + line,
            fix="check indentation, brackets and quotes on this line and the one before",
        ) from None
    except ReaderError as error:
        raise RecipeError(
            f"character number {error.position + 1} (U+{error.character:04X}) cannot stand in YAML",
            where=where,
            fix="delete it, or write it as an escape in double quotes",
        ) from None
    except RecursionError:
        what, fix = "its brackets or sections are nested too deeply", "a recipe has a few levels at most"
        raise RecipeError(what, where=where, fix=fix) from None
    return Parsed(value=value, where=where, lines=builder.lines)


def write(value: object) -> str:
    """YAML that `parse` reads back as the same value; mappings keep their order."""
    stream = io.StringIO()
    _yaml().dump(value, stream)
    return stream.getvalue()


class _Representer(SafeRepresenter):
    def ignore_aliases(self, data: object) -> bool:
        """Repeat equal values instead of writing aliases."""
        return True

    def represent_str(self, data: str) -> ScalarNode:
        """Write unprintable characters as escapes, which only double quotes allow."""
        return self.represent_scalar(f"{_TAG}str", data, style=None if data.isprintable() else '"')


_Representer.add_representer(str, _Representer.represent_str)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None there
    yaml.width = 110
    assert yaml.resolver.versioned_resolver, "reading this fills the rules to which one more is added"
    yaml.resolver.add_version_implicit_resolver((1, 2), f"{_TAG}float", _POINT_FIRST, ["-", "+", "."])
    return yaml


class _Builder:
    """Turns nodes to values; `seen` finds aliases, also of a node that contains itself."""

    def __init__(self, yaml: YAML, where: str) -> None:
        self.yaml = yaml
        self.where = where
        self.lines: dict[tuple[str, ...], int] = {}
        self.seen: set[int] = set()

    def refuse(self, node: Node, what: str, fix: str) -> RecipeError:
        return RecipeError(what, where=f"{self.where}:{node.start_mark.line + 1}", fix=fix)

    def build(self, node: Node, path: tuple[str, ...]) -> object:
        if id(node) in self.seen:
            what = "an alias (*name) cannot be used in a recipe"
            raise self.refuse(node, what, "write the value out again")
        self.seen.add(id(node))
        plain = isinstance(node, ScalarNode) and not node.style
        if node.tag != self.yaml.resolver.resolve(type(node), node.value, (plain, not plain)):
            raise self.refuse(node, f"a tag ({node.tag}) cannot be used in a recipe", "leave the tag out")
        if isinstance(node, MappingNode):
            return self.mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self.build(item, path) for item in node.value]
        if node.tag not in _CONVERTED:
            return node.value
        if node.tag == f"{_TAG}int" and len(node.value) > _MAX_DIGITS:
            what = f"a number of {len(node.value):,} digits cannot be used in a recipe"
            raise self.refuse(node, what, "write fewer digits, or put it in quotes if it is text")
        return self.yaml.constructor.construct_object(node)

    def mapping(self, node: MappingNode, path: tuple[str, ...]) -> dict[str, object]:
        built: dict[str, object] = {}
        for key, item in node.value:
            if not isinstance(key, ScalarNode):
                raise self.refuse(key, "a key must be a word", "quote the key, or check the brackets")
            here = (*path, key.value)
            if key.value in built:
                first = self.lines[here]
                raise self.refuse(key, f"{'.'.join(here)} is given twice, first on line {first}", "keep one")
            self.lines[here] = key.start_mark.line + 1
            built[key.value] = self.build(item, here)
        return built
