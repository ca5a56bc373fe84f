"""Reward functions that do what they should not: unscored with a reason, and nothing else is harmed."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlcs.grading import GradePool
from rlcs.grading.own import check_function
from rlcs.records import Grade, Problem

FILE = Path(__file__).with_name("hostile_rewards.py")
UNSCORED = {
    "raises": "KeyError: 'gone'",
    "raises_without_words": "Silent: it cannot be printed",
    "raises_the_base": "BaseException: of all",
    "interrupts": "KeyboardInterrupt",
    "exits": "SystemExit: 0",
    "exits_at_once": "the grader process died (exit code 7)",
    "aborts": "the grader process died (SIGABRT)",
    "kills_itself": "the grader process died (SIGKILL)",
    "kills_its_group": "the grader process died (SIGKILL)",
    "reads_address_zero": "the grader process died (SIGSEGV)",
    "becomes_another_program": "the grader process died (exit code 0)",
    "hangs": "timed out after 1 s",
    "spins": "timed out after 1 s",
    "backtracks": "timed out after 1 s",
    "waits_for_a_lock": "timed out after 1 s",
    "waits_for_a_child": "timed out after 1 s",
    "ignores_signals": "timed out after 1 s",
    "recurses": "RecursionError",
    "eats_memory_at_once": "MemoryError",
    "eats_memory": "MemoryError",
    "forks_and_raises_twice": "ValueError: twice",
    "forks_and_exits_twice": "SystemExit",
    "leaves_sessions_and_dies": "the grader process died (exit code 0)",
    "nothing": "it returned None, neither a number nor a pair",
    "a_string": "it returned '0.7', neither a number nor a pair",
    "nan": "the reward is nan",
    "infinity": "the reward is inf",
    "the_largest": "larger than 1,000,000",
    "a_huge_integer": "OverflowError",
    "a_list": "it returned [0.7], neither",
    "an_empty_tuple": "it returned (), neither",
    "three": "it returned (0.7, True, None), neither",
    "two_words": "it returned ('0.7', 'yes'), neither",
    "an_array_of_two": "TypeError",
    "a_complex_number": "it returned (0.7+0j), neither",
    "a_generator": "it returned <generator",
}
SCORED = {
    "forks_and_returns_twice": 0.7,
    "leaves_a_child": 0.7,
    "leaves_a_session": 0.7,
    "leaves_a_daemon": 0.7,
    "writes_to_every_handle": 0.7,
    "reads_every_handle": 0.7,
    "closes_every_handle": 0.7,
    "uses_up_every_handle": 0.7,
    "prints_a_grade": 0.7,
    "prints_100_mb": 0.7,
    "moves_elsewhere": 0.7,
    "replaces_what_all_use": 0.7,
    "changes_handlers": 0.7,
    "starts_endless_threads": 0.7,
    "stops_the_garbage_collector": 0.7,
    "a_bool": 1.0,
    "a_numpy_scalar": 0.5,
    "a_numpy_verdict": 0.7,
    "minus_zero": 0.0,
}


def make_pool(name: str = "score", deadline_s: float = 1.0) -> GradePool:
    return GradePool(workers=1, deadline_s=deadline_s, function=check_function(f"{FILE}:{name}"))


def ask(response: str, left: Path) -> tuple[Problem, str]:
    problem = Problem(id="p", source="test", question="?", answer="x", metadata={"left": str(left)})
    return problem, response


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file with the ids of processes that functions left behind."""
    return tmp_path_factory.mktemp("left") / "pids"


@pytest.fixture(scope="module")
def shared(left: Path) -> Iterator[GradePool]:
    with make_pool() as made:
        yield made
        workers = [worker.process.pid for worker in made._workers]
    remaining = [int(pid) for pid in left.read_text().split()] + workers if left.exists() else workers
    assert not [pid for pid in remaining if psutil.pid_exists(pid)]


def grade(pool: GradePool, response: str, left: Path) -> Grade:
    """The grade of a response; the answers around it, which are healthy, must have theirs."""
    before, found, after = pool.grade([ask("one", left), ask(response, left), ask("seven", left)])
    assert (before.reward, after.reward) == (0.3, 0.5), (before.why, after.why)
    assert len(pool._workers) == 1
    return found


