r"""Compares an extracted answer with the gold answer.

Pure functions on text, bounded in time. What they cannot decide (is `2\sqrt{3}` the same as
`\sqrt{12}`?) is returned as `Verdict(correct=None)` for math-verify, which may never end and
therefore runs in a worker that can be killed. The rules are strict, so that the reward cannot be
gamed: one answer, the last one, in a complete `\boxed{}`, after the reasoning.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

from rlcs.grading.golds import unwrap
from rlcs.grading.intervals import as_interval, is_inequality
from rlcs.grading.latex import NoValueError, TooLargeError, exact, number
from rlcs.grading.normal import compact, normalise, peel, repair_gold
from rlcs.grading.units import split_unit
from rlcs.records import Grade, option_letter

MAX_ANSWER = 10_000
"""Characters; a longer extracted answer is wrong unless it equals the gold answer as text."""
MAX_FORMULA = 1_000
"""Characters; a longer answer is compared as text and as a number, never as a formula."""
_MAX_NESTING = 40
_MAX_ITEMS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Right, wrong, or undecided (None): then `formulas` holds (prediction, gold) for math-verify."""

    correct: bool | None
    why: str
    formulas: tuple[str, str] = ("", "")
    answer_value: str = ""
    gold_value: str = ""

    def grade(self, extracted: str | None = None, *, by: str = "") -> Grade:
        """Make a grade with reward 1 or 0, or unscored; the reason begins with `by` (how it was found)."""
        reward = None if self.correct is None else float(self.correct)
        return Grade(
            reward=reward,
            correct=self.correct,
            extracted=extracted,
            why=by + self.why,
            answer_value=self.answer_value,
            gold_value=self.gold_value,
        )


def _yes(why: str) -> Verdict:
    return Verdict(correct=True, why=why)


def _no(why: str) -> Verdict:
    return Verdict(correct=False, why=why)


_LABEL = re.compile(r"\(?([A-Za-z])(?:\)\.?|[.:]) *(.*)|\(?([A-Za-z])\)?", re.DOTALL)
_CHOICE = re.compile(
    r"[(\[{]?([A-Za-z])(?:[)\]}][.:]?|[.:,]| [-=]) *(\S.*)|[(\[{]?([A-Za-z])[)\]}]?[.:,]?", re.DOTALL
)
_VALUE_THEN_LETTER = re.compile(r"(.*\S) ?\(([A-Z])\)")
_LEAD = re.compile(
    r"(?:(?:the |my )?(?:\w+ )?(?:answer|option|choice)(?: is)?:? +|\\approx ?|=+ ?)(?=\S)", re.IGNORECASE
)
_NAME = re.compile(r"(?>\\?[A-Za-z]+|_ ?\{[^{}]{1,20}\}|_\w|\{[A-Za-z ]{0,20}\}|\([\w, ]{1,20}\)|[ '|])++")
_MAX_NAME = 40
_INDEX = re.compile(r"(?:_|\\angle) ?\{?\w+\}?|\([\w, ]{1,20}\)")
_MEMBER = re.compile(r"^([A-Za-z]) ?\\in(?![A-Za-z]) ?")
_ARTICLE = re.compile(r"(?:an?|the) (?=\S)")
_WORDS = re.compile(r"[^\W\d_][^\W\d_' -]*(?:[ '-]+[^\W\d_]+)*")
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{4,}")
_FUNCTIONS = frozenset("sinh cosh tanh sqrt arcsin arccos arctan".split())
_OR = re.compile(r" ?,? (?:or|and) |;")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_BRACKET = re.compile(r"\\?[({\[\])}]")
_BRACKET_OR_COMMA = re.compile(_BRACKET.pattern + "|,")
_HEAVY = re.compile(
    r"(?:\^|\*\*) ?[({]* ?-? ?(?:\d{3,}|\d+ ?(?:\^|\*\*))|!"
    r"|\\(?:[dt]?binom|sum|prod|int|gcd|lcm) ?\{? ?\d{4,}"
)
_DOUBTFUL = re.compile(r"[/:!%,_'|]|\\(?:log|div|exp|lfloor)|\d ?\\frac|\d \d|e")  # readings differ
_UNDER = re.compile(r"_ ?\{[^{}]*\}")


