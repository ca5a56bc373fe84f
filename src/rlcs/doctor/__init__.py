"""`rlcs doctor`: whether this machine is fit for training, and what is wrong with a run.

Every finding comes with a way out. It only reads, and never stops at the first fault.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was checked: `fix` is empty where all is well."""

    name: str
    message: str
    fix: str = ""

    @property
    def bad(self) -> bool:
        """Whether something should be done."""
        return bool(self.fix)
