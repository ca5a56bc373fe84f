"""The command line: parse, call, print. Heavy rooms are imported inside the verbs."""

import json as jsonlib
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rlcs.errors import RlcsError

app = typer.Typer(
    name="rlcs",
    help="RL with Cold Start: turn a vision-language model into one that reasons.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)
data_app = typer.Typer(help="Check data sets before they cost GPU hours.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. grpo.steps=20")
]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder; default runs/NAME")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line instead of progress bars")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Plain progress lines")]


def main() -> None:
    """Run the command line; errors for people go to stderr with their exit code, never as a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except RlcsError as error:
        sys.stderr.write(f"rlcs: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("rlcs: stopped; the same command continues from the last checkpoint\n")
        sys.exit(130)


@app.command()
def quickstart(
    overrides: Overrides = None, out: Out = None, json: Json = False, quiet: Quiet = False
) -> None:
    """The whole two-stage study on the built-in model and tasks: minutes on a laptop CPU."""
    _study("quickstart", overrides, out=out, json=json, quiet=quiet)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file")],
    overrides: Overrides = None,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cold start, SFT, GRPO, measurement and report from one recipe; resumes by itself."""
    _study(recipe, overrides, out=out, json=json, quiet=quiet)


@app.command()
def ablate(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file")],
    overrides: Overrides = None,
    out: Out = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Repeat with this many seeds")] = 1,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The paper's comparison: base, SFT only, RL only, both, with intervals."""
    four = "study.arms=[base, sft, rl, two_stage]"
    _study(recipe, [*(overrides or []), four], out=out, json=json, quiet=quiet, seeds=seeds)


def _study(
    name: str,
    overrides: list[str] | None,
    *,
    out: Path | None,
    json: bool,
    quiet: bool,
    seeds: int = 1,
) -> None:
    from rlcs.recipe.loading import load_recipe

    recipe = load_recipe(name, overrides or []).recipe
    folder = out or Path("runs") / recipe.name
    if not json:
        _print_choices(recipe, folder)

    from rlcs.interrupts import StopFlag
    from rlcs.pipeline import Output, run_seeds

    with StopFlag() as stop:
        summary = run_seeds(recipe, folder, seeds, output=Output(quiet=quiet, json=json), stop=stop)
    if json:
        typer.echo(jsonlib.dumps({"summary": str(folder / "summary.json"), "arms": summary["arms"]}))
    else:
        _print_arms(summary, folder)


def _print_choices(recipe: Any, folder: Path) -> None:
    from rlcs.recipe.table import summary_rows

    rows = summary_rows(recipe)
    width = max(len(name) for name, _ in rows)
    typer.echo(f"{recipe.name} -> {folder}")
    for name, value in rows:
        typer.echo(f"  {name:<{width}}  {value}")


def _print_arms(summary: dict[str, Any], folder: Path) -> None:
    from rlcs.report.gather import ARMS

    typer.echo("")
    for arm, scores in summary["arms"].items():
        low, high = scores["low"], scores["high"]
        label = ARMS[arm]
        typer.echo(f"  {label:<18} {scores['accuracy']:6.1%}   [{low:.1%}, {high:.1%}]  n={scores['n']:,}")
    typer.echo(f"\nreport   {folder / 'report' / 'index.html'}")
    typer.echo(f"summary  {folder / 'summary.json'}")
    typer.echo(f"model    {_model_folder(folder)}")


def _model_folder(folder: Path) -> Path:
    seeds = sorted(folder.glob("seed-*"))
    return (seeds[0] if seeds else folder) / "grpo" / "final"


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder")]) -> None:
    """Write the report of a run again: RUN/report/index.html."""
    from rlcs.report import build

    typer.echo(build(run))


@app.command()
def look(
    what: Annotated[str, typer.Argument(help="A recipe, or a data source")],
    overrides: Overrides = None,
    row: Annotated[int, typer.Option("--row", min=0, help="Which row")] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page")] = None,
) -> None:
    """What the model sees of one training example: tokens, loss weights, image patches."""
    from rlcs.look import look_at, print_view, write_html

    view = look_at(what, overrides or [], row=row)
    print_view(view)
    if html is not None:
        write_html(view, html)
        typer.echo(f"page     {html}")


@app.command()
def grade(
    file: Annotated[Path, typer.Argument(help="JSONL with id, response, answer; choices, extraction, ...")],
    out: Annotated[Path, typer.Option("--out", help="The same rows with prediction, correct, why")],
    rule: Annotated[str, typer.Option("--rule", help="rlcs, mathvision, mathvista or wemath")] = "rlcs",
    strict: Annotated[bool, typer.Option("--strict", help="rlcs: only a closed box counts")] = False,
    json: Json = False,
) -> None:
    """Grade a file of answers by our rule or by a benchmark's official one."""
    from rlcs.grading.answer_file import grade_file

    tally = grade_file(file, out, rule=rule, allow_fallbacks=not strict)
    for row in tally.unscored[:20]:
        typer.echo(f"unscored: {file}, {row}", err=True)
    if len(tally.unscored) > 20:
        typer.echo(f"unscored: {len(tally.unscored) - 20:,} more, see {out}", err=True)
    numbers = tally.to_json()
    if json:
        typer.echo(jsonlib.dumps({**numbers, "out": str(out)}))
    else:
        interval = f"[{numbers['low']:.1%}, {numbers['high']:.1%}]"
        accuracy = "none: no row could be scored" if tally.accuracy is None else f"{tally.accuracy:.2%}"
        typer.echo(f"accuracy {accuracy} by {rule}   {interval if tally.accuracy is not None else ''}")
        typer.echo(f"right    {tally.right:,}\nwrong    {tally.wrong:,}\nunscored {len(tally.unscored):,}")
        typer.echo(f"rows     {out}")
    if tally.accuracy is None:
        raise typer.Exit(2)


@data_app.command("check")
def data_check(
    source: Annotated[str, typer.Argument(help="JSONL, Parquet, folder, hub id, or builtin:NAME")],
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe with columns and limits")] = "quickstart",
    role: Annotated[str, typer.Option("--role", help="rl, test or cold_start")] = "rl",
    json: Json = False,
) -> None:
    """Name every row that cannot be used, and why; decodes every image in full."""
    from rlcs.data import check
    from rlcs.errors import RecipeError
    from rlcs.recipe.loading import load_recipe

    if role not in ("rl", "test", "cold_start"):
        raise RecipeError(f"unknown role {role!r}", where="--role", fix="use rl, test or cold_start")
    resolved = load_recipe(recipe, overrides or []).recipe
    loaded = check(source, resolved.data, decode_limit=resolved.images.decode_limit, role=role)  # type: ignore[arg-type]
    if json:
        named = [{"where": bad.where, "reason": bad.reason} for bad in loaded.bad]
        typer.echo(jsonlib.dumps({"usable": len(loaded.rows), "bad": named}))
    else:
        for bad in loaded.bad:
            typer.echo(str(bad))
        typer.echo(f"{len(loaded.rows):,} rows can be used, {len(loaded.bad):,} cannot")
    if loaded.bad or not loaded.rows:
        raise typer.Exit(2)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """The recipes that come with rlcs."""
    from rlcs.recipe.loading import list_recipes

    for name, path in list_recipes().items():
        about = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{name:<14} {about}")


@recipes_app.command("show")
def recipes_show(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file")], overrides: Overrides = None
) -> None:
    """Every value of a recipe, defaults spelled out, and where each came from."""
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
    """Copy a recipe to a file of your own."""
    from rlcs.errors import RecipeError
    from rlcs.recipe.loading import list_recipes

    known = list_recipes()
    if recipe not in known:
        raise RecipeError(f"no recipe is called {recipe!r}", fix=f"there are: {', '.join(known)}")
    if to.exists():
        raise RecipeError("the file exists already", where=str(to), fix="choose another name")
    shutil.copyfile(known[recipe], to)
    typer.echo(f"run it with: rlcs run {to}")


@recipes_app.command("check")
def recipes_check(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file")], overrides: Overrides = None
) -> None:
    """Read a recipe strictly and print its choices."""
    from rlcs.recipe.loading import load_recipe

    _print_choices(load_recipe(recipe, overrides or []).recipe, Path(recipe))


if __name__ == "__main__":
    main()
