"""Kills of one of several ranks: the others end, and the same command ends with the same bytes."""

import pytest
from stories import SIGNALS, runner, strike, undisturbed, whole_lane

__all__ = ["runner", "undisturbed", "whole_lane"]

FEW = {2: 8, 4: 4}
"""How many kills of each rank are tried, by the number of ranks."""


pytestmark = pytest.mark.usefixtures("whole_lane")


@pytest.mark.fault("kills", "SIGKILL of one of two or four ranks at its file events",
                   "the others end, and the same command ends with the same bytes")  # fmt: skip
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("story", ["sft", "grpo"])
def test_one_rank_is_killed(runner, undisturbed, tmp_path, story, rank, ranks, record_property):
    how = {"ranks": ranks, "rank": rank}
    done = strike(runner, undisturbed, tmp_path, story, SIGNALS["SIGKILL"], FEW[ranks], **how)
    record_property("times", done)


@pytest.mark.fault("kills", "SIGKILL of one of two ranks in a collective, a step, a save",
                   "the others end, and the same command ends with the same bytes")  # fmt: skip
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("story", "point"),
    [
        ("sft", "rlcs.train.trainer:Trainer.apply"),
        ("grpo", "rlcs.distributed:World.gather"),
        ("grpo", "rlcs.train.checkpoint:Checkpoints.start"),
    ],
)
def test_one_rank_is_killed_at_calls(runner, undisturbed, tmp_path, story, point, rank, record_property):
    how = {"ranks": 2, "rank": rank, "point": point}
    record_property("times", strike(runner, undisturbed, tmp_path, story, SIGNALS["SIGKILL"], 3, **how))


@pytest.mark.fault("kills", "SIGTERM to one of two ranks at its file events",
                   "all stop after the same step, and the same command ends with the same bytes")  # fmt: skip
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_is_stopped(runner, undisturbed, tmp_path, rank, record_property):
    how = {"ranks": 2, "rank": rank}
    record_property("times", strike(runner, undisturbed, tmp_path, "grpo", SIGNALS["SIGTERM"], 5, **how))
