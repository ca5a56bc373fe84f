"""The exam: models answer benchmarks; answers are kept, graded by named rules, and compared."""
