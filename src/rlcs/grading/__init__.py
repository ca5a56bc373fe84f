"""Grades responses: compares the last complete box with the gold answer, strictly and in bounded time."""

from rlcs.grading.pool import GradePool
from rlcs.grading.rewards import health

__all__ = ["GradePool", "health"]