@pytest.mark.fault("user code", "a reward function that does what it should not", "unscored, with the reason")
@pytest.mark.parametrize(("response", "why"), UNSCORED.items(), ids=UNSCORED)
def test_trouble_is_unscored_with_a_reason(shared: GradePool, left: Path, response: str, why: str) -> None:
    found = grade(shared, response, left)
    assert found.reward is None and found.correct is None
    assert found.why.startswith("score: ") and why in found.why


@pytest.mark.fault("user code", "a reward function that touches what is not its own", "its answer is scored")
@pytest.mark.parametrize(("response", "reward"), SCORED.items(), ids=SCORED)
def test_an_answer_is_scored_whatever_else_the_function_does(
    shared: GradePool, left: Path, response: str, reward: float
) -> None:
    found = grade(shared, response, left)
    assert found.reward == reward, found.why


@pytest.mark.fault("user code", "processes in sessions of their own, worker killed", "no process is left")
@pytest.mark.parametrize(
    "response", ["leaves_a_session", "leaves_a_daemon", "leaves_sessions_and_dies", "waits_for_a_child"]
)
def test_no_process_of_a_function_survives_its_pool(tmp_path: Path, response: str) -> None:
    pids = tmp_path / "pids"
    with make_pool() as pool:
        pool.grade([ask(response, pids)])
    started = [int(pid) for pid in pids.read_text().split()]
    assert started and not [pid for pid in started if psutil.pid_exists(pid)]


@pytest.mark.fault("user code", "an async reward function", "awaited; unscored where it raises or hangs")
def test_an_async_function_is_awaited(left: Path) -> None:
    with make_pool("later") as pool:
        grades = pool.grade([ask(text, left) for text in ("soon", "raise", "never", "again")])
    assert [found.reward for found in grades] == [0.5, None, None, 0.5]
    assert "later: ValueError: in vain" in grades[1].why and "later: timed out" in grades[2].why


@pytest.mark.fault("limits", "a grader that gets a fifth of the time", "its answer is scored")
def test_a_worker_that_is_kept_from_working_is_not_out_of_time(left: Path) -> None:
    """An answer of 0.6 s of work within 1 s, by a worker that is stopped four fifths of the time."""
    with GradePool(workers=1, deadline_s=1.0, function=check_function(f"{FILE}:works")) as pool:
        pool.grade([ask("0", left)])
        [worker] = psutil.Process(pool._workers[0].process.pid).children()
        ended = threading.Event()

        def starve() -> None:
            while not ended.is_set():
                worker.send_signal(signal.SIGSTOP)
                time.sleep(0.4)
                worker.send_signal(signal.SIGCONT)
                time.sleep(0.1)

        thread = threading.Thread(target=starve)
        thread.start()
        try:
            started = time.monotonic()
            [found] = pool.grade([ask("0.6", left)])
            passed = time.monotonic() - started
        finally:
            ended.set()
            thread.join()
    assert found.reward == 1.0, found.why
    assert passed > 1.2, "the worker was not kept from working"


@pytest.mark.fault("limits", "a grader that is stopped for ever", "killed; its answer is unscored")
def test_a_worker_that_is_stopped_for_ever_is_ended(left: Path) -> None:
    with make_pool() as pool:
        pool.grade([ask("one", left)])
        [worker] = psutil.Process(pool._workers[0].process.pid).children()
        timer = threading.Timer(0.3, worker.send_signal, (signal.SIGSTOP,))
        timer.start()
        stopped, after = pool.grade([ask("hangs", left), ask("one", left)])
        timer.join()
    assert "timed out" in stopped.why and after.reward == 0.3
    assert not psutil.pid_exists(worker.pid)


@pytest.mark.fault("user code", "the guard of a grader killed", "the worker ends; its answer is unscored")
def test_a_worker_ends_with_its_guard(left: Path) -> None:
    with make_pool(deadline_s=30.0) as pool:
        pool.grade([ask("one", left)])
        guard = psutil.Process(pool._workers[0].process.pid)
        [worker] = guard.children()
        threading.Timer(0.3, os.kill, (guard.pid, signal.SIGKILL)).start()
        stopped, after = pool.grade([ask("hangs", left), ask("one", left)])
    assert "the grader process died (SIGKILL)" in stopped.why and after.reward == 0.3
    assert psutil.wait_procs([worker], timeout=60)[1] == []
