"""The commands of `rlcs data`: check, export, push, overlap."""

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlcs.cli.options import DryRun, ExportedFolder, Json, Overrides, Private, Repository
from rlcs.cli.output import print_result
from rlcs.errors import RecipeError, UserError

if TYPE_CHECKING:
    from rlcs.data.sources import Role
    from rlcs.recipe.schema import Data

data_app = typer.Typer(help="Check, compare and exchange data sets.", no_args_is_help=True)


@data_app.command("check")
def data_check(
    source: Annotated[str, typer.Argument(help="A data file, a folder, a hub id, or builtin:NAME")],
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option("--recipe", help="Source of columns and limits")] = "quickstart",
    role: Annotated[str, typer.Option("--role", help="rl, test or cold_start")] = "rl",
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Also make every prompt, with the recipe's model and limit")
    ] = False,
    json: Json = False,
) -> None:
    """Name unusable rows with the reasons, and count the kinds of gold answers. Decodes every image."""
    from rlcs.data.check import grouped, kind_lines, kinds_of_golds, option_notes, unmatchable
    from rlcs.data.loading import load
    from rlcs.recipe.loading import load_recipe

    roles: tuple[Role, ...] = ("rl", "test", "cold_start")
    chosen = next((known for known in roles if known == role), None)
    if chosen is None:
        raise RecipeError(f"unknown role {role!r}", where="--role", fix="use rl, test or cold_start")
    resolved = load_recipe(recipe, overrides or []).recipe
    limit = resolved.images.decode_limit
    loaded = load(source, resolved.data, decode_limit=limit, role=chosen, decode=True)
    unusable = list(loaded.bad)
    if resolved.data.answers == "unwrapped":
        unusable += unmatchable(loaded.rows)
    if prompts:
        from rlcs.model.loading import load_chat
        from rlcs.report.preview import no_prompts

        unusable += no_prompts(loaded.rows, load_chat(resolved.model, resolved.prompt, resolved.images))
    usable = len(loaded.rows) + len(loaded.bad) - len(unusable)
    unusable_ids = {bad.id for bad in unusable}
    kinds = kinds_of_golds(row.problem for row in loaded.rows if row.problem.id not in unusable_ids)
    notes = [*loaded.notes, *option_notes(row.problem for row in loaded.rows)]
    facts = {
        "usable": usable,
        "bad": [{"where": bad.where, "id": bad.id, "reason": bad.reason} for bad in unusable],
        "notes": notes,
        "golds": {
            kind: {"rows": len(same), "id": same[0].id, "answer": same[0].answer}
            for kind, same in kinds.items()
        },
    }
    counts = f"{usable:,} rows can be used, {len(unusable):,} cannot"
    table = kind_lines(kinds, columns=get_terminal_size().columns)
    print_result(facts, [*grouped(unusable), *table, *notes, counts], json=json)
    if unusable or not usable:
        raise typer.Exit(2)


@data_app.command("export")
def data_export(
    source: Annotated[str, typer.Argument(help="kept.jsonl, or any other data source")],
    to: Annotated[Path, typer.Argument(help="The new folder")],
    layout: Annotated[str, typer.Option(help="published, ms-swift or llama-factory")] = "published",
) -> None:
    """Write data in the layout of other tools, with a card. Parquet with images, ms-swift, LLaMA-Factory."""
    from rlcs.data.exchange import LAYOUTS, export
    from rlcs.data.sources import suggest
    from rlcs.recipe.schema import Data

    chosen = next((each for each in LAYOUTS if each == layout), None)
    if chosen is None:
        raise UserError(f"no layout {layout!r}", where="--layout", fix=suggest(layout, LAYOUTS))
    rows = _rows(source, Data())
    for path in export(rows, to, layout=chosen, source=source):
        if path.parent.name != "images":
            typer.echo(path)
    typer.echo(f"{len(rows):,} rows")


@data_app.command("push")
def data_push(
    folder: ExportedFolder, repo: Repository, private: Private = True, dry_run: DryRun = False
) -> None:
    """Upload an exported folder to the hub as a (private) data set."""
    from rlcs.publish import hub

    entries = hub.listing(folder)
    if dry_run:
        typer.echo("\n".join(hub.lines(entries, repo)))
        return
    typer.echo(hub.push(folder, repo, entries, kind="dataset", private=private))


@data_app.command("overlap")
def data_overlap(
    first: Annotated[str, typer.Argument(help="A data source")],
    second: Annotated[str, typer.Argument(help="Another, or benchmark:NAME")],
    data: Annotated[Path | None, typer.Option(help="Folder with the benchmark's official files")] = None,
    json: Json = False,
) -> None:
    """Find problems and images that two sets share. Exact ones, and images that look alike."""
    from rlcs.data.overlap import KINDS, find_overlaps

    found = find_overlaps(_problems(first, data), _problems(second, data))
    if json:
        for each in found:
            typer.echo(jsonlib.dumps(asdict(each)))
        return
    for kind in KINDS:
        pairs = [each for each in found if each.kind == kind]
        rows = len({each.a for each in pairs})
        typer.echo(f"{kind:<14} {len(pairs):>8,} pairs, {rows:,} rows of {first}")
        for each in pairs[:5]:
            typer.echo(f"    {each.a}  {each.b}" + (f"  ({each.bits} bits)" if each.bits else ""))


def _rows(source: str, settings: "Data") -> Any:
    """The usable rows of a source; raises DataError when too few are."""
    from rlcs.data.loading import load, require_usable
    from rlcs.recipe.schema import Images

    loaded = load(source, settings, decode_limit=Images().decode_limit, role="cold_start")
    require_usable(loaded, settings)
    return loaded.rows


def _problems(source: str, data: Path | None) -> list[Any]:
    from rlcs.recipe.schema import Data, Images

    if not source.startswith("benchmark:"):
        # Gold answers are not compared, so that they need not be such as can be graded.
        return [row.problem for row in _rows(source, Data(answers="as_given"))]
    from rlcs.evals.benchmarks import find
    from rlcs.evals.benchmarks.loading import load_benchmark

    limit = Images().decode_limit
    loaded = load_benchmark(
        find(source.removeprefix("benchmark:")), split=None, data=data, limit=None, decode_limit=limit
    )
    return [question.problem("paper", images) for question, images in loaded.questions]
