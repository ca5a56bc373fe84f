"""Compares answers to multiple-choice questions: letters first, then the values of the options."""

import re
from collections.abc import Sequence
from dataclasses import replace
from unicodedata import normalize

from rlcs.grading.compare import LABEL, Verdict, either, no, same, yes
from rlcs.grading.reading import read, spelled
from rlcs.grading.values import Items, Letters, Named, Value
from rlcs.records import option_letter

_CHOICE = re.compile(
    r"\\?[(\[{]?([A-Za-z])(?:\\?[)\]}][.:]?| ?[.:,]| [-=]) *(\S.*)|\\?[(\[{]?([A-Za-z])\\?[)\]}]?[.:,]?",
    re.DOTALL,
)
_OPTION = re.compile(
    r"(?:\*\*)?(?:option |choice )?[(\[（【]?([A-ZＡ-Ｚ])(?:\*\*)?"
    r"(?:[)\]）】][.:：]?|[.:：．]|、(?!(?-i:[A-Z])\b))(?:\*\*)? *(\S.*)",
    re.DOTALL | re.IGNORECASE,
)
"""Further labels of options: full-width letters and marks, square brackets, bold ones, `Option B:`."""
_LETTER_THEN_VALUE = re.compile(r"([A-Z])(?: |(?=\())(\S.*)", re.DOTALL)
_RUN = re.compile("[A-Z]{2,}")
_VALUE_THEN_LETTER = re.compile(r"(.*\S) ?\(([A-Z])\)", re.DOTALL)


def compare_choice(prediction: str, gold: str, choices: Sequence[str]) -> Verdict:
    """Compare an answer with the gold answer, where both are a letter, letters, or an option's value."""
    options = [without_label(choice, index) for index, choice in enumerate(choices)]
    verdict = _compare(prediction, gold, options)
    return replace(verdict, answer_value=_read_as(prediction, options), gold_value=_read_as(gold, options))


def _read_as(text: str, options: Sequence[str]) -> str:
    """What an answer is read as, in words: `option B: number: 12` for a letter, `number: 12` for a value."""
    named = chosen(text, options) or ()
    value, by = read(text), ""
    if len(named) == 1:
        (index,) = named
        value, by = read(options[index]), f"option {option_letter(index)}: "
    return f"{by}{value.kind}: {value}"


def _compare(prediction: str, gold: str, options: Sequence[str]) -> Verdict:
    wanted = chosen(gold, options)
    if wanted is not None and len(wanted) > 1:
        given = chosen(prediction, options)
        return either(given == wanted, "the same letters", "other letters")
    right = next(iter(wanted)) if wanted else None
    value = read(gold if right is None else options[right])
    accepted = [right] if right is not None else _fitting(value, options)
    named, rest = _named_option(prediction, options)
    given_value = read(prediction)
    if named is not None:
        stated = read(rest)
        if isinstance(stated, Named) and letter_index(stated.name, options) is not None:
            return no("two options")
        agrees = same(read(rest), read(options[named])) if rest else yes("")
        if agrees.correct is False:
            return no(f"option {option_letter(named)} and another option's value")
        if named in accepted:
            return agrees if agrees.correct is None else yes(f"option {option_letter(named)}")
        if accepted:
            return no(f"option {option_letter(named)}, not {option_letter(accepted[0])}")
        given_value = read(options[named])  # the gold value is no option's text: compare the values
    elif (
        isinstance(given_value, Letters)
        and max(given_value.letters) <= "Z"
        and given_value.source not in map(spelled, options)
    ):
        several = len(given_value.letters) > 1
        return no("several options where one is asked" if several else "a letter that names no option")
    elif isinstance(given_value, Named):
        index = letter_index(given_value.name, options)
        if index is not None and index not in accepted:
            return no(f"option {option_letter(index)}, not the gold answer")
    verdict = same(given_value, value)
    if verdict.correct and right is not None and _fits_another(given_value, right, options):
        return no("the value of several options")
    if verdict.correct is None and any(same(given_value, read(o)).correct for o in options):
        return no("the value of another option")
    if right is not None:
        return replace(
            verdict, why=f"compared with the value of option {option_letter(right)}: {verdict.why}"
        )
    return verdict


def _fitting(value: Value, options: Sequence[str]) -> list[int]:
    """The options that are written like a value, or else those that equal it."""
    alike = [i for i, option in enumerate(options) if read(option).source == value.source]
    return alike or [i for i, option in enumerate(options) if same(read(option), value).correct]


def _fits_another(given: Value, right: int, options: Sequence[str]) -> bool:
    """Whether an answer, such as 5 for `5 cm`, equals another option too, which is not the right one."""
    wanted = read(options[right])
    others = [read(option) for i, option in enumerate(options) if i != right]
    if given.source != wanted.source and any(given.source == other.source for other in others):
        return True
    return any(same(given, other).correct and same(other, wanted).correct is False for other in others)


def chosen(text: str, options: Sequence[str]) -> frozenset[int] | None:
    """The options that an answer names, by letter or by letters; None if it names none."""
    index, rest = _named_option(text, options)
    if index is not None and (not rest or same(read(rest), read(options[index])).correct is not False):
        return frozenset([index])
    value, run = read(text), spelled(text)
    letters = value.letters if isinstance(value, Letters) else frozenset(run)
    if isinstance(value, Letters) or (_RUN.fullmatch(run) and len(letters) == len(run)):
        found = {ord(letter) - ord("A") for letter in letters}
        return frozenset(found) if max(found) < len(options) else None
    if isinstance(value, Items):
        each = [_option_of(item, options) for item in value.items]
        return frozenset(i for i in each if i is not None) if None not in each else None
    return None


def _option_of(value: Value, options: Sequence[str]) -> int | None:
    return next((i for i, option in enumerate(options) if same(value, read(option)).correct), None)


def _named_option(text: str, options: Sequence[str]) -> tuple[int | None, str]:
    """The option that an answer names by its letter, and the value that it states besides."""
    given = spelled(text)
    if (named := letter_index(given, options)) is not None:
        return named, ""
    if given in map(spelled, options):
        return None, ""
    if (labelled := _CHOICE.fullmatch(given)) and labelled[2]:
        return letter_index(labelled[1], options), labelled[2]
    if labelled := _LETTER_THEN_VALUE.fullmatch(given):
        index = letter_index(labelled[1], options)
        if index is not None and _option_of(read(labelled[2]), options) is not None:
            return index, labelled[2]
    if labelled := _VALUE_THEN_LETTER.fullmatch(given):
        return letter_index(labelled[2], options), labelled[1]
    return None, ""


def letter_index(text: str, options: Sequence[str]) -> int | None:
    """The option that `B`, `(B)` or `B.` names; a lower-case letter names none if an option has that text."""
    match = _CHOICE.fullmatch(text)
    letter = (match[3] or (match[1] if not match[2] else "")) if match else ""
    if not letter or (letter.islower() and letter in options):
        return None
    index = ord(letter.upper()) - ord("A")
    return index if index < len(options) else None


def without_label(choice: str, index: int) -> str:
    """Remove a choice's label: `B. 12`, `(B) 12`, `B、12` or `**B.** 12` as the second choice is `12`."""
    text = choice.strip()
    match = LABEL.fullmatch(text)
    if not match or not match[1]:
        match = _OPTION.fullmatch(text)
    own = match and match[1] and match[2] and normalize("NFKC", match[1]).upper() == option_letter(index)
    return match[2] if match and own else choice
