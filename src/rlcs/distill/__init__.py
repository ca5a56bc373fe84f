"""The cold start's demonstrations: sampled from a teacher, graded, and sorted by rejection sampling."""

from rlcs.distill.run import load_kept, load_rows, run

__all__ = ["load_kept", "load_rows", "run"]
