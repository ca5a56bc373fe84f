"""Patience counts what a process had, not what passed."""

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from rlcs.patience import LONGEST, Patience


class Clock:
    """Time that passes when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def looks(patience: Patience, clock: Clock, seconds: float) -> bool:
    """Let time pass in ticks, and look after each."""
    end = clock.now + seconds
    while clock.now < end and not patience.is_over:
        clock.now += patience.tick_s
    return patience.is_over


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    code = "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        found = psutil.Process(process.pid)
        yield found
        process.kill()


def test_a_process_that_waits_by_choice_has_all_the_time(sleeper: psutil.Process) -> None:
    clock = Clock()
    patience = Patience(sleeper.pid, 10.0, clock=clock)
    assert not looks(patience, clock, 9.0)
    assert looks(patience, clock, 2.0)
    patience.restart()
    assert not looks(patience, clock, 9.0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the time that passes counts")
def test_a_process_that_is_stopped_has_none_until_patience_ends(sleeper: psutil.Process) -> None:
    sleeper.suspend()
    clock = Clock()
    patience = Patience(sleeper.pid, 10.0, clock=clock)
    assert not looks(patience, clock, 10.0 * (LONGEST - 1))
    assert looks(patience, clock, 11.0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the time that passes counts")
def test_time_in_which_nobody_looked_does_not_count(sleeper: psutil.Process) -> None:
    """As after a suspension of the whole machine."""
    clock = Clock()
    patience = Patience(sleeper.pid, 10.0, clock=clock)
    clock.now += 60.0
    assert not patience.is_over
    assert looks(patience, clock, 10.0)


def test_a_process_that_ended_is_not_waited_for_longer(sleeper: psutil.Process) -> None:
    clock = Clock()
    patience = Patience(sleeper.pid, 10.0, clock=clock)
    sleeper.kill()
    sleeper.wait()
    assert looks(patience, clock, 11.0)
