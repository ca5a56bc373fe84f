"""Verbs with more options than a function should have parameters."""

import inspect
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

import typer


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number to compute with")
    return value


Temperature = Annotated[float, typer.Option(min=0, callback=_finite, help="0 is greedy")]


def with_options(options: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb that takes `**chosen` one option for each field of a dataclass."""

    def widen(verb: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(verb)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        new = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(options)
        ]
        verb.__signature__ = signature.replace(parameters=[*own, *new])  # type: ignore[attr-defined]
        return verb

    return widen
