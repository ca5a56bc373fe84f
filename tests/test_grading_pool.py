"""The pool: easy answers without a process, formulas in workers that are killed, restarted and reaped."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlcs
from rlcs.errors import RlcsError
from rlcs.grading import GradePool, pool
from rlcs.records import Problem

SLOW = r"\boxed{\sum_{k=1}^{2} \binom{8 \cdot 12499999}{5000000}}"
"""math-verify multiplies for hours, inside C code."""


def ask(gold: str, answer: str) -> tuple[Problem, str]:
    return Problem(id=gold, source="test", question="?", answer=gold), answer


def formula(number: int) -> tuple[Problem, str]:
    """A pair that only math-verify can decide, and does at once."""
    return ask(str(number), f"\\boxed{{\\sum_{{k=1}}^{{{number}}} 1}}")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def pids(pool: GradePool) -> tuple[int, ...]:
    """The process ids of the workers that run now."""
    return tuple(worker.process.pid for worker in pool._workers)


def wait_until_gone(pid: int, limit_s: float) -> bool:
    end = time.monotonic() + limit_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


@pytest.fixture(scope="module")
def shared() -> Iterator[GradePool]:
    with GradePool(workers=1, deadline_s=2.0) as made:
        yield made


def test_easy_answers_start_no_process_and_are_fast() -> None:
    answers = [ask(str(n % 50), f"a few words of reasoning, then \\boxed{{{n % 40}}}") for n in range(4000)]
    with GradePool() as easy:
        started = time.perf_counter()
        grades = easy.grade(answers)
        rate = len(answers) / (time.perf_counter() - started)
        assert pids(easy) == ()
    assert [g.correct for g in grades] == [n % 50 == n % 40 for n in range(4000)]
    assert rate > 1000  # about 10,000 a second on an idle core


def test_formulas_come_back_in_order(shared: GradePool) -> None:
    wrong = ask(r"1", r"\boxed{\sum_{k=1}^{3} 1}")
    grades = shared.grade([formula(2), ask("5", r"\boxed{5}"), wrong, *map(formula, range(3, 40)), wrong])
    expected = [True, True, False, *[True] * 37, False]
    assert [g.correct for g in grades] == expected
    assert [g.reward for g in grades] == [float(right) for right in expected]
    assert grades[0].extracted == r"\sum_{k=1}^{2} 1" and len(pids(shared)) == 1


def test_a_formula_that_takes_for_ever_is_unscored_and_holds_up_nothing_else(shared: GradePool) -> None:
    shared.grade([formula(2)])
    (before,) = pids(shared)
    started = time.monotonic()
    grades = shared.grade([formula(3), ask("x", SLOW), formula(4), ask("7", r"\boxed{7}")])
    assert time.monotonic() - started < 20.0  # 2 s of patience and the start of a new worker
    assert [g.correct for g in grades] == [True, None, True, True]
    assert grades[1].reward is None and grades[1].why == "timed out after 2 s"
    assert before not in pids(shared) and not alive(before)


def test_the_rest_of_a_batch_is_asked_again(shared: GradePool) -> None:
    many = [formula(n) for n in range(2, 42)]  # batches of 16
    grades = shared.grade([*many[:20], ask("x", SLOW), *many[20:]])
    assert [g.correct for g in grades] == [True] * 20 + [None] + [True] * 20


def test_a_worker_killed_from_outside_costs_at_most_its_answer(shared: GradePool) -> None:
    shared.grade([formula(2)])
    os.kill(pids(shared)[0], signal.SIGKILL)  # idle: nobody's fault
    wait_until_gone(pids(shared)[0], 5.0)
    assert shared.grade([formula(5)])[0].correct is True
    threading.Timer(0.3, os.kill, (pids(shared)[0], signal.SIGKILL)).start()
    grades = shared.grade([ask("x", SLOW), formula(6)])
    assert [g.correct for g in grades] == [None, True]
    assert grades[0].why == "the grader process died (SIGKILL)"


def test_it_works_from_another_thread(shared: GradePool) -> None:
    results: list[bool | None] = []
    thread = threading.Thread(target=lambda: results.append(shared.grade([formula(7)])[0].correct))
    thread.start()
    thread.join(30.0)
    assert results == [True]


def test_close_leaves_no_process_and_the_pool_can_start_again() -> None:
    made = GradePool(workers=2, deadline_s=5.0)
    assert [g.correct for g in made.grade([formula(n) for n in range(2, 12)])] == [True] * 10
    workers = pids(made)
    assert len(workers) == 2
    made.close()
    assert pids(made) == () and not any(alive(pid) for pid in workers)
    with made:
        assert made.grade([formula(3)])[0].correct is True


def test_a_worker_does_not_outlive_a_killed_parent() -> None:
    script = (
        "import threading, time\n"
        "from rlcs.grading import GradePool\n"
        "from rlcs.records import Problem\n"
        "p = Problem(id='p', source='t', question='?', answer='x')\n"
        "pool = GradePool(deadline_s=0.5)\n"
        "pool.grade([(p, r'\\boxed{\\sum_{k=1}^{2} x}')])\n"
        "print(pool._workers[0].process.pid, flush=True)\n"
        f"pool.grade([(p, r'{SLOW}')])\n"
    )
    source = Path(rlcs.__file__).parents[1]
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(source)},
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.3)  # the worker is in the middle of the endless formula
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone(pid, 15.0)  # its own kernel timer: 2 * 0.5 + 5 s


def test_a_grader_that_cannot_start_is_an_error_not_an_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.sys, "executable", "/bin/false")
    with GradePool() as broken, pytest.raises(RlcsError, match=r"does not start.*exit code 1"):
        broken.grade([formula(2)])
    assert pids(broken) == ()


def test_nonsense_settings_are_refused() -> None:
    with pytest.raises(ValueError):
        GradePool(workers=-1)
    with pytest.raises(ValueError):
        GradePool(deadline_s=0.0)


def test_workers_do_not_import_torch() -> None:
    code = "import sys, rlcs.grading.worker; sys.exit('torch' in sys.modules or 'sympy' in sys.modules)"
    source = Path(rlcs.__file__).parents[1]
    assert (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(source)}).returncode
        == 0
    )
