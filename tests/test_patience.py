"""Patience counts what a process had, not what passed."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from rlcs.patience import LONGEST, LOOKS, OwnTime, Patience, run_within, within


class Clock:
    """Time that passes when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def looks(patience: Patience, clock: Clock, seconds: float) -> bool:
    """Let time pass in ticks, and look after each."""
    end = clock.now + seconds
    while clock.now < end and not patience.is_over:
        clock.now += patience.own.tick_s
    return patience.is_over


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    code = "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        found = psutil.Process(process.pid)
        while found.status() != psutil.STATUS_SLEEPING:  # until it waits for its input
            time.sleep(0.01)
        yield found
        process.kill()


def test_a_process_that_waits_by_choice_has_all_the_time(sleeper: psutil.Process) -> None:
    clock = Clock()
    patience = Patience(OwnTime(sleeper.pid, 0.5, clock=clock), 10.0)
    assert not looks(patience, clock, 9.0)
    assert looks(patience, clock, 2.0)
    assert not looks(Patience(patience.own, 10.0), clock, 9.0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the time that passes counts")
def test_a_process_that_is_stopped_now_and_then_has_until_patience_ends() -> None:
    clock = Clock()
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "while True: pass"]) as process:
        found = psutil.Process(process.pid)
        patience = Patience(OwnTime(process.pid, 0.5, clock=clock), 3.0)
        while not looks(patience, clock, 0.5 * (LOOKS - 1)):
            before = found.cpu_times().user
            found.resume()
            while found.cpu_times().user == before:
                time.sleep(0.01)
            found.suspend()
        process.kill()
    assert 0.9 * LONGEST * 3.0 < clock.now - 100.0 < 1.1 * LONGEST * 3.0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the time that passes counts")
def test_a_process_that_is_stopped_for_good_waits(sleeper: psutil.Process) -> None:
    sleeper.suspend()
    clock = Clock()
    patience = Patience(OwnTime(sleeper.pid, 0.5, clock=clock), 10.0)
    assert not looks(patience, clock, 10.0 + 0.5 * (LOOKS - 2))
    assert looks(patience, clock, 2.0)


WITH_A_CHILD = """
import subprocess, sys
child = "while True: pass"
with subprocess.Popen([sys.executable, "-I", "-S", "-c", child]):
    print(flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the time that passes counts")
def test_a_stopped_process_waits_although_its_child_goes_on() -> None:
    """As the server of an engine that looks for work all the time."""
    clock = Clock()
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WITH_A_CHILD], stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        found = psutil.Process(process.pid)
        [child] = found.children()
        found.suspend()
        patience = Patience(OwnTime(process.pid, 0.5, clock=clock), 10.0)
        while not patience.is_over and clock.now < 200.0:
            before = child.cpu_times().user
            while child.cpu_times().user < before + 0.03:
                time.sleep(0.001)
            clock.now += patience.own.tick_s
        child.kill()
        process.kill()
    assert 110.0 <= clock.now < 200.0


def test_a_command_has_its_seconds_and_no_more() -> None:
    words = [sys.executable, "-I", "-S", "-c"]
    done = run_within(60.0, [*words, "print('here'); raise SystemExit(3)"])
    assert (done.returncode, done.stdout) == (3, "here\n")
    with pytest.raises(subprocess.TimeoutExpired):
        run_within(0.2, [*words, "import time; time.sleep(600)"])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the time that passes counts")
def test_time_in_which_nobody_looked_does_not_count(sleeper: psutil.Process) -> None:
    """As after a suspension of the whole machine."""
    clock = Clock()
    patience = Patience(OwnTime(sleeper.pid, 0.5, clock=clock), 10.0)
    clock.now += 60.0
    assert not patience.is_over
    assert looks(patience, clock, 10.0)


def test_a_process_that_ended_is_not_waited_for_longer(sleeper: psutil.Process) -> None:
    clock = Clock()
    patience = Patience(OwnTime(sleeper.pid, 0.5, clock=clock), 10.0)
    sleeper.kill()
    sleeper.wait()
    assert looks(patience, clock, 11.0)


def test_a_limit_ends_what_hangs_and_nothing_that_ends() -> None:
    async def run() -> str:
        own, ended = OwnTime(None, 0.01), asyncio.Event()

        async def hang() -> None:
            try:
                await asyncio.sleep(600)
            finally:
                ended.set()

        with pytest.raises(TimeoutError):
            await within(Patience(own, 0.1), hang())
        await ended.wait()
        return await within(Patience(own, 60.0), asyncio.sleep(0.05, "done"))

    assert asyncio.run(run()) == "done"
