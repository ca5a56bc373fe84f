"""The order of RL problems by a running estimate of their pass rates, made from the answers of training.

A group of G answers teaches nothing where all are right or all are wrong, which at a pass rate p leaves it a
chance of 1 - p^G - (1 - p)^G of a signal. For every G that falls with the distance of p from 1/2. So problems
are drawn by Thompson sampling, as in MoPPS (arXiv 2507.04632, section 3): a pass rate is drawn from each
problem's Beta posterior, and those nearest to a target are taken: 1/2 for most signal.
"""

import base64
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlcs.data.stream import Outcome, ProblemStream
from rlcs.errors import CheckpointError
from rlcs.records import Problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Order = Literal["shuffled", "signal", "easy_first"]
HALF_LIFE = 50.0
"""Steps after which an answer counts half: the policy that gave it has changed."""
PROBLEM_PRIOR = 2.0
"""Answers of a problem that weigh as much as the mean of its kind."""
KIND_PRIOR = 8.0
"""Answers of a kind that weigh as much as the mean of all, or as the rows' own pass rates."""
KIND_SIZE = 20
"""Problems of a kind, on average, at least."""
RATING = frozenset(
    {"samples", "right", "pass_rate", "pass_rate_low", "pass_rate_high"}
    | {"blind_samples", "blind_right", "blind_rate"}
)
"""Columns of a row that measured pass rates are written in."""
EASIEST, MEDIUM, HARDEST = 0.8, 0.5, 0.2
"""Target pass rates: `easy_first` goes from the first to the last, `signal` stays at the middle."""
SHUFFLED_EVERY = 8
"""One of so many problems is the next of the shuffled order instead: each comes up again whatever its
estimate, and the difference to these shows what the order gains."""


class PassRates:
    """The Beta posterior of each problem's pass rate, which forgets as the policy changes.

    A problem's answers count half after HALF_LIFE steps. Its prior mean is the mean of its kind, and that of
    a kind leans on the mean of all: most problems are answered once or never before they are chosen. A kind
    are the problems of one source whose rows agree in the columns that have few values (a level, a category)
    and in the tenth of their `pass_rate`, with which its mean begins: it may be another model's.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        """Nothing has been answered yet."""
        import numpy as np

        tenths, names = [_tenth(problem) for problem in problems], _kinds(problems)
        number: dict[tuple[Any, ...], int] = {}
        kinds = [number.setdefault(key, len(number)) for key in zip(tenths, names, strict=True)]
        self._kinds = np.array(kinds, dtype=np.int32)
        self._given = np.array([np.nan if tenth is None else (tenth + 0.5) / 10 for tenth, _ in number])
        self._answers = np.zeros(len(problems), dtype=np.float32)
        self._right = np.zeros(len(problems), dtype=np.float32)
        self._seen = np.zeros(len(problems), dtype=np.int32)

    def add(self, index: int, outcome: Outcome, step: int) -> None:
        """Count the answers to a problem after `step` steps."""
        kept = 0.5 ** ((step - self._seen[index]) / HALF_LIFE)
        self._answers[index] = self._answers[index] * kept + outcome.answers
        self._right[index] = self._right[index] * kept + outcome.right
        self._seen[index] = step

    def posterior(self, step: int) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
        """Both parameters of every problem's Beta distribution after `step` steps."""
        import numpy as np

        kept = 0.5 ** ((step - self._seen) / HALF_LIFE)
        answers, right = self._answers * kept, self._right * kept
        overall = (right.sum() + 1) / (answers.sum() + 2)
        start = np.where(np.isnan(self._given), overall, self._given)
        of_kind = np.bincount(self._kinds, right, len(start)) + KIND_PRIOR * start
        of_kind /= np.bincount(self._kinds, answers, len(start)) + KIND_PRIOR
        mean = np.clip(of_kind, 0.01, 0.99)[self._kinds]
        return PROBLEM_PRIOR * mean + right, PROBLEM_PRIOR * (1 - mean) + answers - right

    def state(self) -> dict[str, str]:
        """What `restore` reads: 16 bytes for each problem that was answered, 22 MB of text for a million."""
        import numpy as np

        seen = np.flatnonzero(self._answers).astype(np.int32)
        arrays = (seen, self._seen[seen], self._answers[seen], self._right[seen])
        names = ("index", "step", "answers", "right")
        return {
            name: base64.b64encode(array.tobytes()).decode()
            for name, array in zip(names, arrays, strict=True)
        }

    def restore(self, state: Mapping[str, str]) -> None:
        """Take up the counts of `state`. Raises ValueError where they are not of these problems."""
        import numpy as np

        raw = {name: base64.b64decode(text, validate=True) for name, text in state.items()}
        index, step = (np.frombuffer(raw[name], dtype=np.int32) for name in ("index", "step"))
        answers, right = (np.frombuffer(raw[name], dtype=np.float32) for name in ("answers", "right"))
        if not len(index) == len(step) == len(answers) == len(right):
            raise ValueError("columns of different lengths")
        if len(index) and not 0 <= index.min() <= index.max() < len(self._kinds):
            raise ValueError("a problem that is not there")
        for array, values in ((self._seen, step), (self._answers, answers), (self._right, right)):
            array[:] = 0
            array[index] = values


