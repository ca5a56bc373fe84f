"""The command `rlcs plan`."""

from typing import Annotated, Literal

import typer

from rlcs.cli.options import Json, Overrides, RecipeName
from rlcs.cli.output import print_result

Command = Literal["run", "ablate", "quickstart", "sft", "grpo"]


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="GPUs that share the work, all nodes together; 0: this CPU")] = 1,
    gpu: Annotated[str, typer.Option(help="H100, A100-80, L40S, RTX4090, ...")] = "H100",
    memory: Annotated[
        float | None, typer.Option(help="GB (2**30 bytes) of each GPU, instead of its data sheet's")
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="text=128, image=400, answer=512 (tokens), utilization=0.4, peak=TFLOPS, "
            "demonstrations=N; may be repeated",
        ),
    ] = None,
    command: Annotated[
        Command, typer.Option(help="The command that is planned: each has arms of its own")
    ] = "run",
    seeds: Annotated[int, typer.Option(min=1, help="As of `rlcs ablate`")] = 1,
    price: Annotated[
        str | None, typer.Option(help='Of a GPU-hour, as 2.5 or "2.50 USD"; the total is given in it too')
    ] = None,
    json: Json = False,
) -> None:
    """Plan memory, work and time of each stage, and their total. With advice where a recipe does not fit."""
    from dataclasses import replace

    from rlcs.plan import machine
    from rlcs.plan.price import parse_price
    from rlcs.recipe.arms import arms_override
    from rlcs.recipe.loading import load_recipe, read_section

    # Before torch is loaded: a mistyped name is told at once.
    overrides = [*arms_override(command), *(overrides or [])]
    load_recipe(recipe, overrides)
    paid = None if price is None else parse_price(price)
    assumed = read_section(machine.Assumed, assume or [], where="--assume")
    chosen = machine.machine(gpus, gpu, memory=memory, peak=assumed.peak)

    from rlcs.plan.page import make_plan

    made = make_plan(recipe, overrides, chosen, assumed)
    made = replace(made, total=replace(made.total, price=paid, seeds=seeds))
    print_result(made.to_json(), [made.to_text()], json=json)
