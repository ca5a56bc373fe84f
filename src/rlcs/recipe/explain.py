"""Explains the keys of a recipe from the schema, in the terminal and as a page of the reference."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from rlcs.recipe.keys import allowed, recipe_keys, section_of
from rlcs.recipe.loading import list_recipes, load_recipe, shown, unknown_key
from rlcs.recipe.schema import Recipe
from rlcs.recipe.section import Section


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyFacts:
    """One key: its meaning with unit and source, its allowed values, its default as YAML writes it.

    `elsewhere` are the shipped recipes that set another value, by that value; those that extend them have it
    too.
    """

    key: str
    meaning: str
    allowed: str
    default: str
    elsewhere: Mapping[str, tuple[str, ...]]


def facts_of(keys: Iterable[str]) -> list[KeyFacts]:
    """The facts of keys, in their order; every shipped recipe is read once."""
    shipped = [load_recipe(name) for name in list_recipes()]
    fields, usual = recipe_keys(), Recipe()
    found = []
    for key in keys:
        value, elsewhere = attrgetter(key), dict[str, tuple[str, ...]]()
        for resolved in shipped:
            text, setter = shown(value(resolved.recipe)), Path(resolved.provenance[key]).stem
            known = elsewhere.get(text, ())
            if value(resolved.recipe) != value(usual) and key != "name" and setter not in known:
                elsewhere[text] = (*known, setter)
        field = fields[key]
        found.append(
            KeyFacts(
                key=key,
                meaning=_flat(field.description or ""),
                allowed=allowed(field),
                default=shown(value(usual)),
                elsewhere=elsewhere,
            )
        )
    return found


def explain(name: str) -> list[str]:
    """Lines about a key, or about all keys of a section. Raises RecipeError for a name that is neither."""
    sections = dict(_sections())
    if name in recipe_keys():
        [facts] = facts_of([name])
        rows = [("default", facts.default), ("allowed", facts.allowed)]
        rows += [(" and ".join(recipes), value) for value, recipes in facts.elsewhere.items()]
        width = max(len(label) for label, _ in rows)
        return [f"{name}: {facts.meaning}", *(f"  {label:<{width}}  {value}" for label, value in rows)]
    if name not in sections:
        raise unknown_key(name, "rlcs recipes explain")
    listed = {key: _first_sentence(field.description or "") for key, field in recipe_keys().items()}
    inside = {key: meaning for key, meaning in listed.items() if key.startswith(f"{name}." if name else "")}
    width = max(map(len, inside))
    head = [f"{name}: {_flat(sections[name].__doc__ or '')}"] if name else []
    return [*head, *(f"  {key:<{width}}  {meaning}" for key, meaning in inside.items())]


def reference_page() -> str:
    """The page docs/reference/recipe-keys.md: every key of every section."""
    facts = {each.key: each for each in facts_of(recipe_keys())}
    lines = [
        "# Every key of a recipe",
        "",
        "Written from the schema by `rlcs recipes explain --markdown`; one key: `rlcs recipes explain KEY`.",
        "A recipe has these keys and no others. The last column names the shipped recipes that set another",
        "value; those that extend them have it too.",
    ]
    for name, section in _sections():
        own = [key for key in facts if key.rpartition(".")[0] == name]
        if not own:
            continue
        lines += ["", f"## {name or 'The recipe itself'}", "", _flat(section.__doc__ or ""), ""]
        lines += ["| key | meaning | allowed | default | other recipes |", "|---|---|---|---|---|"]
        lines += [_table_row(facts[key]) for key in own]
    return "\n".join(lines) + "\n"


def _table_row(facts: KeyFacts) -> str:
    others = "; ".join(f"`{value}`: {', '.join(names)}" for value, names in facts.elsewhere.items())
    cells = (f"`{facts.key}`", facts.meaning, facts.allowed, f"`{facts.default}`", others)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _sections(section: type[Section] = Recipe, name: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Every section with its dotted name, the recipe itself first under an empty one."""
    yield name, section
    for key, field in section.model_fields.items():
        if (inner := section_of(field)) is not None:
            yield from _sections(inner, f"{name}.{key}".lstrip("."))


def _flat(text: str) -> str:
    return " ".join(text.split())


def _first_sentence(text: str) -> str:
    head, dot, _ = _flat(text).partition(". ")
    return head + dot.strip()
