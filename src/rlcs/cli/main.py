"""The command line: parse, call, print. Heavy rooms are imported inside the verbs."""

import io
import json as jsonlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rlcs.cli.data import data_app
from rlcs.cli.options import Temperature, with_options
from rlcs.cli.plan import plan
from rlcs.cli.publish import publish_app
from rlcs.cli.serving import serving_app
from rlcs.cli.watch import watch_app
from rlcs.errors import RlcsError, UserError

app = typer.Typer(
    name="rlcs",
    help="RL with Cold Start: turn a vision-language model into one that reasons.",
    epilog="Begin with `rlcs doctor` and `rlcs quickstart`; then `rlcs recipes ls`, `rlcs run RECIPE`.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")
app.add_typer(publish_app)
app.add_typer(serving_app)
app.add_typer(watch_app)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. grpo.steps=20")
]
RecipeName = Annotated[str, typer.Argument(help="A recipe's name or file")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line instead of progress bars")]


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The options of the verbs that train: one field, one option."""

    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME")] = None
    json: Json = False
    quiet: Annotated[bool, typer.Option("--quiet", help="Plain progress lines")] = False


@dataclass(frozen=True, kw_only=True)
class AblateOptions(StudyOptions):
    """Those of `rlcs ablate`."""

    seeds: Annotated[int, typer.Option(min=1, help="Repeat with this many seeds")] = 1


def main() -> None:
    """Run the command line; errors for people go to stderr with their exit code, never as a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not UTF-8: it shows \uXXXX instead of a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="rlcs")
    except RlcsError as error:
        _tell(error)
    except OSError as error:
        if error.filename is None:  # no file is at fault: only a traceback says what is
            raise
        fix = "check the path and its permissions, or name another"
        _tell(UserError(error.strerror or str(error), where=str(error.filename), fix=fix))
    except KeyboardInterrupt:
        sys.stderr.write("rlcs: stopped; the same command continues from the last checkpoint\n")
        sys.exit(130)


def _tell(error: RlcsError) -> NoReturn:
    if not error.reported:
        rank = f" (rank {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
        sys.stderr.write(f"rlcs{rank}: {error}\n")
    sys.exit(error.exit_code)


@app.command()
@with_options(StudyOptions)
def quickstart(overrides: Overrides = None, **chosen: Any) -> None:
    """The whole study on the built-in model. Minutes on a laptop CPU."""
    _study("quickstart", overrides or [], StudyOptions(**chosen))


@app.command()
@with_options(StudyOptions)
def run(recipe: RecipeName, overrides: Overrides = None, **chosen: Any) -> None:
    """Cold start, SFT, GRPO, measurement, report. From one recipe; resumes by itself."""
    _study(recipe, overrides or [], StudyOptions(**chosen))


@app.command()
@with_options(StudyOptions)
def sft(recipe: RecipeName, overrides: Overrides = None, **chosen: Any) -> None:
    """Cold start and SFT alone, measured. `rlcs run` on the same folder goes on with RL."""
    _study(recipe, [*(overrides or []), "study.arms=[base, sft]"], StudyOptions(**chosen))


@app.command()
@with_options(StudyOptions)
def grpo(recipe: RecipeName, overrides: Overrides = None, **chosen: Any) -> None:
    """RL alone, from the model as it is, measured. That is model.name; no cold start."""
    _study(recipe, [*(overrides or []), "study.arms=[base, grpo]"], StudyOptions(**chosen))


@app.command()
@with_options(AblateOptions)
def ablate(recipe: RecipeName, overrides: Overrides = None, **chosen: Any) -> None:
    """Base, SFT only, RL only, both, with intervals. The paper's comparison."""
    options = AblateOptions(**chosen)
    four = "study.arms=[base, sft, grpo, sft_grpo]"
    _study(recipe, [*(overrides or []), four], options, seeds=options.seeds)


