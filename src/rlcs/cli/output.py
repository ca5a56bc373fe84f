"""Prints results of commands, as JSON or text, and rows that were left out."""

import json as jsonlib
from collections.abc import Mapping, Sequence

import typer


def print_result(value: Mapping[str, object], lines: Sequence[str], *, json: bool) -> None:
    """Print a result as one JSON object, or as lines of text."""
    typer.echo(jsonlib.dumps(value) if json else "\n".join(lines))


def print_left_out(label: str, rows: Sequence[object], *, most: int = 20) -> None:
    """Print the first unusable rows on stderr."""
    for row in rows[:most]:
        typer.echo(f"{label}: {row}", err=True)
    if len(rows) > most:
        typer.echo(f"{label}: {len(rows) - most:,} more", err=True)
