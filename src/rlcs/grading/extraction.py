r"""Extracts the final answer of a response: the last complete `\boxed{}` after the reasoning.

Where boxes are not required (in evaluation, not in training), other forms count too: tags, "the answer is
...", a letter alone on a line, or a response that is only a short answer.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """The final answer of a response, unchanged, and how it was found; or None and the reason.

    `begins` is the index at which its box begins in the response; None for an answer without a box.
    """

    text: str | None
    why: str
    begins: int | None = None


BOXED = "the last box"
NO_BOX = "no box"
TAGGED = "the last <answer> tag"
STATED = 'the words "the answer is"'

_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\[\\{}]|[{}]")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_SENTENCE = re.compile(
    r"(?:\b(?:the|my)(?: \w+)? (?:answer|option|choice) (?:is|should be|must be|would be)\b|\banswer ?:)"
    r"[: *]*(?=\S)((?:[^\n.]|\.(?=\S))*)",
    re.IGNORECASE,
)
_REASON = re.compile(r",? (?:because|since|as|so|which|where|for)\b.*", re.DOTALL)
_LETTER = re.compile(r"\**\(?([A-Z])\)?[.:]?\**")
_LAST_WORD = re.compile(r"\b(?:is|be|option|choice|answer):? \**\(?([A-H])\)?\W*")
_MAX_WORDS_ALONE, _MAX_CHARACTERS_ALONE = 4, 60


def extract(response: str, *, allow_fallbacks: bool = False) -> Extraction:
    r"""Find the final answer of a response.

    Text up to the last `</think>` is reasoning and does not count; with an unclosed `<think>` there is no
    answer. The last complete `\boxed{}` is the answer, unless a later box is not closed (an answer cut at
    the length limit, or hedging). Only if there is no box at all, `allow_fallbacks` also accepts, in this
    order, the last `<answer>` tag, the last "the answer is ...", a last or first line that is one capital
    letter, "... must be C." as the last words, and a response that is only a short answer.
    """
    _, closed, final = response.rpartition("</think>")
    if not closed and "<think>" in response:
        return Extraction(text=None, why="the reasoning is not finished: no </think>")
    boxes, unfinished = find_boxes(final)
    if unfinished:
        return Extraction(text=None, why="the last box is not closed")
    if boxes:
        begins, start, end = boxes[-1]
        return Extraction(text=final[start:end], why=BOXED, begins=len(response) - len(final) + begins)
    if not final.strip():
        return Extraction(text=None, why="the response is empty")
    return _fallback(final) if allow_fallbacks else Extraction(text=None, why=NO_BOX)


def find_boxes(text: str) -> tuple[list[tuple[int, int, int]], bool]:
    """Find the boxes that are in no other box: the start of each, and start and end of its content.

    The second value is whether a box after them is not closed.
    """
    boxes: list[tuple[int, int, int]] = []
    open_braces: list[tuple[int, int]] = []  # where each box and its content start; -1 for a plain brace
    for token in _BOX_TOKEN.finditer(text):
        if len(token[0]) > 2:
            open_braces.append(token.span())
        elif token[0] == "{":
            open_braces.append((-1, -1))
        elif token[0] == "}" and open_braces:
            begins, start = open_braces.pop()
            if start >= 0:
                while boxes and boxes[-1][0] > begins:
                    boxes.pop()  # it is inside of this one
                boxes.append((begins, start, token.start()))
    end = boxes[-1][2] if boxes else -1
    return boxes, any(start > end for _, start in open_braces)


def _fallback(text: str) -> Extraction:
    if (tagged := _last_tagged(text)) is not None:
        return Extraction(text=tagged, why=TAGGED)
    if sentences := _SENTENCE.findall(text):
        return Extraction(text=_REASON.sub("", sentences[-1]), why=STATED)
    lines = text.strip().split("\n")
    for line in (lines[-1].strip(), lines[0].strip()):
        if letter := _LETTER.fullmatch(line):
            return Extraction(text=letter[1], why="a line of one letter")
    if letter := _LAST_WORD.search(lines[-1][-40:]):
        rest = lines[-1][-40:][letter.end() :]
        if not rest:
            return Extraction(text=letter[1], why="a letter as the last word")
    line = lines[0].strip()
    if len(lines) == 1 and len(line) <= _MAX_CHARACTERS_ALONE and len(line.split()) <= _MAX_WORDS_ALONE:
        return Extraction(text=line, why="the whole response")
    return Extraction(text=None, why="no box, no <answer> tag, no sentence with the answer, no lone letter")


def _last_tagged(text: str) -> str | None:
    last, start = None, -1
    for tag in _TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start >= 0:
            last, start = text[start : tag.start()], -1
    return last
