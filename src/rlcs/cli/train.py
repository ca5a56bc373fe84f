"""The commands that train: quickstart, run, sft, grpo, ablate, coldstart, distill."""

import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlcs.cli.options import Overrides, RecipeName, with_options
from rlcs.cli.output import print_result
from rlcs.cores import find_cores
from rlcs.errors import RecipeError

if TYPE_CHECKING:
    from rlcs.data.run_data import RunData
    from rlcs.pipeline.processes import Ranks
    from rlcs.recipe.coldstart import Wanted
    from rlcs.recipe.schema import Recipe

train_app = typer.Typer()


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of every command that trains."""

    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME")] = None
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line, no progress bars")] = False
    quiet: Annotated[bool, typer.Option("--quiet", help="Plain progress lines")] = False


@dataclass(frozen=True, kw_only=True)
class RunOptions(TrainOptions):
    """The options of every command that runs several stages."""

    data: Annotated[
        str | None,
        typer.Option(help="One source for everything: a tenth is held out for the test, the rest trains"),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try every stage in small (as each start does), train nothing")
    ] = False


@dataclass(frozen=True, kw_only=True)
class AblateOptions(RunOptions):
    """The options of `rlcs ablate`."""

    seeds: Annotated[int, typer.Option(min=1, help="Repeat with this many seeds")] = 1


def _counts(text: str | None) -> str | None:
    words = [word.strip() for word in (text or "1").split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"{text!r} is no list of whole numbers above 0: write for example 200,600")
    return text


def _numbers(text: str | None) -> str | None:
    words = [word.strip() for word in (text or "1").split(",")]
    if not all(word.replace(".", "", 1).isdigit() and float(word) > 0 for word in words):
        raise typer.BadParameter(f"{text!r} is no list of numbers above 0: write for example 200,600")
    return text


@dataclass(frozen=True, kw_only=True)
class ColdStartOptions(RunOptions):
    """The options of `rlcs coldstart`."""

    out: Annotated[Path | None, typer.Option(help="Folder; default runs/NAME-coldstart")] = None
    demonstrations: Annotated[
        str | None,
        typer.Option(callback=_counts, help="Numbers to try, as in 200,600; default: all, 1/8"),
    ] = None
    epochs: Annotated[
        str | None,
        typer.Option(callback=_numbers, help="Lengths of SFT; default: 1/4, 1 and 2 times the recipe's"),
    ] = None
    chains: Annotated[
        str | None,
        typer.Option(help="Kinds of chain, as in distilled,reflection,given; default: as in the recipe"),
    ] = None
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with this many seeds")] = 2
    early_stop: Annotated[bool, typer.Option(help="End RL halfway where a cell cannot become the best")] = (
        True
    )
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the models of all cells")] = False


@train_app.command()
@with_options
def quickstart(options: RunOptions, overrides: Overrides = None) -> None:
    """Run the whole study on the built-in model. Takes minutes on a laptop CPU."""
    _study("quickstart", overrides, options, command="quickstart")


@train_app.command()
@with_options
def run(recipe: RecipeName, options: RunOptions, overrides: Overrides = None) -> None:
    """Run cold start, SFT and GRPO of a recipe, measured beside base and SFT. A stopped run resumes."""
    _study(recipe, overrides, options)


@train_app.command()
@with_options
def sft(recipe: RecipeName, options: RunOptions, overrides: Overrides = None) -> None:
    """Run and measure cold start and SFT only. `rlcs run` on the same folder continues with RL."""
    _study(recipe, overrides, options, command="sft")


@train_app.command()
@with_options
def grpo(recipe: RecipeName, options: RunOptions, overrides: Overrides = None) -> None:
    """Run and measure RL only, without a cold start. It starts from model.name."""
    _study(recipe, overrides, options, command="grpo")


@train_app.command()
@with_options
def ablate(recipe: RecipeName, options: AblateOptions, overrides: Overrides = None) -> None:
    """Compare base, SFT only, RL only and both. With intervals, as in the paper."""
    _study(recipe, overrides, options, command="ablate", seeds=options.seeds)


@train_app.command()
@with_options
def coldstart(recipe: RecipeName, options: ColdStartOptions, overrides: Overrides = None) -> None:
    """Find out whether RL needs a cold start, how much and of which kind. By a grid of short runs."""
    from rlcs.recipe.coldstart import Wanted, study_words

    def listed(text: str | None) -> list[str]:
        return [word.strip() for word in text.split(",")] if text else []

    wanted = Wanted(
        demonstrations=tuple(map(int, listed(options.demonstrations))),
        epochs=tuple(map(float, listed(options.epochs))),
        chains=tuple(listed(options.chains)),
        seeds=options.seeds,
        early_stop=options.early_stop,
        keep_models=options.keep_models,
    )
    words = study_words(recipe, overrides or [])
    _study(recipe, words, options, command="coldstart", wanted=wanted)


@train_app.command()
@with_options
def distill(recipe: RecipeName, options: TrainOptions, overrides: Overrides = None) -> None:
    """Make cold-start data only, with any teacher. Right answers and pass rates, in OUT/cold_start."""
    from rlcs.recipe.loading import load_recipe
    from rlcs.recipe.table import teacher_rows

    words = [text.replace("data.problems=", "data.cold_start=", 1) for text in overrides or []]
    resolved = load_recipe(recipe, words).recipe
    folder = (options.out or Path("runs") / resolved.name) / "cold_start"
    if not options.json:
        for name, value in [("problems", resolved.data.cold_start), *teacher_rows(resolved.teacher)]:
            typer.echo(f"  {name:<18}  {value}")

    from rlcs.data.check import grouped
    from rlcs.distill.run import load_rows, run
    from rlcs.progress import screen
    from rlcs.signals import StopFlag
    from rlcs.storage import read_json
    from rlcs.storage.locks import hold

    loaded = load_rows(
        resolved.data, decode_limit=resolved.images.decode_limit, all_anew=words != (overrides or [])
    )
    total = sum(row.response is None for row in loaded.rows)
    with (
        hold(folder.parent),
        StopFlag() as stop,
        screen("cold start", total, quiet=options.quiet, json=options.json) as view,
    ):
        for line in grouped(loaded.bad):
            view.say(f"left out: {line}")
        run(
            loaded.rows, resolved.teacher, folder=folder, seed=resolved.seed, images=resolved.images,
            view=view, stop=stop,
        )  # fmt: skip
    stats = read_json(folder / "stats.json")
    cost = "" if stats["cost"] is None else f", cost {stats['cost']:,.2f}"
    summary = (
        f"\n{stats['kept']:,} demonstrations of {stats['problems']:,} problems, "
        f"{stats['pass_rate']:.1%} of {stats['asked']:,} samples right{cost}"
    )
    files = [f"{name:<9} {folder / f'{name}.jsonl'}" for name in ("kept", "rejected", "problems", "samples")]
    print_result({"folder": str(folder), **stats}, [summary, *files], json=options.json)
    if stats["failed"]:
        raise typer.Exit(1)


def _study(
    name: str,
    overrides: list[str] | None,
    options: RunOptions,
    *,
    command: str = "run",
    seeds: int = 1,
    wanted: "Wanted | None" = None,
) -> None:
    from rlcs.pipeline import processes
    from rlcs.recipe.arms import arms_override
    from rlcs.recipe.coldstart import described, prepared
    from rlcs.recipe.loading import load_recipe

    processes.follow_first()
    if os.environ.get("RANK", "0") != "0":  # rank 0 alone prints
        options = replace(options, json=False, quiet=True)  # with `json`, sentences go to standard error
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    from rlcs.data.source_options import both_parts

    words = [f"{key}={source}" for key, source in both_parts(options.data).items()] if options.data else []
    # What is named one by one counts more than --data and than the command.
    words += overrides or []
    try:
        recipe = load_recipe(name, [*arms_override(command), *words]).recipe
    except RecipeError as error:
        raise _without_probe(error, name, words, command) from error
    folder = options.out or Path("runs") / (recipe.name if wanted is None else f"{recipe.name}-coldstart")
    recipe = recipe if wanted is None else prepared(recipe)
    cores, again = find_cores(), processes.typed()
    count = processes.number_of(recipe, cores, os.environ) if again else 1
    if not options.json:
        from rlcs.recipe.table import summary_rows

        rows = [] if wanted is None else [("cold starts", described(wanted, recipe))]
        if count > 1:
            rows.append(("processes", processes.described(count, cores, os.environ)))
        print_choices(recipe.name, folder, [*summary_rows(recipe), *rows])
    with processes.started(count, again, cores) as ranks:
        _run(recipe, folder, options, seeds=seeds, wanted=wanted, ranks=ranks)


def _run(
    recipe: "Recipe",
    folder: Path,
    options: RunOptions,
    *,
    seeds: int,
    wanted: "Wanted | None",
    ranks: "Ranks",
) -> None:
    """Read the data, meet the other ranks, and train."""
    from rlcs.pipeline.run_folder import claim

    if wanted is None and seeds == 1:
        claim(folder, recipe, dry=True)  # before images of the data are written there
    data = _data(recipe, folder, dry=options.dry_run, json=options.json)
    ranks.reads_data = False

    from rlcs.distributed import join_world
    from rlcs.model.loading import use_expandable_segments
    from rlcs.pipeline.coldstart import ColdStart
    from rlcs.pipeline.seeds import run_seeds
    from rlcs.pipeline.study import dry_run
    from rlcs.progress import Output
    from rlcs.report.coldstart import lines
    from rlcs.signals import StopFlag

    if recipe.rollout.engine != "vllm_colocated":  # handing weights to it takes much longer with them
        use_expandable_segments()
    output = Output(quiet=options.quiet, json=options.json)
    parallel = recipe.parallel
    joined = join_world(timeout_s=parallel.timeout_s, shard_size=parallel.shard_size)
    with StopFlag() as stop, joined as world:
        ranks.have_met = True
        if options.dry_run:
            first = folder if seeds == 1 else folder / f"seed-{recipe.seed}"
            tried = dry_run(recipe, first, data=data, output=output, stop=stop, world=world)
            found = f"\n{len(tried)} checks passed; nothing was trained and nothing written"
            return print_result({"folder": str(folder), "seconds": tried}, [found], json=options.json)
        if wanted is not None:
            study = ColdStart(recipe, wanted, folder, data=data, output=output, stop=stop, world=world).run()
            page = f"\npage     {folder / 'report' / 'index.html'}"
            return print_result(study, ["", *lines(study), page], json=options.json)
        summary = run_seeds(recipe, folder, seeds, data=data, output=output, stop=stop, world=world)
    result = {"summary": str(folder / "summary.json"), "arms": summary["arms"]}
    print_result(result, _arm_lines(summary["arms"], folder), json=options.json)


def _data(recipe: "Recipe", folder: Path, *, dry: bool, json: bool) -> "RunData":
    """Read the data before torch is loaded: a bad file is reported at once."""
    from rlcs.data.run_data import load_run_data
    from rlcs.progress import Output, RowProgress
    from rlcs.train.trackers import require_installed

    require_installed(recipe.trackers)
    many = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 and not dry
    with Output(quiet=True, json=json).screen("data", 0) as view:
        return load_run_data(
            recipe.study,
            recipe.data,
            decode_limit=recipe.images.decode_limit,
            validation=recipe.validation,
            store=folder / "images" if many else None,  # else every process holds all embedded images
            watch=RowProgress(view, "rows read"),
        )


def _without_probe(error: RecipeError, name: str, words: list[str], command: str) -> RecipeError:
    """The error of a recipe; for a hand-over that needs both stages, with the command that runs them."""
    if command not in ("sft", "grpo") or "sft.handover.rule=probe tries" not in error.what:
        return error
    lacks = {"sft": "trains no RL", "grpo": "has no SFT"}[command]
    both = shlex.join(["rlcs", "run", name, *words])
    return RecipeError(
        f"`rlcs {command}` {lacks}, and sft.handover.rule=probe tries RL from checkpoints of SFT",
        where=f"rlcs {command}",
        fix=f"{both} does both; for this stage alone add sft.handover.rule=last",
    )


def print_choices(name: str, folder: Path, rows: list[tuple[str, str]]) -> None:
    """Print the table of a recipe's choices, and the run's folder."""
    width = max(len(choice) for choice, _ in rows)
    typer.echo(f"{name} -> {folder}")
    for choice, value in rows:
        typer.echo(f"  {choice:<{width}}  {value}")


def _arm_lines(arms: dict[str, Any], folder: Path) -> list[str]:
    from rlcs.recipe.arms import ARMS, MAIN_FIRST

    lines = [""]
    for arm, scores in arms.items():
        low, high, label = scores["low"], scores["high"], ARMS[arm].label
        unscored = f", {scores['unscored']:,} not scored" if scores["unscored"] else ""
        count = f"n={scores['n']:,}{unscored}"
        lines.append(f"  {label:<18} {scores['accuracy']:6.1%}   [{low:.1%}, {high:.1%}]  {count}")
    seeds = sorted(folder.glob("seed-*"))
    models = [(seeds[0] if seeds else folder) / name / "final" for name in MAIN_FIRST]
    return [
        *lines,
        f"\nreport   {folder / 'report' / 'index.html'}",
        f"summary  {folder / 'summary.json'}",
        f"model    {next((model for model in models if model.exists()), models[0])}",
    ]