def compare(prediction: str, gold: str, choices: Sequence[str] = (), *, places: int | None = None) -> Verdict:
    """Compare an extracted answer with the gold answer (which must not be blank).

    With `choices` both may be a letter or an option's value; letters are compared first. Numbers are
    compared exactly, or with `places` to a number of decimal places.
    """
    gold = unwrap(gold).text or gold
    wanted = normalise(repair_gold(gold))
    if len(prediction) > MAX_ANSWER:
        return _yes("the same text") if prediction.strip() == gold.strip() else _no("the answer is too long")
    given = peel(normalise(prediction))
    if not given:
        return _no("the box is empty")
    options = [normalise(choice) for choice in choices]
    if given not in (wanted, *options) and (lead := _LEAD.match(given)):
        given = given[lead.end() :]
    if choices:
        return _compare_choice(given, wanted, options)
    verdict = _same(given, peel(wanted))
    if places is not None and not verdict.correct and _same_when_rounded(given, wanted, places):
        return _yes(f"the same number to {places} decimal places")
    return verdict


def _same_when_rounded(given: str, wanted: str, places: int) -> bool:
    answer, gold = (_number(split_unit(_split_name(text)[1])[0]) for text in (given, wanted))
    return answer is not None and gold is not None and abs(answer - gold) <= Fraction(1, 2 * 10**places)


def _compare_choice(given: str, wanted: str, choices: list[str]) -> Verdict:
    options = [_without_label(choice, index) for index, choice in enumerate(choices)]
    right = _letter_index(wanted, options)
    value = wanted if right is None else options[right]
    accepted = (
        {right} if right is not None else {i for i, o in enumerate(options) if _same(o, wanted).correct}
    )
    named, rest = _named_option(given, options)
    if named is not None:
        agrees = _same(rest, options[named]) if rest else _yes("")
        if agrees.correct is False:
            return _no(f"option {option_letter(named)} and another option's value")
        if named in accepted:
            return agrees if agrees.correct is None else _yes(f"option {option_letter(named)}")
        if accepted:
            return _no(f"option {option_letter(named)}, not {option_letter(min(accepted))}")
        given = options[named]  # the gold value is no option's text: compare the values
    verdict = _same(given, value)
    if verdict.correct is None and any(_same(given, o).correct for o in options):
        return _no("the value of another option")
    if verdict.correct is None and len(given) == 1:
        return _no("a letter that names no option")
    return verdict


def _named_option(given: str, options: Sequence[str]) -> tuple[int | None, str]:
    """The option that an answer names by its letter, and the value that it states besides."""
    if (named := _letter_index(given, options)) is not None:
        return named, ""
    if compact(given) in map(compact, options):
        return None, ""
    if (labelled := _CHOICE.fullmatch(given)) and labelled[2]:
        return _letter_index(labelled[1], options), labelled[2]
    if labelled := _VALUE_THEN_LETTER.fullmatch(given):
        return _letter_index(labelled[2], options), labelled[1]
    return None, ""


def _letter_index(text: str, options: Sequence[str]) -> int | None:
    """The option that `B`, `(B)` or `B.` names; a lower-case letter names none if an option has that text."""
    match = _CHOICE.fullmatch(text)
    letter = (match[3] or (match[1] if not match[2] else "")) if match else ""
    if not letter or (letter.islower() and letter in options):
        return None
    index = ord(letter.upper()) - ord("A")
    return index if index < len(options) else None


def _without_label(choice: str, index: int) -> str:
    """Remove a choice's label: `B. 12` or `(B) 12` as the second of the choices is `12`."""
    match = _LABEL.fullmatch(choice)
    own = match and match[1] and match[2] and match[1].upper() == option_letter(index)
    return match[2] if match and own else choice


def _same(given: str, wanted: str) -> Verdict:
    """Compare two normalised answers: text, words, letters, names, lists, units, numbers, in this order."""
    if given == wanted or compact(given) == compact(wanted):
        return _yes("the same text")
    if _WORDS.fullmatch(wanted) and (_WORDS.fullmatch(given) or len(wanted) > 1):
        same = _plain_words(given) == _plain_words(wanted)
        return _yes("the same words") if same else _no("other words")
    if len(wanted) == 1 and wanted.isalpha() and (match := _LABEL.fullmatch(given)):
        same = (match[1] or match[3]).upper() == wanted.upper()
        return _yes("the same letter") if same else _no("another letter")
    given, wanted, conflict = _without_names(given, wanted)
    if conflict:
        return _no(conflict)
    if is_inequality(given) != is_inequality(wanted):
        given, wanted = as_interval(given), as_interval(wanted)
    if max(_nesting(given), _nesting(wanted)) > _MAX_NESTING:
        return _no("too deeply nested")
    if (":" in given or ":" in wanted) and "\\" not in given + wanted:
        return _same_ratio(given, wanted)
    return _same_lists(given, wanted)


