"""The worker process of `pool`: `python -m rlcs.grading.worker [FILE.py:NAME]`, under a `guard`.

It asks for pairs over `channel` until there are no more, and answers each with the row of a `Grade`. Without
a function it runs math-verify on [prediction, gold]; with one it calls that on [problem as JSON, response]
(`own.load_function`).
"""

import contextlib
import json
import os
import resource
import sys
from os import O_RDWR, _exit, devnull, dup2, fstat, getpid  # by name, as user code may replace what stands
from os import open as open_file  # in a module
from resource import setrlimit

import psutil

from rlcs.grading.channel import VARIABLE, exchange
from rlcs.grading.own import load_function
from rlcs.grading.symbolic import compare_formulas
from rlcs.records import Grade, to_row

MEMORY_BYTES = 2 << 30
"""Address space of a worker, so that a huge formula fails instead of filling the machine's memory."""
FUNCTION_MEMORY_SHARE = 0.5
"""Share of the machine's memory that a process of a user's function may fill."""

_SPARE_HANDLES = 8
"""File handles that a function leaves free, so that the worker can connect."""


def main() -> None:
    """Answer requests until there are no more."""
    address, secret = json.loads(os.environ.pop(VARIABLE))
    this = getpid()
    with contextlib.suppress(ValueError, OSError):  # not every system has these limits
        if len(sys.argv) > 1:
            memory = int(FUNCTION_MEMORY_SHARE * psutil.virtual_memory().total)
            setrlimit(resource.RLIMIT_DATA, (memory, memory))
        else:
            setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if len(sys.argv) > 1:
        decide = load_function(sys.argv[1])
    else:
        decide = _by_math_verify
        decide("1", "x")  # imports sympy before the first deadline runs
    row, (handles, most) = None, resource.getrlimit(resource.RLIMIT_NOFILE)
    while getpid() == this:
        _open_standard_handles()
        setrlimit(resource.RLIMIT_NOFILE, (handles, most))
        if (question := exchange(address, secret, row)) is None:
            break
        setrlimit(resource.RLIMIT_NOFILE, (handles - _SPARE_HANDLES, most))
        secret, pair = question
        row = to_row(decide(*pair))
    _exit(0)  # also a copy that the function forked, and that returned as well; waits for no thread


def _open_standard_handles() -> None:
    """Open those that the function closed: what is opened next would get their numbers, and its output."""
    for handle in range(3):
        try:
            fstat(handle)
        except OSError:
            dup2(open_file(devnull, O_RDWR), handle)


def _by_math_verify(prediction: str, gold: str) -> Grade:
    return compare_formulas(prediction, gold).grade()


if __name__ == "__main__":
    main()
