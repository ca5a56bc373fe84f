"""Resolves YAML files, `extends` and `key=value` overrides to one checked recipe; writes recipes as YAML.

Later sources win: defaults, then the files of an `extends` chain from its root, then the command
line. Sections merge key by key; a list replaces a list. Relative data paths, in a file as on the
command line, are relative to the current folder (a recipe can be used from anywhere); only
`extends` is relative to its file. Every error is a `RecipeError` with file, line and key.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlcs.errors import RecipeError
from rlcs.recipe.keys import allowed, nearest, options, recipe_keys, section_of, takes_text
from rlcs.recipe.reading import Parsed, parse, write
from rlcs.recipe.schema import Recipe
from rlcs.recipe.section import Section

S = TypeVar("S", bound=Section)
COMMAND_LINE = "command line"
DEFAULT = "default"
LARGEST_FILE = 1 << 18
"""Most bytes of a recipe file."""
_SHIPPED = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A recipe, and for each dotted key where its value came from: `default`, a file, `command line`."""

    recipe: Recipe
    provenance: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setting:
    """One value of a source; `where` is the source with its line."""

    value: object
    source: str
    where: str


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Resolved:
    """Resolve a recipe (a shipped name, or a path to a YAML file) with `key=value` overrides."""
    settings: dict[str, _Setting] = {}
    for source in (*_chain(name_or_path), *map(_override, overrides)):
        settings |= _settings(source, source.value, Recipe)
    provenance = {key: settings[key].source if key in settings else DEFAULT for key in recipe_keys()}
    return Resolved(recipe=_validated(settings), provenance=provenance)


