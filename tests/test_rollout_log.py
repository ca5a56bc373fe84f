"""Rollouts on disk: written beside the next step, and what goes wrong with it is told."""

import threading

import pytest

from rlcs.storage import read_jsonl
from rlcs.train import rollout_log
from rlcs.train.rollout_log import RolloutLog


def test_the_next_step_begins_while_rollouts_are_written(tmp_path, monkeypatch):
    release, written = threading.Event(), []

    def slowly(path, rows):
        assert release.wait(10)
        written.append(path.name)

    monkeypatch.setattr(rollout_log, "append_jsonl", slowly)
    log = RolloutLog(tmp_path)
    log.write(1, [])
    assert not written, "it returned before the file was written"
    release.set()
    log.write(2, [])
    assert written[0] == "step-000001.jsonl", "the second waits for the first"
    log.wait()
    assert written == ["step-000001.jsonl", "step-000002.jsonl"]


def test_what_went_wrong_is_told_with_the_next_step_or_at_the_end(tmp_path, monkeypatch):
    def full(path, rows):
        raise OSError("the disk is full")

    log = RolloutLog(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(rollout_log, "append_jsonl", full)
        log.write(1, [])
        with pytest.raises(OSError, match="full"):
            log.wait()
        log.write(1, [])
        with pytest.raises(OSError, match="full"):
            log.write(2, [])
    log.write(1, [])
    log.wait()
    assert list(read_jsonl(tmp_path / "step-000001.jsonl")) == []
