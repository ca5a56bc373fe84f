"""Makes demonstrations for the cold start: samples a teacher, grades, and selects by rejection sampling."""

from rlcs.distill.run import load_kept, load_rows, run

__all__ = ["load_kept", "load_rows", "run"]
