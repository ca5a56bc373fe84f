"""The commands of `rlcs data`: check, difficulty, export, push, overlap."""

import json as jsonlib
import re
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlcs.cli.options import DryRun, ExportedFolder, Json, Overrides, Private, Repository, with_options
from rlcs.cli.output import print_result
from rlcs.errors import RecipeError, UserError

if TYPE_CHECKING:
    from rlcs.data.sources import Role
    from rlcs.pipeline.source_check import SourceCheck
    from rlcs.progress import RowProgress
    from rlcs.recipe.schema import Recipe

RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="A recipe's name or file: columns, limits, model")
]

data_app = typer.Typer(help="Check, compare and exchange data sets.", no_args_is_help=True)


@data_app.command("check")
def data_check(
    source: Annotated[
        str | None, typer.Argument(help="A data file, folder, hub id, or builtin:NAME; none: the recipe's")
    ] = None,
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    role: Annotated[str | None, typer.Option("--role", help="rl (default), test or cold_start")] = None,
    write: Annotated[
        Path | None, typer.Option("--write", help="Write the rows that can be used to a new JSONL file")
    ] = None,
    json: Json = False,
) -> None:
    """Name unusable rows with the reasons, and count the kinds of gold answers. Decodes every image.

    With a recipe also what `rlcs run` would refuse: prompts that are too long, problems without a teacher.
    """
    from rlcs.data.good_rows import copies_lines, require_new_file, write_lines, write_rows
    from rlcs.pipeline.source_check import check_source
    from rlcs.recipe.loading import load_recipe

    words = list(overrides or [])
    if source is not None and _is_override(source):
        words, source = [source, *words], None
    chosen = _role(role)
    resolved = load_recipe(recipe or "quickstart", words).recipe
    if source is None:
        if recipe is None:
            raise UserError("nothing to check", fix="name a data source, or --recipe for all of its sources")
        if role is not None or write is not None:
            option = "--role" if role is not None else "--write"
            raise UserError("this is for one source", where=option, fix="name the source as well")
        _check_recipe(resolved, json=json)
        return
    if write is not None:
        require_new_file(write, source)
    found = check_source(
        source,
        chosen,
        resolved,
        for_run=recipe is not None,
        keep="" if write is None else "lines" if copies_lines(source, write) else "rows",
        watch=partial(_progress(), source),
    )
    facts, lines = _facts(found), _lines(found)
    if write is not None and found.usable:
        if found.good:
            write_rows(found.good, source, write, resolved.data.columns)
        else:
            write_lines(source, write, found.lines)
        facts["written"] = str(write)
        lines.append(f"{found.usable:,} rows are written to {write}")
    elif write is not None:
        lines.append(f"no row can be used, so that {write} is not written")
    print_result(facts, lines, json=json)
    if found.bad or found.refusal or not found.usable:
        raise typer.Exit(2)


def _progress() -> "RowProgress":
    """Says on standard error how far the check of a large source is."""
    from rlcs.progress import RowProgress, screen

    return RowProgress(screen("check", 0, quiet=True, stream=sys.stderr), "rows checked")


def _is_override(text: str) -> bool:
    """Whether a first word is `key=value` instead of a source (`builtin:NAME?count=3` is one)."""
    return re.match(r"[a-z_]+(\.[a-z_]+)*=", text) is not None and not Path(text).exists()


def _role(name: str | None) -> "Role":
    from rlcs.data.sources import ROLES, suggest

    chosen = next((known for known in ROLES if known == (name or "rl")), None)
    if chosen is None:
        raise RecipeError(f"unknown role {name!r}", where="--role", fix=suggest(name or "", ROLES))
    return chosen


def _check_recipe(recipe: "Recipe", *, json: bool) -> None:
    from rlcs.pipeline.source_check import check_recipe_data

    checks, errors, notes = check_recipe_data(recipe, _progress())
    lines: list[str] = []
    for name, found in checks.items():
        lines += [f"{name}: {found.source}", *(f"  {line}" for line in _lines(found)), ""]
    lines += [f"{role}: {error}" for role, error in errors.items()]
    refused = bool(errors) or any(found.refusal or not found.usable for found in checks.values())
    bad = any(found.bad for found in checks.values())
    verdict = "`rlcs run` refuses this data" if refused else "`rlcs run` accepts this data"
    lines += [
        *notes,
        f"{verdict}, and leaves the rows out that cannot be used" if bad and not refused else verdict,
    ]
    facts = {
        "sources": {name: _facts(found) for name, found in checks.items()},
        "errors": errors,
        "overlap": notes,
        "accepted": not refused,
    }
    print_result(facts, lines, json=json)
    if refused or bad:
        raise typer.Exit(2)


def _facts(found: "SourceCheck") -> dict[str, Any]:
    return {
        "source": found.source,
        "role": found.role,
        "usable": found.usable,
        "bad": [{"where": bad.where, "id": bad.id, "reason": bad.reason} for bad in found.bad],
        "notes": list(found.notes),
        "refusal": found.refusal,
        "golds": {
            name: {"rows": kind.rows, "id": kind.id, "answer": kind.answer}
            for name, kind in found.kinds.items()
        },
    }


