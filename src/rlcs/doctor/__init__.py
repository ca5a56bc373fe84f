"""`rlcs doctor`: checks of this machine, and problems of a run.

Every problem comes with a fix. The checks write nothing, and all run even when one fails.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check: `fix` says what to do, and is empty where nothing is wrong."""

    name: str
    message: str
    fix: str = ""

    @property
    def bad(self) -> bool:
        """Whether there is something to fix."""
        return bool(self.fix)
