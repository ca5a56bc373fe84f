"""The cold start in the report: lengths of answers, pass rates of problems, and samples of answers."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from rlcs.records import Turn, from_row_or_none
from rlcs.report import pictures
from rlcs.report.load_run import Row, number, read_rows, text
from rlcs.report.pages import digits

_IMAGE_BYTES = 12_000
_COUNTERS = {
    "problems": "problems",
    "given": "demonstrations in the data",
    "given_wrong": "wrong demonstrations in the data",
    "given_unscored": "demonstrations in the data that could not be scored",
    "given_unchecked": "demonstrations in the data without a gold answer",
    "asked": "answers of the teacher",
    "right": "right answers",
    "pass_rate": "share of right answers",
    "kept": "demonstrations kept",
    "kept_wrong": "wrong demonstrations kept",
    "rejected": "answers left out",
    "unscored": "answers not scored",
    "without_demonstration": "problems without one",
    "prompt_tokens": "tokens sent to the teacher",
    "completion_tokens": "tokens of its answers",
    "cost": "cost",
    "failed": "requests that failed",
    "refused": "requests that were refused",
}
"""The counters of stats.json, as a reader knows them."""
_LENGTHS = (100, 200, 400, 800, 1600, 3200, 6400)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherAnswer:
    """One answer of the teacher; `why` is the reason of its rejection, empty where it was kept."""

    id: str
    history: tuple[Turn, ...]
    question: str
    answer: str
    response: str
    why: str
    images: tuple[pictures.Picture, ...]


def counters(stats: Row) -> tuple[list[tuple[str, str]], list[str]]:
    """The (name, value) of the counters of stats.json, and the names of those that are zero."""
    shown, zeros = [], []
    for key, name in _COUNTERS.items():
        value = number(stats, key)
        if value:
            shown.append((name, f"{value:.1%}" if key == "pass_rate" else digits(value)))
        elif value is not None:
            zeros.append(name)
    return shown, zeros


def samples(folder: Path, count: int) -> list[TeacherAnswer]:
    """Up to `count` answers, kept and rejected ones alternating, chosen by a hash of their ids."""
    problems = {text(row, "id"): row for row in read_rows(folder / "problems.jsonl")}
    kept = _few(read_rows(folder / "kept.jsonl"), count)
    rejected = _few(read_rows(folder / "rejected.jsonl"), count)
    answers = []
    for row in [row for row in chain(*zip_longest(kept, rejected)) if row is not None][:count]:
        problem = problems.get(text(row, "problem_id") or text(row, "id"), row)
        images = problem.get("images")
        names = [str(name) for name in images[:2]] if isinstance(images, list) else []
        answers.append(
            TeacherAnswer(
                id=text(row, "id"),
                history=_history(problem),
                question=text(problem, "question"),
                answer=text(problem, "answer"),
                response=text(row, "response"),
                why=text(row, "why"),
                images=tuple(pictures.embed(folder, names, most_bytes=_IMAGE_BYTES)),
            )
        )
    return answers


def _history(problem: Row) -> tuple[Turn, ...]:
    """The turns before the question that can be read."""
    history = problem.get("history")
    rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    return tuple(turn for row in rows if (turn := from_row_or_none(Turn, row)) is not None)


def _few(rows: Iterator[Row], count: int) -> list[Row]:
    def digest(row: Row) -> bytes:
        return hashlib.sha256(f"{text(row, 'id')}|{text(row, 'attempt')}".encode()).digest()

    return sorted(rows, key=digest)[:count]


def histograms(folder: Path, stats: Row) -> Mapping[str, list[tuple[str, int, float]]]:
    """Histograms by title: the (bin, count, share of the largest bin), without empty bins.

    Of the lengths of answers, and of pass rates where problems were asked more than once.
    """
    counts = Counter(_length(text(row, "response")) for row in read_rows(folder / "kept.jsonl"))
    names = [f"up to {most:,}" for most in _LENGTHS] + ["longer"]
    found = {"Characters of kept answers": _bars(names, [counts[i] for i in range(len(names))])}
    rates = stats.get("pass_rates")
    if isinstance(rates, list) and len(rates) == 10:
        tenths = [f"{i * 10}–{i * 10 + 10}%" for i in range(10)]
        counted = [n if isinstance(n, int) else 0 for n in rates]
        if any(counted[1:-1]):  # with one answer each a problem is all right or all wrong
            found["Problems by pass rate"] = _bars(tenths, counted)
    return {title: bars for title, bars in found.items() if bars}


def _length(response: str) -> int:
    return next((i for i, most in enumerate(_LENGTHS) if len(response) <= most), len(_LENGTHS))


def _bars(names: Sequence[str], counts: Sequence[int]) -> list[tuple[str, int, float]]:
    most = max(counts, default=0)
    return [(name, n, n / most) for name, n in zip(names, counts, strict=True) if n > 0]
