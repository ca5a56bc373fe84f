"""The verbs that look at runs and at the machine: report, compare, doctor."""

import json as jsonlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

watch_app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="One JSON object, for a script")]


@watch_app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder")],
    live: Annotated[bool, typer.Option("--live", help="Serve a page that follows the run")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --live; 0: any")] = 8642,
) -> None:
    """Write a run's report again, or watch the run live. In RUN/report/index.html, or in a browser."""
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


@watch_app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A run folder")],
    second: Annotated[Path, typer.Argument(help="Another; differences are second minus first")],
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with curves")] = None,
    json: Json = False,
) -> None:
    """Two runs side by side. Accuracy with paired intervals, recipes, seconds, curves."""
    from rlcs.report import compare as comparing

    found, sides = comparing.compare(first, second)
    if html is not None:
        comparing.write_html(html, found, sides)
    if json:
        typer.echo(jsonlib.dumps(asdict(found)))
        return
    for title, head, rows in _tables(found):
        _print_table(title, head, rows)
    if html is not None:
        typer.echo(f"page     {html}")


def _tables(found: Any) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    from rlcs.recipe.arms import ARMS

    gaps = [
        (
            ARMS[gap.arm].label, f"{gap.first:.1%}", f"{gap.second:.1%}",
            f"{100 * gap.points:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]",
            f"+{gap.gained:,} -{gap.lost:,} of {gap.shared:,}" if gap.shared else "not paired",
            "" if gap.p is None else f"{gap.p:.2g}",
        )
        for gap in found.gaps
    ]  # fmt: skip
    pairs: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("recipe", found.recipe, str),
        ("seconds", found.seconds, "{:,.0f}".format),
        ("last steps", found.ends, "{:.3g}".format),
    ]
    return [
        ("accuracy", ("arm", "A", "B", "B - A, points", "right in one alone", "p"), gaps),
        *(
            (
                title,
                ("", "A", "B"),
                [(key, *("-" if v is None else show(v) for v in pair)) for key, pair in rows.items()],
            )
            for title, rows, show in pairs
        ),
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


@watch_app.command()
def doctor(
    run: Annotated[Path | None, typer.Argument(help="A run folder: what ails it?")] = None,
    json: Json = False,
) -> None:
    """Check this machine; with RUN, what ails that run. Without one, the fast paths on the built-in model."""
    about: dict[str, str] = {}
    if run is None:
        from rlcs.doctor.machine import checks, facts

        about, found = facts(), checks()
    else:
        from rlcs.doctor.health import examine

        found = examine(run)
    if json:
        typer.echo(jsonlib.dumps({"facts": about, "findings": [asdict(one) for one in found]}))
    else:
        for name, value in about.items():
            typer.echo(f"{name:<13} {value}")
        for one in found:
            typer.echo(f"{'!!' if one.bad else 'ok'} {one.name}: {one.message}")
            if one.bad:
                typer.echo(f"   -> {one.fix}")
    if any(one.bad for one in found):
        raise typer.Exit(1)
