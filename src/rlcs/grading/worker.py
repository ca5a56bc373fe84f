"""The process that decides: `python -m rlcs.grading.worker DEADLINE_S [FILE.py:NAME]`, started by `pool`.

Protocol, one JSON value a line: it writes `"ready"`, then reads a list of pairs and writes one
[value, why] for each, until its input ends. By itself it runs math-verify on [prediction, gold], and
the value is true, false or null (undecided); with a function it calls that one on
[problem as JSON, response], and the value is what `own.decider` makes of its result. Nobody can make it
outlive its pool for long: it ends with its input, and while it works the kernel's own timer ends it.
"""

import contextlib
import json
import os
import resource
import signal
import sys

from rlcs.grading.own import Reply, decider
from rlcs.grading.symbolic import compare_formulas

MEMORY_BYTES = 2 << 30
"""Address space of a worker; a formula that asks for more fails alone, not the machine."""


def main() -> None:
    """Answer requests until the input ends."""
    limit_s = float(sys.argv[1]) * 2 + 5  # the pool kills at the deadline; this is for a dead pool
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever libraries print is no reply
    if len(sys.argv) > 2:
        decide = decider(sys.argv[2])
    else:
        with contextlib.suppress(ValueError, OSError):  # not every system has this limit
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        decide = _by_math_verify
        decide("1", "x")  # imports sympy before the first deadline runs
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, even inside C code
    print('"ready"', file=replies, flush=True)
    for line in sys.stdin:
        for pair in json.loads(line):
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            reply = decide(*pair)
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(json.dumps(reply), file=replies, flush=True)


def _by_math_verify(prediction: str, gold: str) -> Reply:
    verdict = compare_formulas(prediction, gold)
    return verdict.correct, verdict.why


if __name__ == "__main__":
    main()
