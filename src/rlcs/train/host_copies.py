"""Copies of a state's tensors in main memory, from which a thread can write while training goes on."""

import logging
import weakref
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor

log = logging.getLogger("rlcs")

MEMORY_SHARE = 0.8
"""The share of the free main memory that the copies of all ranks of a machine may take."""
_STEP = 64
"""Bytes at whose multiples each copy begins."""

Files = Mapping[str, Mapping[str, Tensor]]
"""The tensors of each file, by their names."""


class HostCopies:
    """One buffer for all copies; pinned where tensors come from a GPU, and kept, as pinning takes seconds."""

    def __init__(self, *, ranks: int) -> None:
        """Takes no memory yet; `ranks` processes of this machine each take as much."""
        self._ranks = ranks
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._refused = False

    def of(self, files: Files) -> Files | None:
        """Copies of the tensors, or None where they do not fit into the free main memory, which is logged.

        The copies of the call before are overwritten.
        """
        tensors = [tensor for of_file in files.values() for tensor in of_file.values()]
        if not self._reserve(sum(map(_aligned, tensors)), pinned=any(tensor.is_cuda for tensor in tensors)):
            return None
        end = 0
        copies: dict[str, dict[str, Tensor]] = {}
        for file, of_file in files.items():
            copies[file] = {}
            for name, tensor in of_file.items():
                start, end = end, end + _aligned(tensor)
                copy = self._buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                copies[file][name] = copy.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _reserve(self, size: int, *, pinned: bool) -> bool:
        """Make the buffer large enough; whether it is."""
        if size <= self._buffer.nbytes:
            return True
        needed, free = size * self._ranks, free_memory()
        if needed > MEMORY_SHARE * free:
            if not self._refused:
                log.warning(
                    "training waits while checkpoints are written: to write in the background takes a copy "
                    "of %.1f GB in main memory, of which %.1f GB are free",
                    needed / 1e9,
                    free / 1e9,
                )
            self._refused = True
            return False
        self._buffer = torch.empty(size, dtype=torch.uint8)
        if pinned:
            _pin(self._buffer)
        return True


def _pin(buffer: Tensor) -> None:
    """Pin memory until it is freed; torch's own pinned memory comes in powers of two."""
    cuda, address = torch.cuda.cudart(), buffer.data_ptr()
    try:
        torch.cuda.check_error(cuda.cudaHostRegister(address, buffer.nbytes, 1))  # for all devices
    except torch.cuda.CudaError as error:
        log.warning("checkpoints are copied slowly, as their memory cannot be pinned: %s", error)
    else:
        weakref.finalize(buffer, cuda.cudaHostUnregister, address)


def free_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory that are free on the machine, or in the container where that has a limit."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        words = (group / "memory.stat").read_text().split()
    except (OSError, ValueError):  # another system, or no limit
        return free
    files = dict(zip(words[::2], words[1::2], strict=True))
    cached = sum(int(files.get(name, 0)) for name in ("active_file", "inactive_file"))
    return min(free, limit - used + cached)


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _STEP) * _STEP
