"""Counts which part of an arm's wrong answers failed, by a judge, where no scene is known."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rlcs.data.puzzles import is_builtin
from rlcs.data.puzzles.faults import FAULTS
from rlcs.generation.fault_judge import judge_faults
from rlcs.recipe.judge import Judge
from rlcs.records import Problem
from rlcs.storage import read_json, read_jsonl, write_json


def add_faults(folder: Path, problems: Sequence[Problem], settings: Judge, replies: Path) -> None:
    """Write the counts into the scores of an arm in `folder`; answers without a score count as unreadable."""
    scores = read_json(folder / "scores.json")
    if "faults" in scores or any(map(is_builtin, problems)):
        return
    by_id = {problem.id: problem for problem in problems}
    rows = read_jsonl(folder / "predictions.jsonl")
    wrong = [row for row in rows if row["correct"] is False and not row["error"]]
    answers = [(by_id[row["id"]], row["response"]) for row in wrong]
    counts = Counter(judge_faults(answers, settings, replies))
    counts["none"] = sum(row["correct"] is True for row in rows)
    counts["unreadable"] += len(rows) - counts["none"] - len(wrong)
    write_json(folder / "scores.json", {**scores, "faults": {name: counts[name] for name in FAULTS}})


def try_fault_judge(problem: Problem, settings: Judge, replies: Path) -> Sequence[str]:
    """Ask once, so that a server that is away is known before the run; a remark where it says nothing."""
    [verdict] = judge_faults([(problem, "I see nothing. \\boxed{?}")], settings, replies)
    return [f"the judge says of an answer that states nothing: {verdict}"]
