"""Compares an extracted answer with the gold answer: both are read once, then their values are compared."""

from collections.abc import Sequence
from dataclasses import replace

from rlcs.grading.choices import compare_choice
from rlcs.grading.compare import Verdict, formulas, no, same, same_when_rounded, yes
from rlcs.grading.golds import unwrap
from rlcs.grading.reading import MAX_CHARACTERS, read

MAX_ANSWER = 10_000
"""Most characters of an answer; a longer one is wrong, even if it equals the gold answer as text."""


def compare(prediction: str, gold: str, choices: Sequence[str] = (), *, places: int | None = None) -> Verdict:
    """Compare an extracted answer with the gold answer (which must not be blank).

    With `choices` both may be letters or an option's value; letters are compared first. Numbers are
    compared exactly, or with `places` to a number of decimal places.
    """
    verdict = decide(prediction, gold, choices, places=places)
    if len(prediction) > MAX_CHARACTERS:
        return verdict
    answer, wanted = read(prediction), read(unwrap(gold).text or gold)
    return replace(
        verdict,
        answer_value=verdict.answer_value or f"{answer.kind}: {answer}",
        gold_value=verdict.gold_value or f"{wanted.kind}: {wanted}",
    )


def decide(prediction: str, gold: str, choices: Sequence[str] = (), *, places: int | None = None) -> Verdict:
    """The verdict of `compare`, which need not say what was read on both sides."""
    as_text = prediction.strip() == gold.strip() and len(prediction) <= MAX_ANSWER
    if len(prediction) > MAX_CHARACTERS:
        return yes("the same text") if as_text else no("the answer is too long")
    gold = unwrap(gold).text or gold
    answer, wanted = read(prediction), read(gold)
    if as_text:
        verdict = yes("the same text")
    elif not answer.source:
        verdict = no("the box is empty")
    elif choices:
        verdict = compare_choice(prediction, gold, choices)
    else:
        verdict = same(answer, wanted)
        if places is not None and not verdict.correct and same_when_rounded(answer, wanted, places):
            verdict = yes(f"the same number to {places} decimal places")
    if verdict.correct is None and not any(verdict.formulas):
        verdict = formulas(answer, wanted)
    return verdict