@app.command()
@with_options(StudyOptions)
def distill(recipe: RecipeName, overrides: Overrides = None, **chosen: Any) -> None:
    """Cold-start data alone, from any teacher. Keeps what is right, with pass rates; in OUT/cold_start."""
    options = StudyOptions(**chosen)
    from rlcs.recipe.loading import load_recipe
    from rlcs.recipe.table import teacher_rows

    named = [text for text in overrides or [] if text.startswith("data.problems=")]
    words = [text.replace("data.problems=", "data.cold_start=", 1) for text in overrides or []]
    resolved = load_recipe(recipe, words).recipe
    folder = (options.out or Path("runs") / resolved.name) / "cold_start"
    if not options.json:
        rows = [("problems", resolved.data.cold_start), *teacher_rows(resolved.teacher)]
        for name, value in rows:
            typer.echo(f"  {name:<18}  {value}")

    from rlcs.distill.command import distil
    from rlcs.signals import StopFlag

    with StopFlag() as stop:
        stats = distil(
            resolved, folder, afresh=bool(named), quiet=options.quiet, json=options.json, stop=stop
        )
    if options.json:
        typer.echo(jsonlib.dumps({"folder": str(folder), **stats}))
    else:
        typer.echo(
            f"\n{stats['kept']:,} demonstrations of {stats['problems']:,} problems, "
            f"{stats['pass_rate']:.1%} of {stats['asked']:,} tries right"
            + ("" if stats["cost"] is None else f", cost {stats['cost']:,.2f}")
        )
        for name in ("kept", "rejected", "problems", "tries"):
            typer.echo(f"{name:<9} {folder / f'{name}.jsonl'}")
    if stats["failed"]:
        raise typer.Exit(1)


def _study(name: str, overrides: list[str], options: StudyOptions, *, seeds: int = 1) -> None:
    from rlcs.recipe.loading import load_recipe

    if os.environ.get("RANK", "0") != "0":  # torchrun: rank 0 alone speaks
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for good
    recipe = load_recipe(name, overrides).recipe
    folder = options.out or Path("runs") / recipe.name
    if not options.json:
        _print_choices(recipe, folder)

    from rlcs.data.run_data import load_run_data
    from rlcs.train.trackers import require_installed

    require_installed(recipe.trackers)
    # Before torch is loaded: a bad file is reported at once.
    data = load_run_data(recipe.study, recipe.data, decode_limit=recipe.images.decode_limit)

    from rlcs.distributed import join_world
    from rlcs.pipeline.seeds import run_seeds
    from rlcs.pipeline.study import Output
    from rlcs.signals import StopFlag

    output = Output(quiet=options.quiet, json=options.json)
    with StopFlag() as stop, join_world(timeout_s=recipe.parallel.timeout_s) as world:
        summary = run_seeds(recipe, folder, seeds, data=data, output=output, stop=stop, world=world)
    if options.json:
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
    from rlcs.recipe.arms import ARMS, MAIN_FIRST

    typer.echo("")
    for arm, scores in summary["arms"].items():
        low, high = scores["low"], scores["high"]
        label = ARMS[arm].label
        typer.echo(f"  {label:<18} {scores['accuracy']:6.1%}   [{low:.1%}, {high:.1%}]  n={scores['n']:,}")
    typer.echo(f"\nreport   {folder / 'report' / 'index.html'}")
    typer.echo(f"summary  {folder / 'summary.json'}")
    seeds = sorted(folder.glob("seed-*"))
    models = [(seeds[0] if seeds else folder) / name / "final" for name in MAIN_FIRST]
    typer.echo(f"model    {next((model for model in models if model.exists()), models[0])}")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """The options of `rlcs eval`: one field, one option."""

    model: Annotated[
        list[str] | None, typer.Option("--model", help="One more model; the same as an argument")
    ] = None
    benchmarks: Annotated[str, typer.Option(help="Names, with commas between them")] = (
        "mathvision,mathverse,mathvista,wemath"
    )
    data: Annotated[Path | None, typer.Option(help="Folder with the official files, not the hub")] = None
    out: Annotated[Path, typer.Option(help="Where answers and scores go")] = Path("runs/eval")
    prompt: Annotated[str, typer.Option(help="paper (boxed system prompt) or official")] = "paper"
    split: Annotated[str | None, typer.Option(help="Default: the one that the paper uses")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions")] = None
    samples: Annotated[int, typer.Option(min=1, help="Answers to each question: mean and pass@k")] = 1
    temperature: Temperature = 0.0
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="Nucleus sampling")] = 1.0
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer")] = 2048
    seed: Annotated[int, typer.Option(help="Of the samples")] = 0
    batch: Annotated[int, typer.Option(min=1, help="Answers decoded at once by a local model")] = 64
    engine: Annotated[str, typer.Option(help="local, vllm_server or vllm_colocated")] = "local"
    rollout: Annotated[list[str] | None, typer.Option(help="Of vLLM, say tensor_parallel=2")] = None
    base_url: Annotated[
        str | None, typer.Option(help="Ask an OpenAI-compatible server, like http://localhost:8000/v1")
    ] = None
    key_env: Annotated[str, typer.Option(help="Variable with its key")] = "OPENAI_API_KEY"
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once")] = 32
    judge_url: Annotated[str | None, typer.Option(help="A judge reads out answers without a box")] = None
    judge_model: Annotated[str | None, typer.Option(help="The judge's model")] = None
    judge_key_env: Annotated[str, typer.Option(help="The same for the judge")] = "OPENAI_API_KEY"
    json: Json = False


