"""Kills at file events: whenever a run is killed, the same command ends with what an undisturbed run has.

The file events of a story are counted, and then it is killed at each of them (or, without `--every-kill`, at
a few), started again and compared.
"""

import pytest
from stories import SIGNALS, STORIES, runner, spread, strike, undisturbed

__all__ = ["runner", "undisturbed"]

FEW = {"distill": 2, "sft": 3, "grpo": 3}
"""How many kills of a story are tried in an ordinary run of the tests."""


@pytest.mark.fault("kills", "SIGKILL at file events of distillation, SFT, RL, evaluation and report",
                   "the same command ends with the same bytes, nothing left over")  # fmt: skip
@pytest.mark.parametrize("story", STORIES)
def test_killed_at_file_events(runner, undisturbed, tmp_path, story, request, record_property):
    events = len(undisturbed.of(story)[1][0])
    points = spread(events, FEW[story], request.config.getoption("every_kill"))
    record_property("times", len(points))
    strike(runner, undisturbed, tmp_path, story, SIGNALS["SIGKILL"], points)


@pytest.mark.fault("kills", "SIGTERM, SIGINT once and twice at file events of all stages",
                   "the same command ends with the same bytes, nothing left over")  # fmt: skip
@pytest.mark.parametrize("name", [name for name in SIGNALS if name != "SIGKILL"])
def test_stopped_at_file_events(runner, undisturbed, tmp_path, name, request, record_property):
    every = request.config.getoption("every_kill")
    stories = ["sft", "grpo"] if every else ["grpo" if name == "SIGTERM" else "sft"]
    times = 0
    for story in stories:
        events = len(undisturbed.of(story)[1][0])
        points = spread(events, 1 if not every else events // 4, False)[-40:]
        if not every:
            points = [events // 2]
        times += len(points)
        strike(runner, undisturbed, tmp_path, story, SIGNALS[name], points)
    record_property("times", times)


@pytest.mark.fault("kills", "SIGKILL of one of two or four ranks at file events",
                   "the others end, and the same command ends with the same bytes")  # fmt: skip
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("story", ["sft", "grpo"])
def test_one_rank_is_killed(runner, undisturbed, tmp_path, story, ranks, request, record_property):
    if not request.config.getoption("every_kill"):
        pytest.skip("minutes: `make test-faults` runs it")
    events = undisturbed.of(story, ranks)[1]
    times = 0
    for rank in range(min(ranks, 2)):
        points = spread(len(events[rank]), min(len(events[rank]), 10), False)
        times += len(points)
        strike(runner, undisturbed, tmp_path, story, SIGNALS["SIGKILL"], points, ranks=ranks, rank=rank)
    record_property("times", times)
