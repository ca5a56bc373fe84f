"""Kills of one process: whenever a run is killed, the same command ends with what an undisturbed run has.

The file events of a story are counted, and then it is killed at each of them (or, without `--every-kill`, at
a few), started again and compared. So it is at calls between file events.
"""

import pytest
from stories import SIGNALS, runner, strike, undisturbed

__all__ = ["runner", "undisturbed"]

FEW = {"distill": 2, "sft": 2, "grpo": 2}
"""How many kills of a story are tried in an ordinary run of the tests; of others none."""
ALL = {"distill": None, "sft": None, "grpo": None, "run": 40, "overlap": 30, "one step off": 30, "eval": None}
"""How many are tried with `--every-kill`; None: at every event."""
BETWEEN = [
    ("sft", "rlcs.train.trainer:Trainer.add", 4),
    ("sft", "rlcs.train.trainer:Trainer.apply", 4),
    ("sft", "rlcs.train.checkpoint:Checkpoints.start", 4),
    ("sft", "rlcs.train.checkpoint:Checkpoints.load_latest", 1),
    ("grpo", "rlcs.engines.local:LocalEngine.sample", 4),
    ("grpo", "rlcs.engines.local:LocalEngine._rollout", 6),
    ("grpo", "rlcs.grading.pool:GradePool.grade", 4),
    ("grpo", "rlcs.train.learning:Learner.finish", 4),
    ("grpo", "rlcs.train.trainer:Trainer.apply", 4),
    ("grpo", "rlcs.train.run_dir:RunDir.after_step", 4),
    ("grpo", "rlcs.train.run_dir:RunDir.finish", 1),
    ("overlap", "rlcs.engines.vllm.server:Server.generate", 8),
    ("overlap", "rlcs.engines.vllm.server:Server.load_weights", 4),
    ("one step off", "rlcs.train.collecting:Collector.request_ahead", 3),
]
"""Stories, calls at which they are killed, and at how many at most."""


@pytest.fixture
def every(request) -> bool:
    return request.config.getoption("every_kill")


@pytest.mark.fault("kills", "SIGKILL at file events of distillation, SFT, RL, evaluation and report",
                   "the same command ends with the same bytes, nothing left over")  # fmt: skip
@pytest.mark.parametrize("story", ALL)
def test_killed_at_file_events(runner, undisturbed, tmp_path, story, every, record_property):
    if not every and story not in FEW:
        pytest.skip("`make test-faults` runs it")
    few = ALL[story] if every else FEW[story]
    record_property("times", strike(runner, undisturbed, tmp_path, story, SIGNALS["SIGKILL"], few))


@pytest.mark.fault(
    "kills",
    "SIGKILL between file events: in answers, grading, steps of the optimiser, while weights are sent",
    "the same command ends with the same bytes, nothing left over",
)
@pytest.mark.parametrize(("story", "point", "few"), BETWEEN)
def test_killed_at_calls(runner, undisturbed, tmp_path, story, point, few, every, record_property):
    if not every:
        pytest.skip("`make test-faults` runs it")
    done = strike(runner, undisturbed, tmp_path, story, SIGNALS["SIGKILL"], few, point=point)
    record_property("times", done)


@pytest.mark.fault("kills", "SIGTERM, SIGINT once and twice at file events of a distillation",
                   "the same command ends with the same bytes, nothing left over")  # fmt: skip
@pytest.mark.parametrize("name", [name for name in SIGNALS if name != "SIGKILL"])
def test_a_distillation_is_stopped(runner, undisturbed, tmp_path, name, every, record_property):
    """`test_kill_signals.py` has the dearer commands."""
    few = None if every else 2
    record_property("times", strike(runner, undisturbed, tmp_path, "distill", SIGNALS[name], few))
