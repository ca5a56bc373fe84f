"""We-Math's official rule and its four-dimensional metrics (`evaluation/*.py` of We-Math/We-Math).

A problem has one question as a whole and one for each of its steps. It counts as rote memorisation (RM) if
only the whole is solved, as inadequate generalisation (IG) if only the steps are, as complete mastery (CM) if
both are, and as insufficient knowledge (IK) if the whole and a step are not.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_STRIPPED = str.maketrans("", "", "<>:.")


def extract(response: str) -> str | None:
    """Extract the first letter after the last word "Answer", if it is A to H and not in a box or brackets."""
    text = response.rpartition("Answer")[2].strip().translate(_STRIPPED).strip()
    return text[0] if text[:1] and text[0] in "ABCDEFGH" else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """The result of one problem: whether each of its one-step parts was solved, and whether the whole was."""

    parts: tuple[bool, ...]
    whole: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class FourDimensions:
    """Counts of problems, and the rates computed from them, as fractions of 1."""

    ik: int
    ig: int
    cm: int
    rm: int
    total: int

    @property
    def ik_rate(self) -> float:
        """Insufficient knowledge: share of all problems."""
        return self.ik / self.total if self.total else 0.0

    @property
    def ig_rate(self) -> float:
        """Inadequate generalisation: share of all problems."""
        return self.ig / self.total if self.total else 0.0

    @property
    def cm_rate(self) -> float:
        """Complete mastery: share of all problems."""
        return self.cm / self.total if self.total else 0.0

    @property
    def rm_rate(self) -> float:
        """Rote memorisation: share of the problems solved as a whole, RM/(CM+RM); 0 if there are none."""
        return self.rm / (self.cm + self.rm) if self.cm + self.rm else 0.0

    @property
    def score(self) -> float:
        """The average score, (CM + IG/2) / total."""
        return (self.cm + 0.5 * self.ig) / self.total if self.total else 0.0


def group(items: Iterable[tuple[str, str, bool]]) -> dict[str, Steps]:
    """Group (ID, key, correct) into problems by ID; keys are `2steps_1` ... `3steps_3` and `Nsteps_multi`.

    Raises ValueError for a problem that lacks the whole or a part.
    """
    answers: dict[str, dict[str, bool]] = {}
    steps: dict[str, int] = {}
    for name, key, correct in items:
        number, _, part = key.partition("steps_")
        answers.setdefault(name, {})[part] = correct
        steps[name] = int(number)
    for name, parts in answers.items():
        if set(parts) != {"multi", *(str(i + 1) for i in range(steps[name]))}:
            raise ValueError(f"problem {name} of {steps[name]} steps has only {', '.join(sorted(parts))}")
    return {
        name: Steps(parts=tuple(parts[str(i + 1)] for i in range(steps[name])), whole=parts["multi"])
        for name, parts in answers.items()
    }


def four_dimensions(problems: Iterable[Steps], *, loose: bool) -> FourDimensions:
    """Count problems by dimension. A solved whole is mastered with all parts solved; if `loose`, with any."""
    counts = {"ik": 0, "ig": 0, "cm": 0, "rm": 0}
    for problem in problems:
        if problem.whole:
            known = any(problem.parts) if loose else all(problem.parts)
            counts["cm" if known else "rm"] += 1
        else:
            counts["ig" if all(problem.parts) else "ik"] += 1
    return FourDimensions(**counts, total=sum(counts.values()))


def step_accuracies(problems: Iterable[Steps]) -> dict[str, float]:
    """Accuracies S1, on all one-step parts, and S2 and S3, on the wholes of two and of three steps."""
    solved: Mapping[str, list[bool]] = {"S1": [], "S2": [], "S3": []}
    for problem in problems:
        solved["S1"] += problem.parts
        solved[f"S{len(problem.parts)}"].append(problem.whole)
    return {name: sum(each) / len(each) if each else 0.0 for name, each in solved.items()}
