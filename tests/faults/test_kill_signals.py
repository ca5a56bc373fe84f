"""Signals that ask a run to end, at a spread of its file events: the same command goes on from there."""

import pytest
from stories import SIGNALS, runner, strike, undisturbed, whole_lane

__all__ = ["runner", "undisturbed", "whole_lane"]

STORIES = {"sft": 20, "grpo": 20, "overlap": 6, "eval": 6}
"""Stories, and at how many events each signal comes."""


pytestmark = pytest.mark.usefixtures("whole_lane")


@pytest.mark.fault("kills", "SIGTERM, SIGINT once and twice at file events of all stages",
                   "the same command ends with the same bytes, nothing left over")  # fmt: skip
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGINT twice"])
@pytest.mark.parametrize("story", STORIES)
def test_stopped_at_file_events(runner, undisturbed, tmp_path, story, name, record_property):
    record_property("times", strike(runner, undisturbed, tmp_path, story, SIGNALS[name], STORIES[story]))


@pytest.mark.fault("kills", "a preemption: SIGTERM, and SIGKILL when a short grace is over",
                   "the same command ends with the same bytes, nothing left over")  # fmt: skip
@pytest.mark.parametrize("story", STORIES)
def test_preempted_at_file_events(runner, undisturbed, tmp_path, story, record_property):
    signals = SIGNALS["SIGTERM, and SIGKILL after a short grace"]
    record_property("times", strike(runner, undisturbed, tmp_path, story, signals, STORIES[story]))
