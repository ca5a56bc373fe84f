"""The commands that show runs and examples: report, compare, look."""

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import Annotated, Any

import typer

from rlcs.cli.options import Json, Overrides

report_app = typer.Typer()


@report_app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder")],
    live: Annotated[bool, typer.Option("--live", help="Serve a page that follows the run")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --live; 0: any")] = 8642,
) -> None:
    """Write a run's report, or serve a live one. To RUN/report/index.html, or to a browser."""
    if not live:
        from rlcs.report import build

        typer.echo(build(run))
        return
    from rlcs.report.live import LiveReport, make_app
    from rlcs.serving.web import listen, run_until_stopped

    app = make_app(LiveReport(run))
    with listen("127.0.0.1", port) as sock:
        typer.echo(f"http://127.0.0.1:{sock.getsockname()[1]}/   Ctrl-C ends this page, never the run")
        run_until_stopped(app, sock)


@report_app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A run folder")],
    second: Annotated[Path, typer.Argument(help="Another; differences are second minus first")],
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with curves")] = None,
    json: Json = False,
) -> None:
    """Compare two runs. Accuracy with paired intervals, recipes, seconds, curves."""
    from rlcs.report import compare as comparing

    found, sides = comparing.compare(first, second)
    if html is not None:
        comparing.write_html(html, found, sides)
    if json:
        typer.echo(jsonlib.dumps(asdict(found)))
        return
    for line in (found.headline, found.lead, "", *map("{}: {}".format, "AB", found.names), ""):
        typer.echo("\n".join(wrap(line, get_terminal_size().columns, break_long_words=False)))
    for title, head, rows in _tables(found):
        _print_table(title, head, rows)
    if html is not None:
        typer.echo(f"page     {html}")


def _tables(found: Any) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    from rlcs.recipe.arms import ARMS
    from rlcs.report.pages import chance, digits, points, settings

    gaps = [
        (
            ARMS[gap.arm].label, f"{gap.first:.1%}", f"{gap.second:.1%}",
            f"{points(gap.points)} [{points(gap.low)}, {points(gap.high)}]",
            f"+{gap.gained:,} −{gap.lost:,} of {gap.shared:,}" if gap.shared else "not paired",
            chance(gap.p),
        )
        for gap in found.gaps
    ]  # fmt: skip
    seconds = [
        (key, *("–" if v is None else f"{v:,.0f}" for v in pair)) for key, pair in found.seconds.items()
    ]
    return [
        ("accuracy", ("arm", "A", "B", "B - A, points", "right in one alone", "p"), gaps),
        ("recipe", ("", "A", "B"), [(key, *settings(pair)) for key, pair in found.recipe.items()]),
        ("seconds", ("", "A", "B"), seconds),
        ("last steps", ("", "A", "B"), [(key, *map(digits, pair)) for key, pair in found.ends.items()]),
    ]


def _print_table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        typer.echo(f"{title}: {'the same' if title == 'recipe' else 'nothing measured'}\n")
        return
    table = Table(*head, title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


@report_app.command()
def look(
    what: Annotated[str, typer.Argument(help="A recipe, a run, or a data source")],
    overrides: Overrides = None,
    row: Annotated[int, typer.Option("--row", min=0, help="Which row")] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page")] = None,
) -> None:
    """Show one training example as the model gets it. Tokens, loss weights, image patches."""
    from rlcs.report.preview import look_at, print_view, write_html

    view = look_at(what, overrides or [], row=row)
    print_view(view)
    if html is not None:
        write_html(view, html)
        typer.echo(f"page     {html}")
