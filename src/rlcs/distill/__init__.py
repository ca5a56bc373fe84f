"""The cold start's demonstrations: asked of a teacher, graded, and sorted by rejection sampling."""

from rlcs.distill.run import load_kept, run

__all__ = ["load_kept", "run"]
