"""Opening the graders of a run's reward: how many processes each rank starts."""

from pathlib import Path

import pytest

from rlcs.distributed import World
from rlcs.grading import reward as rewards
from rlcs.pipeline.graders import open_graders
from rlcs.recipe.stages import Reward


@pytest.mark.parametrize(
    ("workers", "cores", "ranks", "own"),
    [(1, 64, 8, 1), (16, 64, 8, 2), (0, 64, 8, 4), (0, 64, 1, 32), (3, 2, 1, 3)],
)
def test_the_ranks_of_a_machine_share_its_grader_processes(
    workers: int, cores: int, ranks: int, own: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Pool(rewards.GradePool):
        def __init__(self, *, workers: int, **settings: object) -> None:
            asked.append(workers)
            super().__init__(workers=workers)

    monkeypatch.setattr(rewards, "GradePool", Pool)
    monkeypatch.setattr("rlcs.pipeline.graders.usable_cores", lambda: cores)
    with open_graders(Reward(workers=workers), World(local_size=ranks), tmp_path):
        assert asked == [own]
