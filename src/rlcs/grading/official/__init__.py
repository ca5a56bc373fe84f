"""The official scoring rules of three benchmarks, including their quirks, as pure functions.

They reproduce published numbers; rlcs itself grades by `grading.answers`.
"""
