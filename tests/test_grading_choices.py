"""Multiple choice: letters first, then the values of the options; labels on either side."""

import pytest

from rlcs.grading.answers import compare
from rlcs.grading.choices import letter_index, without_label

OPTIONS = ("10", "12", "14", "16")
LENGTHS = ("5 cm", "7 cm", "9 m", "1,100 m")
WORDS = ("A. square", "B. circle", "C. none of these", "D. both A and B")


def verdict(given: str, gold: str, choices: tuple[str, ...]) -> bool | None:
    return compare(given, gold, choices).correct


@pytest.mark.parametrize(
    ("given", "gold", "right"),
    [
        ("B", "B", True), ("b", "B", True), ("(B)", "B", True), ("B. 12", "B", True),
        (r"\text{(B) }12", "B", True), ("12", "B", True), ("B", "12", True), ("12 cm", "B", True),
        ("C", "B", False), ("10", "B", False),
        ("B. 14", "B", False), ("A, B", "B", False), ("C", "12", False), ("11", "B", False),
        ("E", "B", False),
        ("[B]", "B", True), ("B)", "B", True), ("B:12", "B", True), ("B 12", "B", True),
        ("12 (B)", "B", True),
        (r"\textbf{(B)}\ 12", "B", True), (r"\mathrm{B}", "B", True), ("option B", "B", True),
        ("Choice B.", "B", True),
        ("The answer is B", "B", True), ("B = 12", "B", True), ("B。", "B", True), ("Ｂ", "B", True),
        ("B", "(B)", True), ("B", "B.", True), ("B", "Option B", True), ("B", "(B) 12", True),
        ("12", "(B) 12", True),
        ("B", r"\text{B}", True), ("B", "$B$", True), ("C", "(B) 12", False), ("14", "Option B", False),
        ("B or C", "B", False), ("12 or 14", "B", False), ("12.0", "B", True), (r"\frac{24}{2}", "B", True),
        ("B (14)", "B", False), ("14 (B)", "B", False), ("", "B", False), ("12, 14", "B", False),
    ],
)  # fmt: skip
def test_multiple_choice_by_letter_or_value(given: str, gold: str, right: bool) -> None:
    assert verdict(given, gold, OPTIONS) is right


@pytest.mark.parametrize(
    ("given", "gold", "right"),
    [
        ("BD", "B,D", True), ("D, B", "BD", True), ("B and D", "B;D", True), ("DB", "B and D", True),
        ("B", "BD", False), ("BC", "BD", False), ("BCD", "BD", False), ("12, 16", "BD", True),
        ("16 and 12", "B,D", True),
        ("12, 14", "BD", False), ("BD", "B", False),
    ],
)  # fmt: skip
def test_several_letters(given: str, gold: str, right: bool) -> None:
    assert verdict(given, gold, OPTIONS) is right


@pytest.mark.parametrize(
    ("given", "gold", "choices", "right"),
    [
        ("5", "A", LENGTHS, True), ("9 cm", "C", LENGTHS, False), ("9 m", "C", LENGTHS, True),
        ("1100", "D", LENGTHS, True), ("1,100 m", "D", LENGTHS, True), ("1", "D", LENGTHS, False),
        ("circle", "B", WORDS, True), ("Circle.", "B", WORDS, True), ("B) circle", "B", WORDS, True),
        ("B circle", "B", WORDS, True), ("A) circle", "B", WORDS, False), ("B", "circle", WORDS, True),
        ("C", "None of these", WORDS, True), ("square", "B", WORDS, False),
        ("D", "both A and B", WORDS, True),
        ("C", "B", ("B", "C", "D", "E"), False), ("B", "B", ("B", "C", "D", "E"), True),
        ("120", "C", ("$60^{\\circ}$", "$90^{\\circ}$", "$120^{\\circ}$"), True),
        ("(B) 8/11", "B", ("A. 3/11", "B. 8/11"), True), ("Yes", "A", ("Yes", "No"), True),
        ("No", "A", ("Yes", "No"), False), ("D", "D", ("", "", "", ""), True),
        ("C", "D", ("", "", "", ""), False),
        ("A", "A", ("same", "same", "other"), True), ("x^2 + 2x + 1", "B", ("x^2", "(x+1)^2", "x"), True),
        ("x²", "B", ("x^2", "(x+1)^2", "x"), False), ("25%", "B", ("0.5", "0.25"), True),
        ("I and II", "C", ("I", "II", "I and II"), True), ("I", "C", ("I", "II", "I and II"), False),
    ],
)  # fmt: skip
def test_values_and_labels_of_options(given: str, gold: str, choices: tuple[str, ...], right: bool) -> None:
    assert verdict(given, gold, choices) is right


@pytest.mark.parametrize(
    ("given", "gold", "given_value", "gold_value", "why"),
    [
        (
            "13",
            "B",
            "number: 13",
            "option B: number: 12",
            "compared with the value of option B: another number",
        ),
        ("C", "12", "option C: number: 14", "number: 12", "option C, not B"),
        ("b", "B", "option B: number: 12", "option B: number: 12", "option B"),
        ("AC", "A,C", "choice letters: A, C", "choice letters: A, C", "the same letters"),
        ("10, 14", "AC", "list: 10, 14", "choice letters: A, C", "the same letters"),
    ],
)
def test_the_verdict_says_what_was_compared(
    given: str, gold: str, given_value: str, gold_value: str, why: str
) -> None:
    found = compare(given, gold, OPTIONS)
    assert (found.answer_value, found.gold_value, found.why) == (given_value, gold_value, why)


def test_a_gold_value_means_the_option_that_is_written_like_it() -> None:
    assert verdict("A", "5", ("5", "5 cm")) is True and verdict("B", "5", ("5", "5 cm")) is False


def test_a_gold_that_is_no_option_is_compared_by_value() -> None:
    assert verdict("B", "12.0", OPTIONS) is True
    assert verdict("15", "15", OPTIONS) is True and verdict("B", "15", OPTIONS) is False


def test_a_letter_of_an_option_that_is_a_letter() -> None:
    assert letter_index("b", ("b", "c")) is None  # the value of the first option, not the option B
    assert letter_index("(b)", OPTIONS) == letter_index("B.", OPTIONS) == 1
    assert letter_index("E", OPTIONS) is None and letter_index("12", OPTIONS) is None


def test_labels_are_removed_only_where_they_are_the_options_own() -> None:
    assert without_label("(B) 12", 1) == without_label("B. 12", 1) == "12"
    assert without_label("B. 12", 0) == "B. 12" and without_label("B", 1) == "B"
