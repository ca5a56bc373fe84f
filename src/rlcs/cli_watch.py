"""The verbs that look at a run: report."""

from pathlib import Path
from typing import Annotated

import typer

watch_app = typer.Typer()


@watch_app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder")],
    live: Annotated[bool, typer.Option("--live", help="Serve a page that follows the run")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --live; 0: any")] = 8642,
) -> None:
    """Write the report of a run again (RUN/report/index.html), or watch the run live in a browser."""
    if not live:
        from rlcs.report import build

        typer.echo(build(run))
        return
    from rlcs.report.live import LiveReport

    with LiveReport(run, port) as server:
        typer.echo(f"{server.url}   Ctrl-C ends this page, never the run")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("")
