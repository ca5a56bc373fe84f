"""The machine of a plan (known GPUs by name, or this computer's CPU), and the assumptions of a plan."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated

from pydantic import Field, NonNegativeInt

from rlcs.cores import usable_cores
from rlcs.data.sources import suggest
from rlcs.errors import UserError
from rlcs.recipe.section import Positive, Section

FP32 = 4
"""Bytes of a float32 number."""
GIB = 2**30
"""A GB of GPU memory, as makers count it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One GPU: memory in GiB, dense peaks in FLOP/s with bfloat16 and with float32, memory bytes a second.

    `link` is the bytes a second that it receives from the other GPUs of its machine.
    """

    name: str
    memory: float
    bfloat16: float
    float32: float
    bandwidth: float
    link: float


GPUS: Mapping[str, Device] = {
    name: Device(
        name=name,
        memory=memory,
        bfloat16=bfloat16 * 1e12,
        float32=float32 * 1e12,
        bandwidth=speed * 1e9,
        link=link * 1e9,
    )
    for name, memory, bfloat16, float32, speed, link in (
        ("A10", 24, 125, 31.2, 600, 32),
        ("A100-40", 40, 312, 19.5, 1555, 300),
        ("A100-80", 80, 312, 19.5, 2039, 300),
        ("A6000", 48, 155, 38.7, 768, 32),
        ("B200", 180, 2250, 75, 7700, 900),
        ("H100", 80, 989, 67, 3350, 450),
        ("H100-PCIe", 80, 756, 51, 2000, 64),
        ("H200", 141, 989, 67, 4800, 450),
        ("L4", 24, 121, 30.3, 300, 32),
        ("L40S", 48, 362, 91.6, 864, 32),
        ("MI300X", 192, 1307, 163, 5300, 448),
        ("RTX3090", 24, 71, 35.6, 936, 32),
        ("RTX4090", 24, 165, 82.6, 1008, 32),
        ("RTX5090", 32, 210, 105, 1792, 64),
    )
}
"""Makers' data sheets: memory, dense tensor-core bfloat16, plain float32 (PyTorch's default), bandwidth, and
the link to other GPUs in one direction (NVLink where all are connected by it, else PCIe)."""

CPU_CORE = 5e10
"""FLOP/s of one CPU core with float32: a guess, about half of the peak of AVX-512."""
CPU_BANDWIDTH = 2e10
"""Memory bytes a second of a computer without GPU: a guess."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A number of equal GPUs, or one CPU where `gpus` is 0."""

    gpus: int
    device: Device

    @property
    def devices(self) -> int:
        """The number of devices that share the work."""
        return max(1, self.gpus)


class Assumed(Section):
    """Values that depend on the data and the machine, and are assumed."""

    text: Positive = 128
    """Tokens of a prompt's text."""
    image: NonNegativeInt = 400
    """Tokens of a prompt's image."""
    answer: Positive = 512
    """Tokens of an answer."""
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Reached share of the peak speed, where it was not measured."""
    spread: Annotated[float, Field(ge=0, le=3)] = 0.5
    """Spread of the answers' lengths: their standard deviation, as a share of their mean."""
    equal: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the groups of G answers whose rewards are all equal, which dynamic sampling replaces. None:
    2 / (G + 1), as where every rate of right answers is equally frequent."""
    demonstrations: NonNegativeInt = 0
    """Demonstrations of SFT; 0: unknown."""
    peak: Annotated[float, Field(ge=0)] = 0.0
    """Peak in TFLOP/s; 0: the table's."""


def machine(gpus: int, gpu: str, *, memory: float | None, peak: float) -> Machine:
    """The machine that the options describe; `memory` in GiB and `peak` in TFLOP/s override the table.

    Raises UserError for an unknown GPU or an impossible number.
    """
    if gpus < 0:
        raise UserError(f"{gpus} GPUs", where="--gpus", fix="give a number of GPUs; 0 plans for this CPU")
    if memory is not None and not memory > 0:
        raise UserError(f"{memory:g} GB of memory", where="--memory", fix="such as 80")
    known = {name.lower(): device for name, device in GPUS.items()}
    if gpu.lower() not in known:
        fix = f"{suggest(gpu, list(GPUS))}, or the nearest one with --memory and --assume peak=TFLOPS"
        raise UserError(f"no GPU {gpu!r} is known", where="--gpu", fix=fix)
    device = known[gpu.lower()] if gpus else _this_cpu()
    if memory is not None:
        device = replace(device, memory=memory)
    if peak:
        device = replace(device, bfloat16=peak * 1e12, float32=peak * 1e12)
    return Machine(gpus=gpus, device=device)


def _this_cpu() -> Device:
    peak = CPU_CORE * usable_cores()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Device(
        name="CPU",
        memory=memory,
        bfloat16=peak,
        float32=peak,
        bandwidth=CPU_BANDWIDTH,
        link=CPU_BANDWIDTH,
    )


def device_named(name: str) -> str:
    """The key in GPUS of a device as its driver names it (`NVIDIA A100-SXM4-80GB`); "" for an unknown one."""
    words = re.split(r"[\s\-_]+", name.upper())
    words += ["".join(pair) for pair in pairwise(words)]  # RTX 4090

    def matched(key: str) -> int:
        parts = key.upper().split("-")
        if "LAPTOP" in words:  # slower chips under the same name
            return 0
        found = [part in words or f"{part}GB" in words for part in parts]
        return len(parts) if all(found) else 0

    best = max(GPUS, key=matched)
    return best if matched(best) else ""
