"""What verbs print: a result for a script or for a person, and rows that were left out."""

import json as jsonlib
from collections.abc import Mapping, Sequence

import typer


def print_result(value: Mapping[str, object], lines: Sequence[str], *, json: bool) -> None:
    """What a verb found: one JSON object for a script, or lines for a person."""
    typer.echo(jsonlib.dumps(value) if json else "\n".join(lines))


def print_left_out(label: str, rows: Sequence[object], *, most: int = 20) -> None:
    """The first rows that could not be used, on stderr."""
    for row in rows[:most]:
        typer.echo(f"{label}: {row}", err=True)
    if len(rows) > most:
        typer.echo(f"{label}: {len(rows) - most:,} more", err=True)