@app.command("eval")
@with_options(EvalOptions)
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Folder, hub id, builtin, or a server's model; or NAME=MODEL"
        ),
    ] = None,
    **chosen: Any,
) -> None:
    """Models on benchmarks, beside the paper's numbers. Answers, scores with intervals."""
    options = EvalOptions(**chosen)
    run = _eval_run(options)
    named = [*(models or []), *(options.model or [])]
    if not named:
        raise UserError("no model is named", where="rlcs eval", fix="write rlcs eval MODEL, say `builtin`")

    from rlcs.evals.comparison import as_markdown
    from rlcs.evals.run import evaluate_models
    from rlcs.signals import StopFlag

    with StopFlag() as stop:
        comparison = evaluate_models(run, named, stop=stop, json=options.json)
    if options.json:
        typer.echo(jsonlib.dumps(comparison))
    else:
        typer.echo(f"\n{as_markdown(comparison)}\ntable    {options.out / 'comparison.md'}")
    if comparison["failed"]:
        raise typer.Exit(1)


def _eval_run(options: EvalOptions) -> Any:
    """Check the options and build the run. Raises UserError for a combination that cannot be meant."""
    from rlcs.data.sources import suggest
    from rlcs.evals.benchmarks.base import STYLES
    from rlcs.evals.run import EvalRun
    from rlcs.recipe.loading import load_recipe
    from rlcs.recipe.sampling import Endpoint
    from rlcs.recipe.schema import Eval

    style = next((style for style in STYLES if style == options.prompt), None)
    if style is None:
        fix = suggest(options.prompt, STYLES)
        raise UserError(f"no prompt is called {options.prompt!r}", where="--prompt", fix=fix)
    if options.samples > 1 and options.temperature == 0:
        fix = "add --temperature 0.7, say"
        raise UserError("several greedy samples would all be the same", where="--samples", fix=fix)
    if (options.judge_url is None) != (options.judge_model is None):
        raise UserError("a judge has a URL and a model", where="--judge-url", fix="give --judge-model too")

    def server(url: str | None, model: str, key_env: str) -> Endpoint | None:
        settings = {"model": model, "key_env": key_env, "concurrency": options.concurrency}
        return None if url is None else Endpoint.model_validate({"base_url": url, **settings})

    if options.base_url and options.engine != "local":
        raise UserError("a server has an engine of its own", where="--engine", fix="leave it out")
    words = [f"engine={options.engine}", *(options.rollout or [])]
    local = ["teacher.kind=local", "teacher.model=builtin", *(f"teacher.rollout.{word}" for word in words)]
    sampling = Eval(
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_tokens,
        max_rows=options.batch,
    )
    return EvalRun(
        benchmarks=tuple(name.strip() for name in options.benchmarks.split(",") if name.strip()),
        out=options.out,
        sampling=sampling,
        style=style,
        samples=options.samples,
        seed=options.seed,
        data=options.data,
        split=options.split,
        limit=options.limit,
        endpoint=server(options.base_url, "", options.key_env),
        judge=server(options.judge_url, options.judge_model or "", options.judge_key_env),
        engine=load_recipe("quickstart", local).recipe.teacher.rollout,
    )


@app.command()
def look(
    what: Annotated[str, typer.Argument(help="A recipe, or a data source")],
    overrides: Overrides = None,
    row: Annotated[int, typer.Option("--row", min=0, help="Which row")] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page")] = None,
) -> None:
    """What the model sees of one training example. Tokens, loss weights, image patches."""
    from rlcs.report.preview import look_at, print_view, write_html

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
    """Grade a file of answers. By our rule or by a benchmark's official one."""
    from rlcs.evals.answer_file import grade_file

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


app.command()(plan)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """The recipes that come with rlcs."""
    from rlcs.recipe.loading import list_recipes

    known = list_recipes()
    for name, path in known.items():
        about = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{name:<{max(map(len, known))}}  {about}")


@recipes_app.command("show")
def recipes_show(recipe: RecipeName, overrides: Overrides = None) -> None:
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
    """Copy a recipe to a file of your own, which also gives it its name."""
    import re

    from rlcs.errors import RecipeError
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
    """Read a recipe strictly and print its choices."""
    from rlcs.recipe.loading import load_recipe

    _print_choices(load_recipe(recipe, overrides or []).recipe, Path(recipe))
