"""What problems were answered at their last visit of a run: the local engine drafts from it.

A problem that comes again is answered much as before, so that most of its answers need few decoding passes
(`engines.drafting`). A run that goes on reads the answers from its log: it drafts what it would have drafted.

That answers of neighbouring epochs are alike: He et al., "History Rhymes: Accelerating LLM Reinforcement
Learning with RhymeRL" (arXiv 2508.18588, 2025).
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlcs.data.problem_store import ROLLOUTS
from rlcs.distributed import World
from rlcs.errors import DataError
from rlcs.recipe.stages import Grpo
from rlcs.records import Group, Prompt
from rlcs.storage import as_written, read_jsonl
from rlcs.train.batching import BYTES_A_TOKEN
from rlcs.train.rollout_log import file_of

CHARACTERS_A_ROW = 400
"""Characters of a rollout in the log beside its text: ids, reward, why."""
MOST_CHARACTERS = 1 << 29
"""Characters of the log that a run which goes on may have to read again: less than a minute.

A group has many answers in the log and one in memory.
"""

Row = Mapping[str, Any]


class EarlierAnswers:
    """The answer that each problem got most often at its last visit, if that is at most two epochs ago."""

    def __init__(self, settings: Grpo, problems: int) -> None:
        """Nothing yet; of no `problems` nothing ever.

        Where the longest answers of two epochs could be more than `MOST_CHARACTERS`, those of fewer steps are
        kept; where those of one could, none are.
        """
        epoch = math.ceil(problems / settings.prompts_per_step)
        self._longest = settings.max_new_tokens * BYTES_A_TOKEN
        rollouts = settings.prompts_per_step * settings.group_size
        fitting = MOST_CHARACTERS // (rollouts * (self._longest + CHARACTERS_A_ROW))
        self._steps = min(2 * epoch, fitting) if fitting >= epoch else 0
        self._answers: dict[str, tuple[int, str]] = {}

    def keep(self, groups: Sequence[Group], *, step: int) -> None:
        """Take note of the groups of step `step` (from 1), as its log has them."""
        if self._steps:
            rows = ({"id": g.problem.id, "response": r.text} for g in groups for r in g.rollouts)
            self._answers |= self._most_said(as_written(rows), step)

    def read(self, stage: Path, *, step: int, world: World) -> None:
        """Take note of what the log of a stage has of the steps up to `step`; all ranks call it.

        A file that is missing or damaged is left out: what is drafted changes no answer.
        """
        self._answers |= world.first(lambda: self._logged(stage / ROLLOUTS, step))

    def given(self, prompts: Sequence[Prompt], step: int) -> list[Prompt]:
        """The prompts of the step after step `step`, each with the earlier answer to its problem, if any."""
        found = (self._answers.get(prompt.problem_id, (0, "")) for prompt in prompts)
        return [
            replace(prompt, earlier=answer) if answer and kept > step - self._steps else prompt
            for prompt, (kept, answer) in zip(prompts, found, strict=True)
        ]

    def _logged(self, folder: Path, step: int) -> dict[str, tuple[int, str]]:
        answers: dict[str, tuple[int, str]] = {}
        for number in range(max(0, step - self._steps) + 1, step + 1):
            try:
                answers |= self._most_said(read_jsonl(folder / file_of(number)), number)
            except (DataError, KeyError, OSError):
                continue
        return answers

    def _most_said(self, rows: Iterable[Row], step: int) -> dict[str, tuple[int, str]]:
        """Of each problem's answers the most frequent, the first of those; the beginning of a long one."""
        counts: dict[str, Counter[str]] = {}
        for row in rows:
            text = str(row["response"]).encode(errors="ignore").decode()  # without half characters
            counts.setdefault(str(row["id"]), Counter())[text] += 1
        most = ((problem, count.most_common(1)[0][0]) for problem, count in counts.items())
        return {problem: (step, text[: self._longest]) for problem, text in most}
