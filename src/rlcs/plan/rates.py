"""The rates by which a plan computes its seconds: measured by `rlcs doctor --gpu`, or guessed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from rlcs.errors import UserError
from rlcs.plan.checkpoints import DISK_WRITE, TO_HOST
from rlcs.plan.machine import Assumed, Device, Machine, device_named
from rlcs.plan.measured import Rates

Basis = Literal["measured", "computed", "guessed"]
"""How a figure is known: from measured rates, from shapes and settings alone, or from a guessed rate too."""

NODE = 8
"""GPUs of one machine; more are taken to be on several."""
NETWORK = 4e10
"""Bytes a second that a GPU receives from other machines: 400 Gb/s each, of which 80% are reached."""
READING = 0.6
"""Reached share of the memory bandwidth."""
LINK = 0.7
"""Reached share of the link between GPUs, in all-gather and reduce-scatter."""
CONSTANT: Mapping[str, float] = {
    "decode_step_s": 5e-3,  # vLLM with CUDA graphs: scheduling, sampling, logprobs
    "weights_to_vllm": 1e10,
    "wake_s": 1.0,  # vLLM's blog: 0.1 to 6 s on level 1, 0.8 to 2.6 s on level 2 (2025/10/26/sleep-mode)
    "sleep_s": 1.0,
    "start_s": 150.0,  # imports 30, weights 20, compiling 50, profile 15, CUDA graphs 35
    "to_host": TO_HOST,
    "disk_write": DISK_WRITE,
    "disk_read": 1e9,
    "images": 30.0,  # 15 ms to decode and resize one megapixel on one core, and patches
    "local_layer_s": 2.5e-3,  # 90 ms a step of 36 layers: some 60 kernels a layer, launched from Python
    "grades": 500.0,  # thousands where the strings decide, tens where a formula must be simplified
}
"""Guesses that do not depend on the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """Every rate by its name in `Rates`, and the names of those that were measured."""

    values: Mapping[str, float]
    measured: frozenset[str]

    def __getitem__(self, name: str) -> float:
        """The rate of this name."""
        return self.values[name]

    def basis(self, names: Iterable[str]) -> Basis:
        """How a figure is known that follows from these rates."""
        names = set(names)
        if not names:
            return "computed"
        return "measured" if names <= self.measured else "guessed"


def speeds_of(machine: Machine, assumed: Assumed, rates: Rates | None = None) -> Speeds:
    """The rates of a machine: those that were measured, and guesses for the rest."""
    shares = ("forward_share", "update_share", "vision_share", "prefill_share")
    device = machine.device
    guessed = {
        **CONSTANT,
        **dict.fromkeys(shares, assumed.utilization),
        "decode_read": device.bandwidth * READING,
        "collective": device.link * LINK,
    }
    known = {} if rates is None else {k: float(v) for k, v in rates.to_json().items() if k != "device"}
    assert guessed.keys() == {field.name for field in fields(Rates)} - {"device"}, "a guess for every rate"
    return Speeds(values={**guessed, **known}, measured=frozenset(known))


def least_certain(bases: Iterable[Basis]) -> Basis:
    """How a sum is known: as well as its least certain part."""
    found = set(bases)
    return "guessed" if "guessed" in found else "measured" if "measured" in found else "computed"


def device_warning(rates: Rates, device: Device) -> str:
    """A warning where the measured device is not in the table. Raises UserError where it is another one."""
    found = device_named(rates.device)
    on_cpu = rates.device.lower() == "cpu"
    if found == device.name or (on_cpu and device.name == "CPU"):
        return ""
    if found or on_cpu or device.name == "CPU":
        fix = (
            f"plan with --gpu {found}" if found else "plan with --gpus 0" if on_cpu else "plan with --gpus 1"
        )
        raise UserError(
            f"it was measured on {rates.device}, and the plan is for {device.name}",
            where="--measured",
            fix=f"{fix}, or measure on such a device",
        )
    return f"measured on {rates.device}, which no table has: it is taken for {device.name}"
