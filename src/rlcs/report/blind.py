"""What a run's arms answer without the image, and which part of wrong answers failed: for the report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rlcs.data.puzzles.faults import FAULTS
from rlcs.evals.blind import split_gains
from rlcs.recipe.arms import ARMS, gain_pairs
from rlcs.records import GradedSample
from rlcs.report.load_run import Run, number, part
from rlcs.report.pages import points


@dataclass(frozen=True, kw_only=True, slots=True)
class BlindControl:
    """The split of the arms' gains (see `evals.blind`), with several seeds over each problem's mean."""

    split: Mapping[str, Any]

    @property
    def sentence(self) -> str:
        """What the main gain rests on."""
        gains, needs = self.split["gains"], self.split["n"] - self.split["without_need"]
        if not gains:
            return ""
        gain = gains[-1]
        parts = {"need their image": (needs, gain["needs_image"])}
        parts["do not"] = (self.split["without_need"], gain["without_need"])
        found = [
            f"{points(part['points'])} points ({points(part['low'])} to {points(part['high'])}) on the {n:,} "
            f"problems that {which}"
            for which, (n, part) in parts.items()
            if n
        ]
        arms = f"{ARMS[gain['arm']].label} against {ARMS[gain['against']].label}"
        return f"{arms}: {', '.join(found)}."


def blind_control(runs: Sequence[Run]) -> BlindControl | None:
    """The blind control of a run or of its seeds; None where nothing was answered blind."""
    arms = [arm for arm in ARMS if any(run.blind.get(arm) for run in runs)]
    if not arms:
        return None
    problems = {problem.id: problem for run in runs for problem in run.problems if problem.images}
    chances = [1 / len(problem.choices) if problem.choices else 0.0 for problem in problems.values()]
    split = split_gains(
        {arm: _shares([run.answers.get(arm, {}) for run in runs]) for arm in arms},
        {arm: _shares([run.blind.get(arm, {}) for run in runs]) for arm in arms},
        pairs=gain_pairs(arms),
        chance=fmean(chances) if chances else 0.0,
    )
    return BlindControl(split=split) if split["n"] else None


def _shares(answers: Sequence[Mapping[str, GradedSample]]) -> dict[str, float]:
    """The share of seeds in which each problem is answered right."""
    verdicts: dict[str, list[bool]] = {}
    for of_seed in answers:
        for name, answer in of_seed.items():
            verdicts.setdefault(name, []).append(answer.grade.correct is True)
    return {name: fmean(right) for name, right in verdicts.items()}


def fault_counts(runs: Sequence[Run]) -> dict[str, dict[str, int]]:
    """By arm, how many answers failed in which part, over all seeds; only where scenes are known."""
    found: dict[str, dict[str, int]] = {}
    for arm in ARMS:
        counts: Counter[str] = Counter()
        for run in runs:
            faults = part(run.scores.get(arm, {}), "faults")
            counts.update({name: int(number(faults, name) or 0) for name in faults})
        if counts:
            found[arm] = {name: counts[name] for name in FAULTS}
    return found
