"""The verb `rlcs doctor`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rlcs.cli.options import Json
from rlcs.cli.output import print_result


def doctor(
    run: Annotated[Path | None, typer.Argument(help="A run folder: what is wrong with it?")] = None,
    json: Json = False,
) -> None:
    """Check this machine; with RUN, that run. Without one, the fast paths on the built-in model."""
    about: dict[str, str] = {}
    if run is None:
        from rlcs.doctor.machine import checks, facts

        about, found = facts(), checks()
    else:
        from rlcs.doctor.health import examine

        found = examine(run)
    lines = [f"{name:<13} {value}" for name, value in about.items()]
    for one in found:
        lines.append(f"{'!!' if one.bad else 'ok'} {one.name}: {one.message}")
        lines += [f"   -> {one.fix}"] if one.bad else []
    print_result({"facts": about, "findings": [asdict(one) for one in found]}, lines, json=json)
    if any(one.bad for one in found):
        raise typer.Exit(1)
