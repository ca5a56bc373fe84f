"""The table of all checks on screen, and the same as JSON to attach to a report or to give to `rlcs plan`."""

import math
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from textwrap import TextWrapper
from typing import Any

from rlcs.doctor.gpu import Check
from rlcs.plan.measured import Rates

_FOLDERS = re.compile(r"(?<![\w:/.~])[/~](?:[^\s/:,;'\"()]*/)+")
_WIDTH = 11


def table(checks: Sequence[Check], width: int = 100) -> list[str]:
    """Lines for the screen: a mark, the name, the seconds, what was found; what to do about a problem."""
    whole = TextWrapper(width=width, break_on_hyphens=False, break_long_words=False)
    marks = {True: "ok", False: "!!", None: "--"}
    lines = []
    for check in checks:
        text = check.message if check.ok is not None else f"skipped: {check.message}"
        head = f"{marks[check.ok]} {check.name:<{_WIDTH}} {check.seconds:6.1f} s  "
        whole.subsequent_indent = " " * len(head)
        lines += whole.wrap(head + text)
        lines += [f"   -> {check.fix}"] if check.fix else []  # in one line, to be copied
    return lines


def to_json(checks: Sequence[Check], *, device: str, ranks: int) -> dict[str, Any]:
    """All results without names of hosts and folders, and the rates together."""
    merged: dict[str, float] = {}
    for check in checks:
        merged |= {name: rate for name, rate in check.rates.items() if 0 < rate < _most(name)}
    rates = Rates(device=device, **merged)
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device,
        "ranks": ranks,
        "ok": all(check.ok is not False for check in checks),
        "rates": rates.to_json(),
        "checks": [{k: v for k, v in asdict(check).items() if k != "rates"} for check in checks],
    }
    public: dict[str, Any] = without_names(found)
    return public


def _most(name: str) -> float:
    """The bound of a rate; a share of the peak above 1 comes from a wrong peak, and says nothing."""
    return 1.0 if name.endswith("_share") else math.inf


def without_names(value: Any) -> Any:
    """The value without names of this host, its user and its folders; numbers that JSON lacks as text."""
    if isinstance(value, str):
        for name, instead in ((socket.gethostname(), "HOST"), (Path.home().name, "USER")):
            if len(name) > 3:
                value = re.sub(rf"\b{re.escape(name)}\b", instead, value)
        return _FOLDERS.sub(".../", value)
    if isinstance(value, Mapping):
        return {str(key): without_names(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_names(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
