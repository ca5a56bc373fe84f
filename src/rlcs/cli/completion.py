"""Words that the shell offers after Tab: recipes, keys, benchmarks, models and runs."""

from collections.abc import Callable, Iterable
from pathlib import Path

_MOST = 200
"""Entries of a folder that are looked at: Tab must answer at once."""


def recipes(incomplete: str) -> list[str]:
    """Shipped recipes, and recipe files of the folder that is being typed."""
    from rlcs.recipe.loading import list_recipes

    files = _paths(incomplete, lambda path: path.suffix in (".yaml", ".yml"))
    return _begun([*list_recipes(), *files], incomplete)


def overrides(incomplete: str) -> list[str]:
    """`KEY=` for every key of a recipe; after the `=`, the words among which a value is chosen."""
    from rlcs.recipe.keys import options, recipe_keys

    keys = recipe_keys()
    key, equals, _ = incomplete.partition("=")
    if not equals:
        return _begun([f"{name}=" for name in keys], incomplete)
    return _begun([f"{key}={word}" for word in options(keys[key])] if key in keys else [], incomplete)


def keys(incomplete: str) -> list[str]:
    """Every key of a recipe."""
    from rlcs.recipe.keys import recipe_keys

    return _begun(recipe_keys(), incomplete)


def benchmarks(incomplete: str) -> list[str]:
    """Names of benchmarks, with those that were typed before the last comma."""
    from rlcs.evals.benchmarks import list_benchmarks

    typed, comma, last = incomplete.rpartition(",")
    return [f"{typed}{comma}{name}" for name in _begun(list_benchmarks(), last)]


def runs(incomplete: str) -> list[str]:
    """Run folders below the folder that is being typed; before one is, those of `runs/` too."""
    typed = [incomplete] if "/" in incomplete else [incomplete, "runs/"]
    found = [path for begun in typed for path in _paths(begun, _is_run)]
    return _begun(found, incomplete)


def models(incomplete: str) -> list[str]:
    """Run folders, model folders, and the built-in models."""
    from rlcs.model.source import BUILTIN

    folders = _paths(incomplete, lambda path: (path / "config.json").is_file())
    return _begun([*BUILTIN, *runs(incomplete), *folders], incomplete)


def _is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file()


def _paths(begun: str, wanted: Callable[[Path], bool]) -> list[str]:
    """Wanted entries of the folder of the typed path, and its other folders, which may hold more."""
    head, slash, _ = begun.rpartition("/")
    from rlcs.storage import at_home

    folder = at_home(head + slash) if slash else Path()
    if not folder.is_dir():
        return []
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")][:_MOST]
    found = [f"{head}{slash}{path.name}" for path in entries if wanted(path)]
    further = [f"{head}{slash}{path.name}/" for path in entries if path.is_dir() and not wanted(path)]
    return found + further


def _begun(words: Iterable[str], incomplete: str) -> list[str]:
    return list(dict.fromkeys(word for word in words if word.startswith(incomplete)))
