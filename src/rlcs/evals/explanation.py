"""Explains grades: what was extracted, which values were read on both sides, which rule decided."""

from collections.abc import Collection

from rlcs.errors import DataError
from rlcs.evals.answer_file import AnswerRow, Graded
from rlcs.grading.extraction import extract
from rlcs.grading.golds import unwrap
from rlcs.records import Grade

_SHOWN = 100
_VERDICTS = {True: "right", False: "wrong", None: "not scored"}
_WRONG_FIRST = (False, None, True)


def select(graded: Graded, ids: Collection[str], limit: int) -> Graded:
    """The rows to explain: those with an id among `ids`, or else the first, wrong ones before the others.

    Raises DataError for an id that no row has.
    """
    if not ids:
        return sorted(graded, key=lambda each: _WRONG_FIRST.index(each[1].correct))[:limit]
    chosen = [each for each in graded if str(each[0].fields.get("id")) in ids]
    missing = set(ids) - {str(row.fields.get("id")) for row, _ in chosen}
    if missing:
        raise DataError(f"no row has the id {min(missing)!r}", where="--id", fix="name ids of the file")
    return chosen


def explain(row: AnswerRow, grade: Grade, *, rule: str = "rlcs", allow_fallbacks: bool = True) -> list[str]:
    """The lines that explain one grade: verdict, answer, gold answer, values, rule."""
    if row.fault:
        return [f"not scored: {row.fault}"]
    lines = [_VERDICTS[grade.correct]]
    answer = "none" if grade.extracted is None else _shown(grade.extracted)
    lines.append(f"  answer   {answer}{_how(row, rule, allow_fallbacks=allow_fallbacks)}")
    gold = unwrap(row.answer) if rule == "rlcs" else None
    if gold is not None and gold.text is not None and gold.why:
        lines.append(f"  gold     {_shown(gold.text)}  ({gold.why}, in {_shown(row.answer.strip())})")
    else:
        lines.append(f"  gold     {_shown(row.answer.strip())}")
    if row.choices:
        lines.append(f"  choices  {_shown('; '.join(row.choices))}")
    if grade.answer_value or grade.gold_value:
        lines.append(
            f"  read     {grade.answer_value or 'nothing'}   against   {grade.gold_value or 'nothing'}"
        )
    return [*lines, f"  rule     {grade.why}"]


def _how(row: AnswerRow, rule: str, *, allow_fallbacks: bool) -> str:
    if row.extraction is not None:
        return "  (the stored extraction)"
    if rule != "rlcs":
        return "  (by the official rule)"
    found = extract(row.response, allow_fallbacks=allow_fallbacks)
    return f"  ({found.why})"


def _shown(text: str) -> str:
    """One line of a text, its end if it is long: answers stand at the end."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"...{line[-_SHOWN:]}"
