"""Evaluation: models answer held-out problems and benchmarks; answers are graded and compared."""

CHUNK = 256
"""Problems that are answered between two writes."""
