"""The worker process of `pool`: `python -m rlcs.grading.worker DEADLINE_S [FILE.py:NAME]`.

Protocol, one JSON value a line: it writes `"ready"`, then reads lists of pairs and writes the row of one
`Grade` for each pair, until its input ends. Without a function it runs math-verify on [prediction, gold];
with one it calls that on [problem as JSON, response] (`own.load_function`). If the pool's process dies, the
worker ends with its input, or by a timer of the kernel during a decision.
"""

import contextlib
import json
import os
import resource
import signal
import sys

from rlcs.grading.own import load_function
from rlcs.grading.symbolic import compare_formulas
from rlcs.records import Grade, to_row

MEMORY_BYTES = 2 << 30
"""Address space of a worker, so that a huge formula fails instead of filling the machine's memory."""


def main() -> None:
    """Answer requests until the input ends."""
    limit_s = float(sys.argv[1]) * 2 + 5  # the pool kills at the deadline; this is in case it has died
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # keeps output of libraries out of the replies
    if len(sys.argv) > 2:
        decide = load_function(sys.argv[2])
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
            grade = decide(*pair)
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(json.dumps(to_row(grade)), file=replies, flush=True)


def _by_math_verify(prediction: str, gold: str) -> Grade:
    return compare_formulas(prediction, gold).grade()


if __name__ == "__main__":
    main()
