"""The command `rlcs plan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from rlcs.cli.options import Overrides, RecipeName, with_options
from rlcs.cli.output import print_result

Command = Literal["run", "ablate", "quickstart", "sft", "grpo"]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of `rlcs plan`."""

    gpus: Annotated[int, typer.Option(help="GPUs that share the work, all nodes together; 0: this CPU")] = 1
    gpu: Annotated[str, typer.Option(help="H100, A100-80, L40S, RTX4090, ...")] = "H100"
    memory: Annotated[
        float | None, typer.Option(help="GB (2**30 bytes) of each GPU, instead of its data sheet's")
    ] = None
    assume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="text=128, image=400, answer=512 (tokens), spread=0.5, equal=0.3, utilization=0.4, "
            "peak=TFLOPS, demonstrations=N; may be repeated",
        ),
    ] = None
    measured: Annotated[
        Path | None,
        typer.Option(help="Rates from `rlcs doctor --gpu --out FILE`, in place of guesses"),
    ] = None
    command: Annotated[Command, typer.Option(help="What is planned: each command has arms of its own")] = (
        "run"
    )
    seeds: Annotated[int, typer.Option(min=1, help="As of `rlcs ablate`")] = 1
    price: Annotated[
        str | None, typer.Option(help='Of a GPU-hour, as 2.5 or "2.50 USD"; the total is given in it too')
    ] = None
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Also every second of a step, and the rates from which it follows"),
    ] = False
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text")] = False


@with_options
def plan(recipe: RecipeName, options: PlanOptions, overrides: Overrides = None) -> None:
    """Plan memory, work and time of each stage, and their total. With advice where a recipe does not fit."""
    from dataclasses import replace
    from shutil import get_terminal_size

    from rlcs.plan import machine
    from rlcs.plan.measured import read_rates
    from rlcs.plan.price import parse_price
    from rlcs.recipe.arms import arms_override
    from rlcs.recipe.loading import load_recipe, read_section

    # Before torch is loaded: a mistyped name is reported at once.
    overrides = [*arms_override(options.command), *(overrides or [])]
    load_recipe(recipe, overrides)
    price = None if options.price is None else parse_price(options.price)
    assumed = read_section(machine.Assumed, options.assume or [], where="--assume")
    chosen = machine.machine(options.gpus, options.gpu, memory=options.memory, peak=assumed.peak)
    rates = None if options.measured is None else read_rates(options.measured)

    from rlcs.plan.page import make_plan

    made = make_plan(recipe, overrides, chosen, assumed, rates)
    made = replace(made, total=replace(made.total, price=price, seeds=options.seeds))
    width = min(get_terminal_size((100, 24)).columns, 120)
    rest = made.explanation(width) if options.explain else made.hint
    print_result(made.to_json(), [made.to_text(), "", rest], json=options.json)
