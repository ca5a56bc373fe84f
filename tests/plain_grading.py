"""Grades one response in the process of the test, with no time limit: for trusted text alone."""

from rlcs.grading.rewards import quick_grade
from rlcs.grading.symbolic import compare_formulas
from rlcs.records import Grade, Problem


def grade(problem: Problem, response: str, *, allow_fallbacks: bool) -> Grade:
    """What `GradePool` decides, without its workers."""
    result = quick_grade(problem, response, allow_fallbacks=allow_fallbacks)
    return result if isinstance(result, Grade) else result.grade(compare_formulas(*result.formulas).grade())
