"""Opens the graders of a run's reward, with its judge on one rank."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rlcs.cores import usable_cores
from rlcs.distributed import World
from rlcs.generation.judge import Judge, JudgeOfRanks, open_judge
from rlcs.grading.reward import WeightedSum, open_reward
from rlcs.recipe.stages import Reward


@contextmanager
def open_graders(
    reward: Reward, world: World, replies: Path, *, only_correct: bool = False, trial: bool = False
) -> Iterator[tuple[WeightedSum, Judge | None]]:
    """Open the grader of the reward, and its judge if it has one: on rank 0 alone, with its `replies`.

    `only_correct` opens just the part that decides whether an answer is correct. What a `trial` asks does not
    count towards the judge's `max_requests`. The ranks of a machine share its grader processes, one each at
    least.
    """
    workers = reward.workers or max(1, usable_cores() // 2)
    reward = reward.model_copy(update={"workers": max(1, workers // world.local_size)})
    names = list(reward.weights)[: 1 if only_correct else None]
    with ExitStack() as stack:
        judge = None
        if "judge" in names and world.rank == 0:
            settings = reward.judge.model_copy(update={"max_requests": None} if trial else {})
            judge = stack.enter_context(open_judge(settings, replies))
        shared = JudgeOfRanks(judge=judge, world=world)
        yield stack.enter_context(open_reward(reward, judge=shared, only_correct=only_correct)), judge
