"""Evaluation: models answer held-out problems and benchmarks; answers are graded and compared."""
