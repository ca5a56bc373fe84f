"""Rates measured on a machine by `rlcs doctor --gpu --json`, with which a plan replaces its guesses."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rlcs.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What one device was measured to do; None: not measured.

    Shares are of the data sheet's dense peak in bfloat16. Bytes a second are of one device or process.
    """

    device: str
    """The device's name, as its driver gives it."""
    forward_share: float | None = None
    """Share of the peak reached by scoring a pack (no gradients)."""
    update_share: float | None = None
    """Share of the peak reached by a forward and backward pass over a pack, recomputed operations counted."""
    vision_share: float | None = None
    """Share of the peak reached by the vision tower."""
    prefill_tokens: float | None = None
    """Prompt tokens a second of vLLM."""
    decode_read: float | None = None
    """Bytes of weights and cache that vLLM reads a second while it decodes many rows."""
    decode_step_s: float | None = None
    """Least seconds of one decoding step of vLLM."""
    weights_to_vllm: float | None = None
    """Bytes of weights a second into a running vLLM."""
    wake_s: float | None = None
    """Seconds in which a sleeping vLLM wakes up."""
    sleep_s: float | None = None
    """Seconds in which vLLM frees its memory."""
    start_s: float | None = None
    """Seconds from the start of vLLM to its first answer."""
    to_host: float | None = None
    """Bytes a second from the device into pinned main memory."""
    disk_write: float | None = None
    """Bytes a second written to disk and synced by one process, with their checksum."""
    disk_read: float | None = None
    """Bytes a second read from disk by one process."""
    collective: float | None = None
    """Bytes a second that one device receives when weights are gathered from all others."""
    images: float | None = None
    """Images a second that one process decodes and resizes."""

    def to_json(self) -> dict[str, Any]:
        """The rates that were measured."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def read_rates(path: Path) -> Rates:
    """The rates in a file that `rlcs doctor --gpu --json` wrote. Raises UserError for any other file."""
    fix = "give the file of `rlcs doctor --gpu --json > FILE`"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rates = content["rates"]
        names = {field.name for field in fields(Rates)}
        known = {name: value for name, value in rates.items() if name in names}
        numbers = {name: float(value) for name, value in known.items() if name != "device"}
        if not all(0 < value < float("inf") for value in numbers.values()):
            raise ValueError("a rate is not a positive number")
        return Rates(device=str(known["device"]), **numbers)
    except OSError as error:
        raise UserError(f"cannot read it: {error.strerror}", where=f"--measured {path}", fix=fix) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("it holds no measured rates", where=f"--measured {path}", fix=fix) from error
