r"""Unwraps gold answers as data sets ship them: `<answer>D</answer>`, `#### 5`, a worked solution with a box.

A gold answer is chosen as the answer of a response is (`extraction`), and what is not clearly one answer is
refused. Data is unwrapped when it is loaded (`data.rows`), so that prompts, training and pages show the plain
answer; `compare` unwraps too, for answer files and problems that are made by hand.
"""

import ast
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from io import StringIO
from itertools import pairwise
from token import STRING
from tokenize import TokenError, generate_tokens

from rlcs.grading.extraction import BOXED, NO_BOX, STATED, TAGGED, Extraction, extract, find_boxes

AS_GIVEN = ""
"""Why a gold answer was taken that has no mark around it."""
_MARKS = {BOXED: "box", TAGGED: "<answer>", STATED: "words"}
_MARKED = re.compile(
    r"boxed *\{|\\(?:boxed|fbox|framebox)|</?(?:answer|think)>|####|answer|option|choice|答案|故选",
    re.IGNORECASE,
)
_TORN = re.compile(r"</?(?:answer|think)>|####|boxed *\{", re.IGNORECASE)
"""Marks that are left where no pair of them, or no answer after them, was found."""
_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.IGNORECASE | re.DOTALL)
_GSM8K = re.compile(r"####[ \t]*([^\n#]*\S)\s*\Z")
_CHINESE = re.compile(r"(?:答案应?[是为选:：]|故选)[ :：*]*([^\n。；，]*[^\n。；，\s])")
_LISTED = re.compile(r"\[\s*['\"].*['\"]\s*\]", re.DOTALL)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}|[\u3400-\u9fff]{1,2}|(?![A-Za-z\u3400-\u9fff])[^\W\d_]{2,}")
_MAX_WORDS = 25
"""A text of more words in which no answer is marked is a solution, not an answer."""
_MAX_MARKS = 4
"""Marks in one another, such as a box in a tag."""
_MAX_LIST = 2_000


@lru_cache(maxsize=4096)
def unwrap(gold: str) -> Extraction:
    r"""Take the answer out of a gold answer: its text and the mark that was found, or None and the reason.

    In this order: a list of texts (`["12"]`), the box (several must agree), a last line `#### 5`, the
    `<answer>` tag, "the answer is ..." and 答案; without any of them a text of up to 25 words is the answer
    itself (`why` is AS_GIVEN).
    """
    text, mark = gold.strip(), AS_GIVEN
    for _ in range(_MAX_MARKS):
        found = _unwrap_once(text)
        if found.text is None:
            return found
        if found.why == AS_GIVEN:
            return Extraction(text=text, why=mark)
        text, mark = found.text.strip(), mark or found.why
    return _refused("too many marks in one another")


def _unwrap_once(text: str) -> Extraction:
    if not text:
        return _refused("the answer is empty")
    if _LISTED.fullmatch(text):
        items = _listed(text)
        return Extraction(text=joined(items), why="list") if items else _refused("a list that cannot be read")
    found = _marked(text) if _MARKED.search(text) else Extraction(text=text, why=AS_GIVEN)
    if found.why == AS_GIVEN and len(_WORD.findall(text)) > _MAX_WORDS:
        return _refused("a whole text in which no answer is marked")
    return found


def _refused(why: str) -> Extraction:
    return Extraction(text=None, why=why)


def _marked(text: str) -> Extraction:
    """The answer that a mark names, or the text as it is."""
    boxed, final = extract(text), text.rpartition("</think>")[2].strip()
    if len({final[start:end].strip() for _, start, end in find_boxes(final)[0]}) > 1:
        return _refused("several boxes that differ")
    if boxed.why != NO_BOX:
        return Extraction(text=boxed.text, why=_MARKS.get(boxed.why, boxed.why))
    if last := _GSM8K.search(final):
        return Extraction(text=last[1], why="####")
    if len({tagged.strip() for tagged in _TAGS.findall(final)}) > 1:
        return _refused("several <answer> tags that differ")
    found = extract(final, allow_fallbacks=True)
    if found.text is not None and found.why in _MARKS:
        odd = found.text.count("**") % 2  # of `**Answer: B**`
        return Extraction(text=found.text.removesuffix("**") if odd else found.text, why=_MARKS[found.why])
    if chinese := _CHINESE.findall(final):
        return Extraction(text=chinese[-1], why="words")
    if _TORN.search(final):
        return _refused("the mark around the answer is not complete")
    return Extraction(text=final, why=AS_GIVEN if final == text else "</think>")


def _listed(text: str) -> list[str] | None:
    """The items of a list of texts, as JSON or as Python prints it; None if one is empty or damaged."""
    for read in (json.loads, ast.literal_eval):
        try:
            items = read(text[:_MAX_LIST] if read is json.loads else with_commas(text[:_MAX_LIST]))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if all(isinstance(item, str) and item.isprintable() and item.strip() for item in items):
            return list(items)
    return None


def with_commas(text: str) -> str:
    """A Python list with the commas that NumPy does not print: of `['12' '14']`, two texts and not one.

    Raises SyntaxError where it is no Python.
    """
    try:
        tokens = [token for token in generate_tokens(StringIO(text).readline) if token.string.strip()]
    except TokenError as error:
        raise SyntaxError(str(error)) from error
    missing = [one.end for one, next_one in pairwise(tokens) if one.type == next_one.type == STRING]
    if not missing:
        return text
    lines = text.splitlines(keepends=True)
    for row, column in reversed(missing):
        lines[row - 1] = f"{lines[row - 1][:column]},{lines[row - 1][column:]}"
    return "".join(lines)


def joined(items: Sequence[str]) -> str:
    """Write several answers as one: `1, 2`, or `1,000; 2` where commas stand inside of them."""
    return ("; " if any("," in item for item in items) else ", ").join(items)
