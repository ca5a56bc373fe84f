"""Options of several commands, and commands whose options are the fields of a dataclass."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from rlcs.cli import completion


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides, e.g. grpo.steps=20",
        autocompletion=completion.overrides,
    ),
]
RecipeName = Annotated[str, typer.Argument(help="A recipe's name or file", autocompletion=completion.recipes)]
ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Run (RUN@80: a checkpoint), folder, hub id, builtin",
        autocompletion=completion.models,
    ),
]
ExportedFolder = Annotated[
    Path, typer.Argument(help="A folder that `rlcs export` or `rlcs data export` wrote")
]
Repository = Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub")]
Private = Annotated[bool, typer.Option("--private/--public", help="Who can see it")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list the files, send nothing")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text")]
KeyVariable = Annotated[str, typer.Option(help="Environment variable with the key")]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The options of sampling."""

    temperature: Annotated[float, typer.Option(min=0, callback=_finite, help="0 is greedy")] = 0.0
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="Nucleus sampling")] = 1.0
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer")] = 2048
    seed: Annotated[int, typer.Option(help="Seed of sampling")] = 0
    batch: Annotated[int, typer.Option(min=1, help="Answers generated at once by a local model")] = 64
    json: Json = False


def with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Make a command with one option for each field of the dataclass of its parameter `options`."""
    parameters = dict(inspect.signature(verb).parameters)
    kind = parameters.pop("options").annotation
    # Fields of base classes come last.
    ordered = sorted(fields(kind), key=lambda option: option.name not in kind.__annotations__)

    def command(**values: Any) -> None:
        options = kind(**{option.name: values.pop(option.name) for option in ordered})
        verb(options=options, **values)

    by_name = inspect.Parameter.KEYWORD_ONLY
    own = [each.replace(kind=by_name) for each in parameters.values()]
    own += [inspect.Parameter(o.name, by_name, default=o.default, annotation=o.type) for o in ordered]
    command.__name__, command.__doc__ = verb.__name__, verb.__doc__
    command.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    return command


def same_fields(options: Any, kind: type[Any]) -> dict[str, Any]:
    """The values of those options that have the name of a field of another dataclass."""
    wanted = {each.name for each in fields(kind)}
    return {each.name: getattr(options, each.name) for each in fields(options) if each.name in wanted}
