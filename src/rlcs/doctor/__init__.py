"""`rlcs doctor`: is this machine fit for training, and what ails a run.

Everything it finds comes with the way out. It only reads, and never stops at the first fault.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing looked at: `fix` is empty where all is well."""

    name: str
    told: str
    fix: str = ""

    @property
    def ill(self) -> bool:
        """Whether somebody should do something."""
        return bool(self.fix)
