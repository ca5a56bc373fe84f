"""Defines the errors that users see.

Every error that rlcs raises on purpose says what is wrong, where, and what to do. `UserError`
means that the input is at fault (exit code 2 on the command line); any other `RlcsError` means
that the run failed (exit code 1). Programming mistakes stay `AssertionError` or `ValueError`.
"""

from functools import partial


class RlcsError(Exception):
    """Base of all errors raised on purpose: what is wrong, where, and what to do."""

    exit_code = 1
    reported = False
    """Whether another process of the run shows it already."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        """Build the message from its three parts; only `what` is required."""
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        """One sentence a line: `where: what`, then what to do."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  -> {self.fix}" if self.fix else head

    def __reduce__(self) -> tuple[object, ...]:
        """Keep all three parts when a worker process (a grader) sends the error to its parent."""
        return (partial(type(self), where=self.where, fix=self.fix), (self.what,))


class UserError(RlcsError):
    """The input is at fault: exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe file, key or value that cannot be used."""


class DataError(UserError):
    """A data source, file or row that cannot be used."""


class ImageError(DataError):
    """An image that is missing, broken, too large or too oddly shaped."""


class PromptError(DataError):
    """A problem that cannot become a prompt: too long, or images and slots disagree."""


class ModelError(UserError):
    """A model that cannot be loaded or is of an unknown family."""


class EndpointError(UserError):
    """A model server that cannot be used: wrong address, key or model name."""


class RunFolderError(UserError):
    """A run folder that belongs to another recipe, or cannot be written."""


class CheckpointError(RlcsError):
    """A checkpoint that is incomplete or damaged."""


class TrainingError(RlcsError):
    """A run that cannot go on: too many bad steps, or a fast path that disagrees with a plain one."""
