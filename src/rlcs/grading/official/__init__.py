"""The official scoring rules of three benchmarks, quirks included, as pure functions in our own code.

They exist to reproduce published numbers; for what is right, ask `grading.answers`.
"""
