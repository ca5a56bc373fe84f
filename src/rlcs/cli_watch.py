"""The verbs that look at a run: report."""

from pathlib import Path
from typing import Annotated

import typer

watch_app = typer.Typer()


@watch_app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder")]) -> None:
    """Write the report of a run again: RUN/report/index.html."""
    from rlcs.report import build

    typer.echo(build(run))
