"""Drafts what answers may say next, from what others said after the same tokens.

A draft is checked by the very numbers that the answer is drawn with, so it never changes what is said, only
how many passes that takes (`decoding`; up to rounding, since a pass computes other tokens together). What is
drafted follows from the requests of one call and their order, so the same call gives the same bits again.
Requests may bring what their problem was answered at an earlier visit (`train.earlier`).

The idea: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding" (ICML
2023); drafts by earlier text instead of a small model: Saxena, "Prompt lookup decoding" (2023).
"""

from collections.abc import Iterator, Sequence
from typing import Any

OWN_ORDER = 6
"""Number of last tokens by which a continuation is found first: in answers to the same question."""
ORDERS = (8, 6, 4, 3, 2, 1)
"""Numbers of last tokens by which one is found in any answer, the most telling first."""
MOST_TOKENS = 8
"""Longest draft."""
MOST_CONTEXTS = 1 << 19
"""Contexts that are remembered, of about 150 bytes each; beyond them all but recalled ones are forgotten."""
_STREAK = 15
"""Longest run of equal continuations that is counted."""

LAYER_COST = {"cpu": 2e7, "cuda": 8e10}
"""What a layer costs in each pass, whatever it computes, in products with a weight that take as long."""
READING_COST = {"cpu": 8, "cuda": 100}
"""What reading the weights costs in each pass, in tokens whose computation takes as long."""


def pass_cost(text: Any, device: str) -> float:
    """About how many tokens could be computed in the time that a pass takes beside computing tokens.

    By nominal rates: measured ones would make the bits of a run depend on what else the machine was doing.
    `text` is the configuration of a language model.
    """
    weights = 12 * int(text.hidden_size) ** 2  # of a layer
    return LAYER_COST.get(device, LAYER_COST["cuda"]) / weights + READING_COST.get(device, 100)


class Drafter:
    """Remembers how texts went on, and how often a continuation like it was right."""

    def __init__(self, pass_cost: float) -> None:
        """`pass_cost` is what a pass costs beside its tokens, in tokens."""
        self._pass_cost = pass_cost
        # By context: the last continuation, and how many times in a row it was that.
        self._continuations: dict[int, int] = {}
        self._recalled: dict[int, int] = {}
        # By order (the same question's first) and streak: how many continuations were right, of how many.
        self._right = [1.0] * (1 + len(ORDERS)) * (_STREAK + 1)
        self._tried = [2.0] * (1 + len(ORDERS)) * (_STREAK + 1)

    def recall(self, ids: Sequence[int], about: int) -> None:
        """Take note of an answer from an earlier visit to the question with the number `about`."""
        if len(self._recalled) + len(ids) > MOST_CONTEXTS // 2:
            return
        known = {
            hash((about, *ids[max(0, i - OWN_ORDER) : i])): token << 4 | 1 for i, token in enumerate(ids)
        }
        self._recalled |= known
        self._continuations |= known

    def learn(self, ids: Sequence[int], about: int) -> None:
        """Take note of the last of these tokens, which follows the others in an answer.

        `about` is the number of its question, above those of all tokens.
        """
        if len(self._continuations) >= MOST_CONTEXTS:
            self._continuations = self._recalled.copy()
        tail = tuple(ids[-ORDERS[0] - 1 :])
        before, token = tail[:-1], tail[-1]
        is_first = True
        for place, context in enumerate(_contexts(before, about)):
            if context is None:
                continue
            known = self._continuations.get(context, -1)
            same = known >> 4 == token
            if is_first and known >= 0:
                is_first = False
                kind = place << 4 | known & _STREAK
                self._tried[kind] += 1
                self._right[kind] += same
            streak = min(known & _STREAK, _STREAK - 1) + 1 if same else 1
            self._continuations[context] = token << 4 | streak

    def draft(
        self, ids: Sequence[int], about: int, *, branches: int, most: int, never: Sequence[int]
    ) -> list[int]:
        """What may follow these tokens: as long as it is likely enough to be worth computing in advance.

        A token computed in advance saves a share of a pass where it is right; in a pass for so many
        `branches` that share is small. At most `most` tokens, and none of `never`.
        """
        least = branches / (self._pass_cost + branches)
        tail = tuple(ids[-ORDERS[0] :])
        draft: list[int] = []
        share = 1.0
        while len(draft) < min(most, MOST_TOKENS):
            kind, token = self._continuation(tail, about)
            share *= self._right[kind] / self._tried[kind]
            if token < 0 or share < least or token in never:
                break
            draft.append(token)
            tail = (*tail[-ORDERS[0] + 1 :], token)
        return draft

    def _continuation(self, tail: tuple[int, ...], about: int) -> tuple[int, int]:
        """The kind of the best continuation, and its token; -1 without any."""
        for place, context in enumerate(_contexts(tail, about)):
            known = None if context is None else self._continuations.get(context)
            if known is not None:
                return place << 4 | known & _STREAK, known >> 4
        return 0, -1


def _contexts(tail: tuple[int, ...], about: int) -> Iterator[int | None]:
    """What a continuation of these tokens is found by, in order; None where they are too few."""
    yield hash((about, *tail[-OWN_ORDER:]))
    for order in ORDERS:
        yield hash(tail[-order:]) if order <= len(tail) else None
