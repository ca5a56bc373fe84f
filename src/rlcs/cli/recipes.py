"""The commands of `rlcs recipes`: ls, show, copy, check, explain."""

import json as jsonlib
import re
from pathlib import Path
from typing import Annotated

import typer

from rlcs.cli import completion
from rlcs.cli.options import Overrides, RecipeName
from rlcs.cli.train import print_choices
from rlcs.errors import RecipeError

recipes_app = typer.Typer(help="List, show, copy, check and explain recipes.", no_args_is_help=True)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the recipes that come with rlcs."""
    from rlcs.recipe.loading import list_recipes

    known = list_recipes()
    for name, path in known.items():
        about = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{name:<{max(map(len, known))}}  {about}")


@recipes_app.command("show")
def recipes_show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Show every value of a recipe, with its source. Defaults included."""
    from rlcs.recipe.loading import dump, load_recipe

    resolved = load_recipe(recipe, overrides or [])
    typer.echo(dump(resolved.recipe))
    for key, source in sorted(resolved.provenance.items()):
        if source != "default":
            typer.echo(f"# {key}: {source}")


@recipes_app.command("copy")
def recipes_copy(
    recipe: Annotated[str, typer.Argument(help="A recipe that comes with rlcs")],
    to: Annotated[Path, typer.Argument(help="The new file")],
) -> None:
    """Copy a recipe to a new file. The recipe gets the file's name."""
    from rlcs.recipe.loading import list_recipes
    from rlcs.storage import atomic_write

    known = list_recipes()
    if recipe not in known:
        raise RecipeError(f"no recipe is called {recipe!r}", fix=f"there are: {', '.join(known)}")
    if to.exists():
        raise RecipeError("the file exists already", where=str(to), fix="choose another name")
    text = known[recipe].read_text(encoding="utf-8")
    atomic_write(to, re.sub(r"(?m)^name: .*$", lambda _: f"name: {jsonlib.dumps(to.stem)}", text, count=1))
    typer.echo(f"run it with: rlcs run {to}")


@recipes_app.command("check")
def recipes_check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Check a recipe and print its choices."""
    from rlcs.recipe.loading import load_recipe
    from rlcs.recipe.table import summary_rows

    resolved = load_recipe(recipe, overrides or []).recipe
    print_choices(resolved.name, Path(recipe), summary_rows(resolved))


@recipes_app.command("explain")
def recipes_explain(
    key: Annotated[
        str,
        typer.Argument(
            help="A key like grpo.clip_high, or a section; without one: all",
            autocompletion=completion.keys,
        ),
    ] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="All keys, as a page in Markdown")] = False,
) -> None:
    """Explain a key: meaning, unit, allowed values, default, and what the recipes that ship set."""
    from rlcs.recipe.explain import explain, reference_page

    if markdown:
        typer.echo(reference_page(), nl=False)
        return
    typer.echo("\n".join(explain(key)))
