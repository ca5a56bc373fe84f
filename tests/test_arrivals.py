"""Rollouts that a thread receives: handed out once, with the errors of the thread."""

import threading
import time

import pytest

from rlcs.distributed import ALONE
from rlcs.engines.arrivals import Arrivals
from rlcs.errors import TrainingError


def test_what_has_arrived_is_taken_once_and_nothing_is_waited_for_long():
    gate, before = threading.Event(), set(threading.enumerate())

    def sample(arrived):
        arrived(2, ())
        arrived(0, ())
        gate.wait()
        arrived(1, ())

    arrivals = Arrivals(sample, 3, ALONE)
    taken = arrivals.take(10)
    taken += arrivals.take(0.2) if len(taken) == 1 else []
    assert sorted(index for index, _ in taken) == [0, 2] and arrivals.left == 1
    started = time.monotonic()
    assert arrivals.take(0.2) == [] and time.monotonic() - started < 5
    gate.set()
    assert arrivals.take(10) == [(1, ())] and arrivals.left == 0
    assert set(threading.enumerate()) <= before, "its thread was joined"
    assert Arrivals(sample, 0, ALONE).take(0) == []


@pytest.mark.parametrize("error", [TrainingError("no server is well"), KeyError("a mistake")])
def test_an_error_of_the_thread_is_raised_where_it_can_be_handled(error):
    def sample(arrived):
        raise error

    with pytest.raises(type(error)):
        Arrivals(sample, 1, ALONE).take(10)