def _plain_words(text: str) -> str:
    words = " ".join(re.sub(r"[-\s]+", " ", text).casefold().split())
    return words[article.end() :] if (article := _ARTICLE.match(words)) else words


def _without_names(given: str, wanted: str) -> tuple[str, str, str]:
    r"""Remove `x =`, `S_{ABC} =` or `x \in` from both answers; the third text is a conflict or ""."""
    (mine, my_value), (other, other_value) = _split_name(given), _split_name(wanted)
    if mine and other:
        conflict = "" if _same_name(mine, other) else f"a value of {mine}, not of {other}"
        return my_value, other_value, conflict
    if "=" not in wanted:
        return my_value if mine else _end_of_chain(given), wanted, ""
    return given, wanted if "=" in given else other_value, ""


def _split_name(text: str) -> tuple[str, str]:
    name, equals, value = _MEMBER.sub(r"\1 =", text).partition("=")
    name, value = name.strip(), value.strip()
    named = equals and value and "=" not in value and len(name) <= _MAX_NAME and _NAME.fullmatch(name)
    return (name, value) if named else ("", text)


def _same_name(one: str, other: str) -> bool:
    """Whether two names have the same letters, or are a word and its initial: `C` and `Circumference`."""
    short, long = sorted((re.sub(r"\\angle|\W|_", "", name).casefold() for name in (one, other)), key=len)
    return short == long or (len(short) == 1 and len(long) > 3 and long.startswith(short))


def _end_of_chain(text: str) -> str:
    """The last value of `a+b=5` or `x=2+3=5`, if every other side is letters only, or the same number."""
    *sides, last = (side.strip() for side in text.split("="))
    if not last or not sides or is_inequality(text):
        return text
    value = _number(last)
    for side in sides:
        if re.search(r"\d", _INDEX.sub("", side)) and (value is None or _number(side) != value):
            return text
    return last


def _number(text: str) -> Fraction | None:
    try:
        return exact(text)
    except (NoValueError, TooLargeError):
        return None


def _same_ratio(given: str, wanted: str) -> Verdict:
    """Compare ratios or clock times part by part: 1:2 is neither 2:4 nor 1/2."""
    parts, other = given.split(":"), wanted.split(":")
    same = len(parts) == len(other) and all(
        _same(a.strip(), b.strip()).correct for a, b in zip(parts, other, strict=True)
    )
    return _yes("the same ratio") if same else _no("another ratio")


def _nesting(text: str) -> int:
    steps = (_step(bracket) for bracket in _BRACKET.findall(text))
    return max(accumulate(steps, initial=0))


def _step(bracket: str) -> int:
    """The change of depth after a bracket: 1 or -1."""
    return 1 if bracket[-1] in "({[" else -1


def _same_lists(given: str, wanted: str) -> Verdict:
    mine, theirs = _items(given), _items(wanted)
    if "\\pm" in given + wanted:
        if ("\\pm" in given) != ("\\pm" in wanted) and mine is None and theirs is None:
            return _no("one of the two has a plus-minus sign")
        return _formulas(given, wanted)
    if mine is None and theirs is None:
        return _same_values(given, wanted)
    if mine is None or theirs is None:
        return _no("several answers where one is asked" if mine else "one answer where several are asked")
    (brackets, items), (other, golds) = mine, theirs
    if len(items) != len(golds):
        return _no(f"{len(items)} answers, not {len(golds)}")
    if brackets != other and {brackets, other} not in ({"", "{}"}, {"", "()"}):
        return _no(f"other brackets: {brackets or 'none'} against {other or 'none'}")
    if len(items) > _MAX_ITEMS:
        return _no("a long list that is not the same text")
    ordered = not {brackets, other} <= {"", "{}"}
    found = _match_in_order(items, golds) if ordered else _match_any_order(items, golds)
    if found is None:
        return _formulas(given, wanted)
    return _yes("the same list") if found else _no("another list")


