"""The command `rlcs plan`."""

from typing import Annotated

import typer

from rlcs.cli.options import Json, Overrides, RecipeName
from rlcs.cli.output import print_result


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
    json: Json = False,
) -> None:
    """Plan memory, work and time of each stage. With advice where a recipe does not fit."""
    from rlcs.plan import machine
    from rlcs.plan.page import make_plan
    from rlcs.recipe.loading import read_section

    assumed = read_section(machine.Assumed, assume or [], where="--assume")
    chosen = machine.machine(gpus, gpu, memory=memory, peak=assumed.peak)
    made = make_plan(recipe, overrides or [], chosen, assumed)
    print_result(made.to_json(), [made.to_text()], json=json)
