"""The verb `rlcs plan`."""

import json as jsonlib
from typing import Annotated

import typer


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. grpo.group_size=8")
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs that share the work, all nodes together; 0: this CPU")] = 1,
    gpu: Annotated[str, typer.Option(help="H100, A100-80, L40S, RTX4090, ...")] = "H100",
    memory: Annotated[
        float | None, typer.Option(help="GB (2**30 bytes) of each, in place of its own")
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="text=128, image=400, answer=512 (tokens), utilization=0.4, peak=TFLOPS, "
            "demonstrations=N; may be repeated",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object")] = False,
) -> None:
    """Memory, work and time of each stage. What to change when it does not fit."""
    from rlcs.plan import machine
    from rlcs.plan.page import make_plan

    assumed = machine.assume(assume or [])
    chosen = machine.machine(gpus, gpu, memory=memory, peak=assumed.peak)
    made = make_plan(recipe, overrides or [], chosen, assumed)
    typer.echo(jsonlib.dumps(made.to_json()) if json else made.to_text())