def _items(text: str) -> tuple[str, list[str]] | None:
    r"""Brackets and members of a tuple, interval, `\{set\}` or plain list; None for a single answer."""
    text = _OR.sub(",", text)
    if _THOUSANDS.fullmatch(text):
        return None
    tokens = list(_BRACKET_OR_COMMA.finditer(text))
    brackets = [token for token in tokens if token[0] != ","]
    enclosed = bool(brackets) and brackets[0].start() == 0 and brackets[-1].end() == len(text)
    commas: dict[int, list[int]] = {}  # by depth
    depth = 0
    for token in tokens:
        if token[0] == ",":
            commas.setdefault(depth, []).append(token.start())
            continue
        depth += _step(token[0])
        enclosed = enclosed and (depth > 0 or token is brackets[-1])
    cuts = commas.get(1 if enclosed else 0)
    if not cuts:
        return None
    start, end = (brackets[0].end(), brackets[-1].start()) if enclosed else (0, len(text))
    members = [text[a + 1 : b].strip() for a, b in pairwise([start - 1, *cuts, end])]
    return (brackets[0][0][-1] + brackets[-1][0][-1] if enclosed else ""), members


def _match_in_order(items: list[str], golds: list[str]) -> bool | None:
    verdicts = [_same(a, b).correct for a, b in zip(items, golds, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _match_any_order(items: list[str], golds: list[str]) -> bool | None:
    left, undecided = list(golds), False
    for item in items:
        verdicts = [_same(item, gold).correct for gold in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            undecided = True
        else:
            return False
    return None if undecided else True


def _same_values(given: str, wanted: str) -> Verdict:
    mine, unit = split_unit(given)
    theirs, other = split_unit(wanted)
    if unit and other and unit != other:
        return _no(f"another unit: {unit} against {other}")
    if (mine, theirs) != (given, wanted) and compact(mine) == compact(theirs):
        return _yes("the same value; a unit may be left off")
    try:
        gold = exact(theirs.rstrip("% "))
        answer = exact(mine.rstrip("% "))
    except NoValueError:
        return _formulas(mine, theirs)
    except TooLargeError as error:
        return _no(f"not the same text, and {error}")
    if _same_share(answer, gold, mine.endswith("%"), theirs.endswith("%")):
        return _yes("the same number")
    return _no(f"another number: {mine[:40]} against {theirs[:40]}")


def _same_share(answer: Fraction, gold: Fraction, percent: bool, percent_gold: bool) -> bool:
    """Compare numbers with percent signs: 50% is 50 and 0.5; but 0.5% is not 0.5, as 0.5 is a share."""
    if percent and not percent_gold:
        return answer / 100 == gold or (answer == gold and abs(gold) >= 1)
    if percent_gold and not percent:
        return answer in (gold, gold / 100)
    return answer == gold


def _formulas(given: str, wanted: str) -> Verdict:
    """Leave two formulas undecided, for math-verify, unless they are words or too large to compute."""
    for text in (given, wanted):
        if _has_words(text):
            return _no("not the same text, and words are not formulas")
    if ("=" in _UNDER.sub("", given)) != ("=" in _UNDER.sub("", wanted)):  # not the n=1 under a sum
        return _no("an equation against a value")
    if max(len(given), len(wanted)) > MAX_FORMULA:
        return _no("not the same text, and too long for a formula")
    if _HEAVY.search(given) and not _HEAVY.search(wanted):
        return _no("powers or factorials too large to work out")
    if _differ_clearly(given, wanted):
        return _no("another number")
    return Verdict(correct=None, why="", formulas=(given, wanted))


def _differ_clearly(given: str, wanted: str) -> bool:
    """Whether both are unambiguous numbers that differ, so that math-verify is not needed."""
    if _DOUBTFUL.search(given) or _DOUBTFUL.search(wanted):
        return False
    try:
        answer, gold = number(given), number(wanted)
    except NoValueError:
        return False
    return abs(answer - gold) > 1e-6 * max(1.0, abs(answer), abs(gold))


def _has_words(text: str) -> bool:
    return any(word not in _FUNCTIONS for word in _LONG_WORD.findall(text))
