"""Grading: the last complete box against the gold answer, strictly, in time, never by `eval`."""

from rlcs.grading.pool import GradePool
from rlcs.grading.rewards import grade, health

__all__ = ["GradePool", "grade", "health"]