class EstimatedStream(ProblemStream[Problem]):
    """Problems in an order by their estimated pass rates, which learns from each step's answers.

    The order depends only on the seed and on what was observed, so all ranks draw the same. Problems that
    `peek` shows are drawn for good: what is observed afterwards changes the order behind them. No problem is
    drawn again before its answers are observed, unless there are too few.
    """

    def __init__(self, problems: Sequence[Problem], *, seed: int, order: Order, steps: int) -> None:
        """Start with equal estimates; `easy_first` goes over `steps` steps. Raises DataError if none."""
        super().__init__(problems, seed=seed)
        self._rates = PassRates(problems)
        self._easy_first, self._steps = order == "easy_first", steps
        self._draws = self._observed = 0
        self._queue: list[tuple[int, bool]] = []
        """Problems that were drawn and not taken yet, each with whether the estimate chose it."""
        self._taken: list[tuple[int, bool]] = []
        """Those that were taken and not observed yet."""
        self._aside: set[int] = set()
        """Those that cannot become prompts."""

    @property
    def target(self) -> float:
        """The pass rate that is looked for."""
        done = min(1.0, self._observed / max(1, self._steps - 1))
        return EASIEST + (HARDEST - EASIEST) * done if self._easy_first else MEDIUM

    def take(self, n: int) -> list[Problem]:
        """Return the next `n` problems."""
        problems = self.peek(n)
        self._taken += self._queue[:n]
        del self._queue[:n]
        return problems

    def peek(self, n: int) -> list[Problem]:
        """The next `n` problems, which `take` will return."""
        while (missing := n - len(self._queue)) > 0:
            self._draw(min(missing, len(self) - len(self._aside)))
        return [self._items[index] for index, _ in self._queue[:n]]

    def set_aside(self, problem_ids: Collection[str]) -> None:
        """Draw these problems no more: without answers their estimates would stay what draws them now."""
        named = {index for index, _ in self._taken if self._items[index].id in problem_ids}
        if len(self._aside | named) < len(self):
            self._aside |= named

    def observe(self, outcomes: Iterable[Outcome]) -> dict[str, float]:
        """Learn from a step's answers; shares of its problems with a signal, by the order that drew them."""
        index_of = {self._items[index].id: (index, estimated) for index, estimated in self._taken}
        signals: dict[str, list[bool]] = {}
        self._observed += 1
        for outcome in outcomes:
            index, estimated = index_of[outcome.problem_id]
            self._rates.add(index, outcome, self._observed)
            name = "signal_by_estimate" if estimated else "signal_shuffled"
            signals.setdefault(name, []).append(outcome.signal)
        self._taken = []
        return {name: sum(each) / len(each) for name, each in sorted(signals.items())}

    def _draw(self, n: int) -> None:
        """Draw `n` problems, at most all, into the queue."""
        import numpy as np

        waiting = {index for index, _ in (*self._queue, *self._taken)} | self._aside
        if len(waiting) + n > len(self):
            waiting = set(self._aside)
        alpha, beta = self._rates.posterior(self._observed)
        rates = np.random.default_rng([self._seed % 2**32, self._draws]).beta(alpha, beta)
        nearest = iter(np.argsort(np.abs(rates - self.target), kind="stable").tolist())
        for _ in range(n):
            estimated = self._draws % SHUFFLED_EVERY != SHUFFLED_EVERY - 1
            source = nearest if estimated else iter(self._next, None)
            index = next(index for index in source if index not in waiting)
            self._queue.append((index, estimated))
            waiting.add(index)
            self._draws += 1

    def state(self) -> dict[str, Any]:
        """See `ProblemStream.state`; with the estimates and the problems that are under way."""
        order = {"draws": self._draws, "observed": self._observed, "queue": self._queue, "taken": self._taken}
        if self._aside:
            order["aside"] = sorted(self._aside)
        order = {name: [*value] if isinstance(value, list) else value for name, value in order.items()}
        return {**super().state(), "order": order, "rates": self._rates.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `ProblemStream.restore`."""
        super().restore({key: value for key, value in state.items() if key not in ("order", "rates")})
        try:
            order = state["order"]
            self._draws, self._observed = int(order["draws"]), int(order["observed"])
            self._queue, self._taken = (
                [(int(index), bool(estimated)) for index, estimated in order[name]]
                for name in ("queue", "taken")
            )
            self._aside = {int(index) for index in order.get("aside", ())}
            self._rates.restore(state["rates"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the estimated pass rates of the data cursor cannot be read: {error}",
                fix="resume with the grpo.order that wrote it, or start a new run",
            ) from error


def stream_of(problems: Sequence[Problem], order: Order, *, seed: int, steps: int) -> ProblemStream[Problem]:
    """The stream of RL problems in the order that a recipe chooses, over a stage of `steps` steps."""
    if order == "shuffled":
        return ProblemStream(problems, seed=seed)
    return EstimatedStream(problems, seed=seed, order=order, steps=steps)


def _tenth(problem: Problem) -> int | None:
    rate = problem.metadata.get("pass_rate")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        return None
    return min(9, int(rate * 10))


def _kinds(problems: Sequence[Problem]) -> list[tuple[Any, ...]]:
    """The kind of each problem: its source, and its values in those columns that have few.

    Columns are added in their order as long as a kind has KIND_SIZE problems on average.
    """
    columns = dict.fromkeys(name for problem in problems for name in problem.metadata if name not in RATING)
    kinds: list[tuple[Any, ...]] = [(problem.source,) for problem in problems]
    for name in columns:
        finer = [
            (*kind, str(problem.metadata.get(name))) for kind, problem in zip(kinds, problems, strict=True)
        ]
        if len(set(finer)) * KIND_SIZE <= len(problems):
            kinds = finer
    return kinds
