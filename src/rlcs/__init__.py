"""RL with Cold Start: two-stage training of vision-language models on trees of answers.

`rlcs.load(model).ask(image, question)` talks to a model; everything else begins at the command line.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlcs.serving.session import Session

__all__ = ["load"]


def load(model: str = "builtin") -> "Session":
    """A model to talk to: a folder in Hugging Face format, a hub id, or `builtin`. Raises ModelError."""
    from rlcs.serving.session import load

    return load(model)
