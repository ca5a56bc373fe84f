"""Signals that ask a run to end, at a spread of its file events: the same command goes on from there."""

import pytest
from stories import SIGNALS, runner, strike, undisturbed

__all__ = ["runner", "undisturbed"]

STORIES = {"sft": 20, "grpo": 20, "overlap": 6, "eval": 6}
"""Stories, and at how many events each signal comes."""


@pytest.mark.fault("kills", "SIGTERM, SIGINT once and twice, and SIGKILL after a short grace, in all stages",
                   "the same command ends with the same bytes, nothing left over")  # fmt: skip
@pytest.mark.parametrize("name", [name for name in SIGNALS if name != "SIGKILL"])
@pytest.mark.parametrize("story", STORIES)
def test_stopped_at_file_events(runner, undisturbed, tmp_path, story, name, request, record_property):
    if not request.config.getoption("every_kill"):
        pytest.skip("minutes: `make test-faults` runs it")
    record_property("times", strike(runner, undisturbed, tmp_path, story, SIGNALS[name], STORIES[story]))
