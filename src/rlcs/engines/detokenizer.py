"""Turns tokens into text as they arrive and finds stop strings; text that may still change is held back."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What a decoder writes for a character whose bytes are incomplete."""


class Detokenizer:
    """The text of one answer, piece by piece.

    The pieces joined are the text of all tokens up to the first stop string, which is left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        """`decode` turns ids into text; an answer ends before any of the (non-empty) `stops`."""
        self._decode = decode
        self._stops = stops
        self._pending: list[int] = []
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Add one token; return the text that is certain now. `stopped`: whether a stop string was found."""
        self._pending.append(token)
        text = self._decode(self._pending)
        if text.endswith(UNFINISHED):
            return ""
        self._pending = []
        text = self._until_stop(self._held + text)
        longest = 0 if self.stopped else max(map(len, self._stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        kept = next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """Return the text held back, after the last token."""
        text = self._until_stop(self._held + self._decode(self._pending))
        self._held, self._pending = "", []
        return text

    def _until_stop(self, text: str) -> str:
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        self.stopped = self.stopped or bool(starts)
        return text[: min(starts, default=len(text))]
