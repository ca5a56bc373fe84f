"""The device of a check: its data sheet, its clock, and the peak of its memory."""

import gc
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from rlcs.plan.machine import GPUS, device_named, machine


def device_name(device: torch.device) -> str:
    """The name that the driver gives the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_speed(device: torch.device) -> float | None:
    """FLOP/s of the data sheet in bfloat16; None of an unknown GPU. Of a CPU `rlcs plan`'s guess."""
    if device.type == "cpu":
        return machine(0, "A10", memory=None, peak=0).device.float32
    known = device_named(device_name(device))
    return GPUS[known].bfloat16 if known else None


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses, other processes included; of a CPU a small number for tests."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 30


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, *, repeats: int = 3) -> float:
    """Least seconds of the work over `repeats`, after one that does not count."""
    times = []
    for _ in range(1 + repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors at the worst moment of the work, above those before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    held = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        peak = max(peak, held)
    return peak
