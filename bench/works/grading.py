"""Grading against math-verify and mathruler: 1,000 answers whose right verdict is known.

Peers are called as their users call them: math-verify parses both sides and compares; mathruler takes the box
and compares. How often each gives the known verdict stands beside the seconds.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import count

from math_verify import parse, verify

from bench.pairs import Options, in_turns, row
from bench.table import Row
from rlcs.grading.pool import GradePool
from rlcs.records import Problem

ANSWERS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A gold answer, a response, and whether it is right."""

    gold: str
    response: str
    right: bool


def rows(options: Options) -> list[Row]:
    """One row a peer."""
    numbers = count()
    with GradePool() as pool:
        ours = partial(by_rlcs, pool)
        peers = {"math-verify": by_math_verify, "mathruler": by_mathruler}
        return [_row(name, ours, side, numbers, options) for name, side in peers.items()]


Side = Callable[[Sequence[Answer]], list[bool]]
"""Gives verdicts."""


def _row(name: str, ours: Side, theirs: Side, numbers: Iterator[int], options: Options) -> Row:
    """`numbers` are of lists that no side has seen: what was read once is remembered by some."""
    lists = [made_answers(ANSWERS, next(numbers)) for _ in range(options.rounds)]
    mine, others = iter(lists), iter(lists)
    agreed: dict[str, list[float]] = {"ours": [], "theirs": []}

    def grade(side: Side, left: Iterator[list[Answer]], name: str) -> None:
        answers = next(left)
        agreed[name].append(agreement(side(answers), answers))

    for side in (ours, theirs):
        side(made_answers(ANSWERS, next(numbers))[: len(FORMS)])  # what is set up at first use
    pair = in_turns(
        partial(grade, ours, mine, "ours"),
        partial(grade, theirs, others, "theirs"),
        rounds=options.rounds,
        clock=options.clock,
    )
    return row(
        work="grading",
        shape=f"{ANSWERS:,} answers",
        phase="grade",
        peer=f"{name} {version(name)}",
        pair=pair,
        right_verdicts=f"{statistics.mean(agreed['ours']):.1%}",
        peer_right_verdicts=f"{statistics.mean(agreed['theirs']):.1%}",
    )


def by_rlcs(pool: GradePool, answers: Sequence[Answer]) -> list[bool]:
    """Verdicts as training asks for them."""
    problems = [
        Problem(id=str(number), source="bench", question="?", answer=each.gold)
        for number, each in enumerate(answers)
    ]
    pairs = [(problem, each.response) for problem, each in zip(problems, answers, strict=True)]
    return [bool(grade.correct) for grade in pool.grade(pairs)]


def by_math_verify(answers: Sequence[Answer]) -> list[bool]:
    """Verdicts of math-verify; it wants the gold answer as LaTeX."""
    return [bool(verify(parse(f"${each.gold}$"), parse(each.response))) for each in answers]


def by_mathruler(answers: Sequence[Answer]) -> list[bool]:
    """Verdicts of mathruler, as EasyR1's reward asks for them."""
    from mathruler.grader import extract_boxed_content, grade_answer

    return [bool(grade_answer(extract_boxed_content(each.response), each.gold)) for each in answers]


def agreement(verdicts: Sequence[bool], answers: Sequence[Answer]) -> float:
    """The share of answers on which the verdict is the known one."""
    return sum(got == each.right for got, each in zip(verdicts, answers, strict=True)) / len(answers)


FORMS: tuple[tuple[str, str, bool], ...] = (
    ("{a}", "{a}", True),
    ("{a}", "{b}", False),
    ("{a}", "{a}.0", True),
    ("{c}", "{a}", False),
    (r"\frac{{{a}}}{{{p}}}", r"\dfrac{{{a}}}{{{p}}}", True),
    (r"\frac{{{a}}}{{{p}}}", "{a}/{p}", True),
    (r"\frac{{{a}}}{{{p}}}", r"\frac{{{a2}}}{{{p2}}}", True),
    (r"\frac{{{a}}}{{{p}}}", r"\frac{{{b}}}{{{p}}}", False),
    ("{a}.5", r"\frac{{{half}}}{{2}}", True),
    ("{a}.5", "{a}.25", False),
    ("{a}%", r"{a}\%", True),
    (r"{a}\sqrt{{3}}", r"{a}\sqrt{{3}}", True),
    (r"{a}\sqrt{{3}}", r"{a}\sqrt{{2}}", False),
    (r"{a}\sqrt{{3}}", r"\sqrt{{{under}}}", True),
    (r"{a}\pi", r"{a} \pi", True),
    (r"{a}\pi", "{a}", False),
    ("x^2+{a}x", "x(x+{a})", True),
    ("x^2+{a}x", "x^2-{a}x", False),
    ("({a},{b})", "({a}, {b})", True),
    ("({a},{b})", "({b}, {a})", False),
    ("[{a},{b}]", r"\left[{a}, {b}\right]", True),
    (r"{a}^\circ", r"{a}^{{\circ}}", True),
    (r"{a}^\circ", r"{b}^{{\circ}}", False),
    ("{c}", "{c_commas}", True),
    (r"{a}\text{{ cm}}", r"{a}\,\mathrm{{cm}}", True),
)
"""Gold answers and what is in the box, with numbers to fill in, and whether that is right."""


def made_answers(size: int, number: int = 0) -> list[Answer]:
    """So many answers, the same each time: forms in turn, with other numbers each time around.

    Lists of another `number` have other numbers in them.
    """
    first = number * -(-size // len(FORMS))
    return [_made(*FORMS[index % len(FORMS)], first + index // len(FORMS)) for index in range(size)]


def _made(gold: str, boxed: str, right: bool, turn: int) -> Answer:
    a, p, c = 3 + 2 * turn, 97 + 2 * turn, 10_000 + 137 * turn
    p += p % a == 0
    numbers: dict[str, object] = {"a": a, "b": a + 1, "p": p, "a2": 2 * a, "p2": 2 * p, "half": 2 * a + 1}
    numbers |= {"under": 3 * a * a, "c": c, "c_commas": f"{c:,}"}
    text = boxed.format_map(numbers)
    response = (
        f"<think>First I read the figure, then I count: {a} and {p}.</think> The answer is \\boxed{{{text}}}."
    )
    return Answer(gold=gold.format_map(numbers), response=response, right=right)