def _lines(found: "SourceCheck") -> list[str]:
    from rlcs.data.check import grouped, kind_lines

    table = kind_lines(found.kinds, columns=get_terminal_size().columns)
    counts = f"{found.usable:,} rows can be used, {len(found.bad):,} cannot"
    refusal = [f"a run refuses this source: {found.refusal}"] if found.refusal else []
    return [*grouped(found.bad), *table, *found.notes, *refusal, counts]


@data_app.command("export")
def data_export(
    source: Annotated[str, typer.Argument(help="kept.jsonl, or any other data source")],
    to: Annotated[Path, typer.Argument(help="The new folder")],
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    layout: Annotated[str, typer.Option(help="published, ms-swift or llama-factory")] = "published",
) -> None:
    """Write data in the layout of other tools, with a card. Parquet with images, ms-swift, LLaMA-Factory."""
    from rlcs.data.exchange import LAYOUTS, export
    from rlcs.data.sources import suggest
    from rlcs.recipe.loading import load_recipe

    chosen = next((each for each in LAYOUTS if each == layout), None)
    if chosen is None:
        raise UserError(f"no layout {layout!r}", where="--layout", fix=suggest(layout, LAYOUTS))
    rows = _rows(source, load_recipe(recipe or "quickstart", overrides or []).recipe)
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
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the benchmark's official files")] = None,
    json: Json = False,
) -> None:
    """Find problems and images that two sets share. The same pixels, and images that look alike."""
    from rlcs.data.overlap import KINDS, find_overlaps
    from rlcs.data.run_data import overlap_facts, overlap_sentence
    from rlcs.recipe.loading import load_recipe

    # Gold answers are not compared, so that they need not be such as can be graded.
    words = ["data.answers=as_given", *(overrides or [])]
    resolved = load_recipe(recipe or "quickstart", words).recipe
    problems = _problems(first, data, resolved)
    found = find_overlaps(problems, _problems(second, data, resolved))
    if json:
        for each in found:
            typer.echo(jsonlib.dumps(asdict(each)))
        return
    facts = {fact["kind"]: fact for fact in overlap_facts(first, found)}
    for kind in KINDS:
        if kind in facts:
            typer.echo(overlap_sentence(facts[kind], len(problems), second))
    if not facts:
        typer.echo(f"{first} shares nothing with {second}")


@dataclass(frozen=True, kw_only=True)
class DifficultyOptions:
    """The options of `rlcs data difficulty`."""

    model: Annotated[str | None, typer.Option(help="Run, folder, hub id or builtin; none: the recipe's")] = (
        None
    )
    samples: Annotated[int, typer.Option(min=1, help="Answers to each problem")] = 8
    blind: Annotated[
        bool,
        typer.Option("--blind", help="Show another problem's image, write blind_rate: for data.rl_blind"),
    ] = False
    json: Json = False


@data_app.command("difficulty")
@with_options
def data_difficulty(
    options: DifficultyOptions,
    source: Annotated[str, typer.Argument(help="A data source")],
    recipe: Annotated[str, typer.Option(help="The recipe of RL, by name or file: prompts, sampling, model")],
    out: Annotated[Path, typer.Option(help="New JSONL file: the rows with pass rates")],
    overrides: Overrides = None,
) -> None:
    """Measure how often a model solves each problem, before RL. For data.rl_pass_rate and grpo.order."""
    from rlcs.pipeline.difficulty import lines, measure_difficulty
    from rlcs.recipe.loading import load_recipe
    from rlcs.signals import StopFlag

    named = [] if options.model is None else [f"model.name={options.model}"]
    words = [*(overrides or []), *named]
    resolved = load_recipe(recipe, words).recipe
    with StopFlag() as stop:
        found = measure_difficulty(
            source, resolved, out, samples=options.samples, stop=stop, blind=options.blind, json=options.json
        )
    print_result({**found.summary(), "out": str(out)}, [*lines(found), f"rows     {out}"], json=options.json)


def _rows(source: str, recipe: "Recipe") -> Any:
    """The usable rows of a source; raises DataError when too few are."""
    from rlcs.data.loading import load, require_usable

    loaded = load(source, recipe.data, decode_limit=recipe.images.decode_limit, role="cold_start")
    require_usable(loaded, recipe.data)
    return loaded.rows


def _problems(source: str, data: Path | None, recipe: "Recipe") -> list[Any]:
    if not source.startswith("benchmark:"):
        return [row.problem for row in _rows(source, recipe)]
    from rlcs.evals.benchmarks import find
    from rlcs.evals.benchmarks.loading import load_benchmark

    limit = recipe.images.decode_limit
    loaded = load_benchmark(
        find(source.removeprefix("benchmark:")), split=None, data=data, limit=None, decode_limit=limit
    )
    return [question.problem("paper", images) for question, images in loaded.questions]
