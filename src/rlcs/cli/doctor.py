"""The command `rlcs doctor`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rlcs.cli.options import Json
from rlcs.cli.output import print_result


def doctor(
    run: Annotated[Path | None, typer.Argument(help="A run folder to check")] = None,
    json: Json = False,
) -> None:
    """Check this machine, or the run RUN. Of the machine also the built-in model on it."""
    about: dict[str, str] = {}
    if run is None:
        from rlcs.doctor.machine import checks, facts

        about, findings = facts(), checks()
    else:
        from rlcs.doctor.health import examine

        findings = examine(run)
    lines = [f"{name:<13} {value}" for name, value in about.items()]
    for finding in findings:
        lines.append(f"{'!!' if finding.bad else 'ok'} {finding.name}: {finding.message}")
        lines += [f"   -> {finding.fix}"] if finding.bad else []
    print_result({"facts": about, "findings": [asdict(finding) for finding in findings]}, lines, json=json)
    if any(finding.bad for finding in findings):
        raise typer.Exit(1)
