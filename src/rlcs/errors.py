"""Defines the errors that users see.

Every error that rlcs raises on purpose says what is wrong, where, and what to do. `UserError`
means that the input is at fault (exit code 2 on the command line); any other `RlcsError` means
that the run failed (exit code 1). Programming mistakes stay `AssertionError` or `ValueError`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from rlcs.redaction import shown


class RlcsError(Exception):
    """Base of all errors raised on purpose: what is wrong, where, and what to do."""

    exit_code = 1
    reported = False
    """Whether another process of the run shows it already."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        """Build the message from its three parts, without secrets; only `what` is required."""
        self.what, self.where, self.fix = shown(what), shown(where), shown(fix)
        super().__init__(str(self))

    def __str__(self) -> str:
        """One sentence a line: `where: what`, then what to do."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  -> {self.fix}" if self.fix else head

    def __reduce__(self) -> tuple[object, ...]:
        """Keep all three parts when a worker process (a grader) sends the error to its parent."""
        return (partial(type(self), where=self.where, fix=self.fix), (self.what,))


class UserError(RlcsError):
    """The input is at fault: exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe file, key or value that cannot be used."""


class DataError(UserError):
    """A data source, file or row that cannot be used."""


class ImageError(DataError):
    """An image that is missing, broken, too large or too oddly shaped."""


class PromptError(DataError):
    """A problem that cannot become a prompt: too long, or images and slots disagree."""


class ModelError(UserError):
    """A model that cannot be loaded or is of an unknown family."""


class EndpointError(UserError):
    """A model server that cannot be used: wrong address, key or model name."""


class RunFolderError(UserError):
    """A run folder that belongs to another recipe, or cannot be written."""


class CheckpointError(RlcsError):
    """A checkpoint that is incomplete or damaged."""


class TrainingError(RlcsError):
    """A run that cannot go on: too many bad steps, or a fast path that disagrees with a plain one."""


class OutOfMemory(RlcsError):
    """Memory ran out; `where` is the part of the work that needed it, from the outermost to the innermost."""


NEED_LESS = "use a smaller model, fewer or shorter answers at once, or a device with more memory"
"""What to do where nothing more is known."""


@contextmanager
def out_of_memory_in(phase: str, *, fix: str = "") -> Iterator[None]:
    """Turn running out of memory in a phase of the work into OutOfMemory, with what to change.

    Phases may be nested: the outer one's name comes first, and its `fix` replaces that of the inner one.
    """
    try:
        yield
    except OutOfMemory as error:
        where = ": ".join(name for name in (phase, error.where) if name)
        raise OutOfMemory(error.what, where=where, fix=fix or error.fix) from error
    except (RuntimeError, ValueError, MemoryError) as error:
        what = "the memory of Python ran out" if isinstance(error, MemoryError) else shortage(str(error))
        if not what:
            raise
        raise OutOfMemory(what, where=phase, fix=fix or NEED_LESS) from error


_SIZE = r"([\d.]+) (GiB|MiB|KiB|bytes)"
_UNITS = {"bytes": 1 / 2**30, "KiB": 1 / 2**20, "MiB": 1 / 2**10, "GiB": 1.0}
_TORCH = re.compile(r"out of memory|can't allocate memory|not enough memory: you tried|_STATUS_ALLOC_FAILED")
_VLLM = re.compile(
    r"[^\n]*(?:No available memory for the cache blocks|less than desired GPU memory utilization"
    r"|available KV cache memory)[^\n]*"
)
_LONGEST = 300


def shortage(message: str) -> str:
    """What a message of torch or vLLM says about memory that ran out, in GB of 2**30 bytes; "" of others."""
    if vllm := _VLLM.search(message):
        return f"vLLM has too little memory for its cache of keys and values: {vllm[0].strip()[:_LONGEST]}"
    if not _TORCH.search(message):
        return ""
    kind = "main memory" if "CPUAllocator" in message or "not enough memory" in message else "GPU memory"
    facts = []
    if tried := re.search(rf"[Tt]ried to allocate {_SIZE}", message):
        facts.append(f"{_gb(*tried.groups())} were requested")
    if free := re.search(rf"capacity of {_SIZE} of which {_SIZE} is free", message):
        facts.append(f"{_gb(*free.groups()[2:])} of {_gb(*free.groups()[:2])} were free")
    if unused := re.search(rf"{_SIZE} is reserved by PyTorch but unallocated", message):
        facts.append(
            f"{_gb(*unused.groups())} more are held in pieces that did not fit "
            "(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True joins them)"
        )
    return f"{kind} ran out" + (f": {', '.join(facts)}" if facts else "")


def _gb(number: str, unit: str) -> str:
    return f"{float(number) * _UNITS[unit]:,.2f} GB"
