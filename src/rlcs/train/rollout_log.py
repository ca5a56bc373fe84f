"""The rollouts of a training stage on disk, with their problems, and their averages for the metrics."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from rlcs.data.problem_store import ProblemStore
from rlcs.grading import health
from rlcs.records import Grade, Group, StopReason, to_row
from rlcs.storage import append_jsonl
from rlcs.train.groups import zero_variance


def file_of(step: int) -> str:
    """The name of the file with the rollouts of step `step` (from 1)."""
    return f"step-{step:06d}.jsonl"


class RolloutLog:
    """Writes one file of rollouts a step, and each problem once with small copies of its images.

    Copies take 26 ms each, 13 s for 512 problems, and the next step does not wait for them.
    """

    def __init__(self, folder: Path) -> None:
        """Writes nothing before the first step."""
        self._folder = folder
        self._problems = ProblemStore(folder)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._writing: Future[None] | None = None

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """Write the rollouts of one step; a step that runs again after a stop replaces its file.

        Returns before that is done, and raises what went wrong with the step before.
        """
        self.wait()
        self._writing = self._writer.submit(self._write, step, groups)

    def wait(self) -> None:
        """Wait until all is written. Raises RunFolderError when the disk is full."""
        if (writing := self._writing) is not None:
            self._writing = None
            writing.result()

    def _write(self, step: int, groups: Sequence[Group]) -> None:
        path = self._folder / file_of(step)
        path.unlink(missing_ok=True)
        append_jsonl(path, [row for group in groups for row in _rows(group)])
        self._problems.add(group.problem for group in groups)


def _rows(group: Group) -> list[dict[str, Any]]:
    """One row for each rollout; it says so if older weights than the policy's sampled it."""
    stale = {"staleness": group.staleness} if group.staleness else {}
    return [to_row(sample) | stale for sample in group.samples]


def _parts(grades: Sequence[Grade]) -> dict[str, float]:
    """The mean of each part, before weighting, over the answers that have it; nothing for a single part."""
    names = list(dict.fromkeys(name for grade in grades for name in grade.parts))
    columns = {name: [score for g in grades if (score := g.parts.get(name)) is not None] for name in names}
    return {f"reward_{name}": fmean(column) for name, column in columns.items() if column and len(names) > 1}


def measure(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of the rollouts of one step: averages over rollouts, shares between 0 and 1."""
    rollouts = [r for group in groups for r in group.rollouts]
    grades = [g for group in groups for g in group.grades]
    scored = [g for g in grades if g.reward is not None]
    count = max(1, len(rollouts))
    tokens = sum(len(r.ids) for r in rollouts)
    values = {
        "accuracy": sum(bool(g.correct) for g in scored) / max(1, len(scored)),
        "reward": sum(g.reward or 0.0 for g in scored) / max(1, len(scored)),
        "response_tokens": tokens / count,
        "truncated": sum(r.stop is StopReason.LENGTH for r in rollouts) / count,
        "unscored": 1.0 - len(scored) / count,
        "zero_variance_groups": sum(map(zero_variance, groups)) / max(1, len(groups)),
        "rollout_tokens": float(tokens),
    }
    return values | _parts(grades) | health([r.text for r in rollouts])
