"""Compares formulas by math-verify, which may never end: `pool` runs this in workers."""

import logging

from rlcs.grading.compare import Verdict

_PLACES = 15
"""Decimal places to which numbers must agree; with the 6 of math-verify a rounded value would be equal."""


def compare_formulas(prediction: str, gold: str) -> Verdict:
    r"""Compare `\boxed{prediction}` with `$gold$` by math-verify 0.9.

    Its time limits are off: they use SIGALRM, which works in the main thread only. Call this in a process
    that can be killed. The verdict is undecided (`correct=None`) exactly when math-verify fails.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # it warns that its time limits are off
    kinds = (LatexExtractionConfig(boxed_match_priority=0),)  # never a mere number inside other text
    wanted = parse(f"${gold}$", kinds, fallback_mode="no_fallback", parsing_timeout=None)
    if not wanted:
        return Verdict(correct=False, why="not the same text, and the gold answer is not a formula")
    given = parse(f"\\boxed{{{prediction}}}", kinds, fallback_mode="no_fallback", parsing_timeout=None)
    if not given:
        return Verdict(correct=False, why="the answer is not a formula")
    try:
        same = bool(verify(wanted, given, _PLACES, 2 * _PLACES, timeout_seconds=None, raise_on_error=True))
    except Exception as error:
        return Verdict(correct=None, why=f"math-verify failed: {type(error).__name__}: {error}"[:300])
    return Verdict(correct=same, why=f"math-verify: {'equal' if same else 'not equal'}")
