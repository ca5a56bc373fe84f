r"""MATH-Vision's official rule (`evaluation/evaluate.py` of mathllm/MATH-V).

It lower-cases all text, strips some units, and accepts decimals that agree when both are rounded to two
places. It rejects right answers with a unit in the option, or a letter with its value.
"""

import re
from collections.abc import Sequence

from rlcs.grading.official.latex2sympy import NoValueError, rounded

_PHRASES = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
_DROPPED = (
    "\\text|\\mbox|\\left|\\right|^{\\circ}|^\\circ|{m}^3|m^3|{units}|units|{km}|km|\n|\\!|\\$|$".split("|")
)
_LETTERS = "abcde"
_SLASHED = re.compile(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", re.ASCII)


def extract(response: str) -> str:
    """Extract the final answer as the official script does; often this is the whole text."""
    text = response.strip()
    for letter in _LETTERS.upper():
        ends = (f" {letter}.", f" ({letter}).")
        starts = (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if text.endswith(ends) or text.startswith(starts):
            text = letter
    number = text.split("is ")[-1].rstrip(".")
    if _is_number(number):
        text = number
    if "oxed{" not in text:
        text = _after_phrases(text)
    elif text.count("oxed{") > 1:
        text = "oxed{" + text.split("oxed{")[-1]
    answer = _plain(text.lower())
    for form in ("({})", "{{{}}}"):
        for letter in _LETTERS:
            answer = answer.replace(form.format(letter), letter)
    return answer.rstrip(".").lstrip(":").strip()


def is_correct(answer: str, gold: str, options: Sequence[str] = ()) -> bool:
    """Whether an extracted answer equals the gold letter or its option's text, or the gold value."""
    value = options[ord(gold) - ord("A")] if options else ""
    return _equal(gold, answer) or _equal(value, answer)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _after_phrases(text: str) -> str:
    """The text after the last "the answer is" or a similar phrase, to the end of its line or sentence."""
    for phrase in _PHRASES:
        for spelling in (phrase, phrase.replace("the", "The")):
            _, phrase_found, text = text.rpartition(spelling)
            text = text.strip()
            if phrase_found:
                text = text.split("\n")[0].split(". ")[0]
    return text


def _plain(text: str) -> str:
    """The content of the box, or the whole text, stripped as by the official script."""
    text = text.replace("{}", "")
    start, end = text.find("oxed{"), text.rfind("}")
    if 0 <= start < end - 4:
        text = text[start + 5 : end]
    close, opening = text.find("}"), text.find("{")
    if close >= 0 and (opening < 0 or close < opening):
        text = text[:close]
    text = text.split("=")[-1].split("\\approx")[-1]
    text = text.replace(" ", "").replace("\\,", "").replace("∞", "\\infty").replace("+\\infty", "\\infty")
    text = text.replace("\\\\", "\\").replace("bmatrix", "pmatrix")
    for piece in _DROPPED:
        text = text.replace(piece, "")
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac").replace("\\%", "")
    text = text.replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    if "sqrt" in text:
        text = _braced_fractions(_braced_roots(text))
    text = "\\frac{1}{2}" if text == "0.5" else text
    return _slash_as_fraction(text)


def _braced_roots(text: str) -> str:
    r"""Rewrite every `\sqrt2` as `\sqrt{2}`."""
    head, *parts = text.split("\\sqrt")
    return head + "".join(
        "\\sqrt" + (f"{{{part[0]}}}{part[1:]}" if part[:1] not in ("", "{") else part) for part in parts
    )


def _braced_fractions(text: str) -> str:
    r"""Rewrite every `\frac12` as `\frac{1}{2}`; a text with an incomplete fraction is unchanged."""
    head, *parts = text.split("\\frac")
    for part in parts:
        if part[:1] == "{":
            head += "\\frac" + part
        elif len(part) < 2:
            return text
        else:
            under = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            head += f"\\frac{{{part[0]}}}{under}"
    return head


def _slash_as_fraction(text: str) -> str:
    return f"\\frac{{{parts[1]}}}{{{parts[2]}}}" if (parts := _SLASHED.fullmatch(text)) else text


def _equal(gold: str, answer: str) -> bool:
    gold, answer = gold.lower(), answer.lower()
    if not gold.strip(" ") or not answer.strip(" "):
        return False
    if gold.strip() == answer.strip():
        return True
    gold, answer = _rounded_tuple(gold), _rounded_tuple(answer)
    if gold == answer:
        return True
    try:
        return rounded(answer) == rounded(gold)
    except NoValueError:
        return False


def _rounded_tuple(text: str) -> str:
    """Round the members of a tuple or list to two places; any other text is unchanged."""
    members = text[1:-1].split(",")
    if len(members) < 2 or (text[0], text[-1]) not in (("(", ")"), ("[", "]")):
        return text
    try:
        values = [x if "infty" in x or x in ("a", "-a") else str(rounded(x)) for x in members]
    except NoValueError:
        return text
    return text[0] + ",".join(values) + text[-1]
