"""Rates measured on a machine by `rlcs doctor --gpu`, with which a plan replaces its guesses."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rlcs.errors import DataError, UserError
from rlcs.storage import read_regular


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
    prefill_share: float | None = None
    """Share of the peak reached by vLLM while it reads prompts with their images."""
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
    local_layer_s: float | None = None
    """Least seconds of one layer in a decoding step of the local engine."""
    grades: float | None = None
    """Answers a second that one grader process grades by the rule."""

    def to_json(self) -> dict[str, Any]:
        """The rates that were measured."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def read_rates(path: Path) -> Rates:
    """The rates in a file that `rlcs doctor --gpu --out FILE` wrote. Raises UserError for any other file."""
    try:
        content = json.loads(read_regular(path))
    except DataError as error:
        raise _error(path, error.what) from error
    except ValueError as error:
        raise _error(path, "it is no JSON") from error
    found = content.get("rates") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("device"), str):
        raise _error(path, "it holds no measured rates of a device")
    numbers: dict[str, float] = {}
    for field in fields(Rates):
        if field.name == "device" or (value := found.get(field.name)) is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < float("inf"):
            raise _error(path, f"rates.{field.name} is {value!r}, and should be a number above 0")
        numbers[field.name] = float(value)
    return Rates(device=found["device"], **numbers)


def _error(path: Path, message: str) -> UserError:
    return UserError(
        message, where=f"--measured {path}", fix="give the file of `rlcs doctor --gpu --out FILE`"
    )