def read_section(kind: type[S], words: Sequence[str], *, where: str) -> S:
    """Make one section of the `key=value` words of the option `where`, checked like that of a recipe."""
    values: dict[str, object] = {}
    for word in words:
        key, _, text = word.partition("=")
        field = kind.model_fields.get(key)
        if field is None:
            near = difflib.get_close_matches(key, kind.model_fields, n=1)
            fix = (f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(kind.model_fields)}"
            raise RecipeError(f"unknown key {key}", where=f"{where} {word}", fix=fix)
        values[key] = text if takes_text(field) else _frozen(parse(text, where=where).value)
    try:
        return kind.model_validate(values, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    if not key:  # the values do not go together
        raise RecipeError(first["msg"].removeprefix("Value error, "), where=where, fix="change one of them")
    field = kind.model_fields[key]
    what = f"{key} should be {allowed(field)} (got {shown(values[key])})"
    raise RecipeError(what, where=where, fix=f"write {key}={_example(field, values[key])}")


def list_recipes() -> dict[str, Path]:
    """The shipped recipes: name -> file."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default; loading it gives the same recipe."""
    return write(recipe.model_dump())


def changed(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with `key=value` overrides. Raises RecipeError."""
    settings = {
        key: _Setting(value=attrgetter(key)(recipe), source=recipe.name, where=recipe.name)
        for key in recipe_keys()
    }
    for source in map(_override, overrides):
        settings |= _settings(source, source.value, Recipe)
    return _validated(settings)


def differences(a: Recipe, b: Recipe) -> list[tuple[str, object, object]]:
    """The keys whose values differ between two recipes, each with both values."""
    pairs = ((key, attrgetter(key)(a), attrgetter(key)(b)) for key in recipe_keys())
    return [(key, one, other) for key, one, other in pairs if one != other]


# --- sources: files and the command line ----------------------------------------------------------


def _chain(name_or_path: str) -> list[Parsed]:
    """The files of an `extends` chain, root first."""
    path, label = _locate(name_or_path, folder=Path(), where="")
    chain, seen = [_read(path, label)], [path.resolve()]
    while "extends" in chain[-1].value:
        if not isinstance(base := chain[-1].value.pop("extends"), str):
            raise RecipeError(
                f"extends should be one name or path (got {shown(base)})",
                where=chain[-1].place(("extends",)),
                fix="extends: quickstart",
            )
        path, label = _locate(base, folder=path.parent, where=label)
        if path.resolve() in seen:
            circle = [source.where for source in chain[seen.index(path.resolve()) :]]
            raise RecipeError(
                f"extends goes in a circle: {' -> '.join([*circle, label])}",
                where=label,
                fix="take extends out of one of them",
            )
        chain.append(_read(path, label))
        seen.append(path.resolve())
    return chain[::-1]


def _locate(name_or_path: str, *, folder: Path, where: str) -> tuple[Path, str]:
    """The file of a shipped name or a path, and its label in messages; `where` is the place that names it."""
    shipped = list_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path], f"recipes/{name_or_path}.yaml"
    path = folder / name_or_path
    if path.is_file():
        return path, str(path)
    near = difflib.get_close_matches(name_or_path, shipped, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    is_path = name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path
    raise RecipeError(
        f"there is no recipe file {path}" if is_path else f"there is no recipe called {name_or_path!r}",
        where=where,
        fix=f"{guess}give a path to a .yaml file or a shipped name: {', '.join(shipped)}",
    )


def _read(path: Path, label: str) -> Parsed:
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            what = f"a recipe has at most {LARGEST_FILE:,} bytes (this one: {size:,})"
            raise RecipeError(what, where=label, fix="is it a data file? name it as data.problems")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError("the file is not UTF-8 text", where=label, fix="save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"the file cannot be read ({error.strerror})", where=label) from None
    parsed = parse(text, where=label)
    if parsed.value is None:
        return Parsed(value={}, where=label)
    if not isinstance(parsed.value, dict):
        raise RecipeError("a recipe is `key: value` lines", where=label, fix="rlcs recipes show quickstart")
    return parsed


def _override(text: str) -> Parsed:
    """Read one `key=value`; free text needs no quotes, and a section may be `{kind: k3, ...}`."""
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not (key and equals):
        fix = "write for example grpo.steps=60"
        raise RecipeError(f"{text!r} is not key=value", where=COMMAND_LINE, fix=fix)
    if not raw:
        raise RecipeError(f"{key} has no value", where=COMMAND_LINE, fix=f"{key}=null means none")
    field = recipe_keys().get(key)
    free_text = field is not None and takes_text(field) and raw not in ("null", "~") and raw[0] not in "\"'"
    value = raw if free_text else parse(raw, where=COMMAND_LINE).value
    for name in reversed(key.split(".")):
        value = {name: value}
    return Parsed(value=value, where=COMMAND_LINE)


def unknown_key(key: str, where: str) -> RecipeError:
    """The error for a key that is not in the schema, with those that resemble it."""
    listed = "`rlcs recipes explain` lists every key"
    fix = f"did you mean {' or '.join(found)}?" if (found := nearest(key)) else listed
    return RecipeError(f"unknown key {key}", where=where, fix=fix)


def _settings(
    source: Parsed, values: Mapping[str, object], section: type[Section], path: tuple[str, ...] = ()
) -> dict[str, _Setting]:
    """The values of one source by dotted key. Raises RecipeError for keys that are not in the schema."""
    settings: dict[str, _Setting] = {}
    for name, value in values.items():
        here = (*path, name)
        key, where, field = ".".join(here), source.place(here), section.model_fields.get(name)
        if field is None:
            raise unknown_key(key, where)
        inner = section_of(field)
        if inner is None:
            settings[key] = _Setting(value=_frozen(value), source=source.where, where=where)
        elif isinstance(value, dict):
            settings |= _settings(source, value, inner, here)
        else:
            raise RecipeError(
                f"{key} is a section with keys of its own (got {shown(value)})",
                where=where,
                fix=f"set {', '.join(f'{key}.{name}' for name in list(inner.model_fields)[:3])} ...",
            )
    return settings


def _frozen(value: object) -> object:
    """The value with tuples for lists, which the strict schema requires."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


# --- checks ---------------------------------------------------------------------------------------


def _validated(settings: Mapping[str, _Setting]) -> Recipe:
    """Check the settings, with defaults for all other keys.

    The defaults are those of a whole recipe: `grpo.optimizer` and `sft.optimizer` have different ones, and
    a section that is built from its given keys alone would take those of its class.
    """
    nested = Recipe().model_dump()
    for key, setting in settings.items():
        *sections, leaf = key.split(".")
        target: dict[str, Any] = nested
        for name in sections:
            target = target[name]
        target[leaf] = setting.value
    try:
        return Recipe.model_validate(nested, strict=True)
    except ValidationError as error:
        problems = {_key(item["loc"], settings): item["msg"] for item in error.errors(include_url=False)}
    lines = [_complaint(key, message, settings) for key, message in problems.items()]
    if len(lines) == 1:
        [key], [(where, what)] = problems, lines
        raise RecipeError(what, where=where, fix=_fix(key, where, settings))
    listing = "".join(f"\n  {where}: {what}" for where, what in lines)
    fix = "correct each of them; `rlcs recipes explain KEY` says what a key may be"
    raise RecipeError(f"{len(lines)} values cannot be used{listing}", fix=fix)


def _key(location: Sequence[int | str], settings: Mapping[str, _Setting]) -> str:
    """The dotted key of an error, without positions inside a value."""
    names = [str(part) for part in location]
    prefixes = (".".join(names[:length]) for length in range(len(names)))
    return next((key for key in prefixes if key in settings), ".".join(names))


def _complaint(key: str, message: str, settings: Mapping[str, _Setting]) -> tuple[str, str]:
    """The place and the text of an error; `key` is a value's, or a section's that checks several values.

    It is empty for the whole recipe, which checks values of several sections.
    """
    if key in settings:
        own = message.startswith("Value error, ")
        wanted = message.removeprefix("Value error, ") if own else f"should be {allowed(recipe_keys()[key])}"
        return settings[key].where, f"{key} {wanted} (got {shown(settings[key].value)})"
    prefix, text = f"{key}." if key else "", message.removeprefix("Value error, ")
    inside = [setting.where for name, setting in settings.items() if name.startswith(prefix)]
    return inside[-1], f"{key}: {text}" if key else text


def _fix(key: str, where: str, settings: Mapping[str, _Setting]) -> str:
    """What to write instead of the value of `key`; a key without one is a section whose values disagree."""
    if key not in settings:
        about = f"; `rlcs recipes explain {key}` says what they mean" if key else ""
        return f"change one of the values that it names{about}"
    example = _example(recipe_keys()[key], settings[key].value)
    there = f"`{key.rpartition('.')[2]}: {example}` there, or "
    written = ("" if where == COMMAND_LINE else there) + f"{key}={example}"
    return f"write for example {written}; `rlcs recipes explain {key}` says what it means"


def _example(field: FieldInfo, wrong: object) -> str:
    """A value that a key may have: the option nearest to the wrong one, or else the default."""
    near = difflib.get_close_matches(str(wrong), options(field), n=1)
    return near[0] if near else shown(field.default)


def shown(value: object) -> str:
    """A value as JSON, and so as YAML."""
    return json.dumps(value, ensure_ascii=False, default=str)
