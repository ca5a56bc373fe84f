"""Reward functions for tests, one a kind of trouble: `score` calls the one that the response names.

Processes that they leave behind write their ids to the file in the problem's metadata.
"""

import asyncio
import ctypes
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

KINDS = {}
HELD = []


def kind(function):
    KINDS[function.__name__] = function
    return function


def score(problem, response):
    left = Path(problem["metadata"]["left"])
    return KINDS[response](left) if response in KINDS else len(response) / 10


async def later(problem, response):
    await asyncio.sleep(600 if response == "never" else 0.01)
    if response == "raise":
        raise ValueError("in vain")
    return 0.5


def leave(left, pid):
    with left.open("a") as file:
        print(pid, file=file)


def sleeper(left, **options):
    code = f"import os, time; open({str(left)!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", code], **options)
    end = time.monotonic() + 60
    while str(process.pid) not in (left.read_text() if left.exists() else "") and time.monotonic() < end:
        time.sleep(0.01)
    return process


@kind
def raises(left):
    raise KeyError("gone")


@kind
def raises_without_words(left):
    class Silent(Exception):
        def __str__(self):
            raise RuntimeError

    raise Silent


@kind
def raises_the_base(left):
    raise BaseException("of all")


@kind
def interrupts(left):
    raise KeyboardInterrupt


@kind
def exits(left):
    sys.exit(0)


@kind
def exits_at_once(left):
    os._exit(7)


@kind
def aborts(left):
    os.abort()


@kind
def kills_itself(left):
    os.kill(os.getpid(), signal.SIGKILL)


@kind
def kills_its_group(left):
    os.killpg(0, signal.SIGKILL)


@kind
def reads_address_zero(left):
    ctypes.string_at(0)


@kind
def becomes_another_program(left):
    os.execv("/bin/true", ["/bin/true"])  # noqa: S606


@kind
def hangs(left):
    time.sleep(600)


@kind
def spins(left):
    while True:
        pass


@kind
def backtracks(left):
    re.match(r"(a+)+$", "a" * 40 + "b")


@kind
def waits_for_a_lock(left):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@kind
def waits_for_a_child(left):
    sleeper(left).wait()


@kind
def ignores_signals(left):
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)


@kind
def recurses(left):
    return recurses(left)


@kind
def eats_memory_at_once(left):
    return len(bytearray(1 << 45))


@kind
def eats_memory(left):
    parts = []
    while True:
        parts.append(np.zeros(1 << 28))


@kind
def forks_and_returns_twice(left):
    if not os.fork():
        leave(left, os.getpid())
        return 0.1
    time.sleep(0.3)
    return 0.7


@kind
def forks_and_raises_twice(left):
    if not os.fork():
        leave(left, os.getpid())
    time.sleep(0.1)
    raise ValueError("twice")


@kind
def forks_and_exits_twice(left):
    if not os.fork():
        leave(left, os.getpid())
    sys.exit()


@kind
def leaves_a_child(left):
    sleeper(left)
    return 0.7


@kind
def leaves_a_session(left):
    sleeper(left, start_new_session=True, env={})
    return 0.7


@kind
def leaves_a_daemon(left):
    if (child := os.fork()) == 0:
        os.setsid()
        if os.fork() == 0:
            leave(left, os.getpid())
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            time.sleep(600)
        os._exit(0)
    os.waitpid(child, 0)
    return 0.7


@kind
def leaves_sessions_and_dies(left):
    for _ in range(3):
        sleeper(left, start_new_session=True, env={})
    os._exit(0)


@kind
def writes_to_every_handle(left):
    for handle in range(1024):
        try:
            os.write(handle, b'"ready"\n{"reward": 9, "correct": true}\n')
        except OSError:
            continue
    return 0.7


@kind
def reads_every_handle(left):
    for handle in range(256):
        try:
            os.set_blocking(handle, False)
            os.read(handle, 1 << 16)
        except OSError:
            continue
    return 0.7


@kind
def closes_every_handle(left):
    os.closerange(0, 4096)
    return 0.7


@kind
def uses_up_every_handle(left):
    try:
        while True:
            HELD.append(os.dup(0))
    except OSError:
        return 0.7


@kind
def prints_a_grade(left):
    print(json.dumps({"reward": 9.0, "correct": True, "why": "so"}), flush=True)  # noqa: T201
    sys.stderr.write('"ready"\n')
    return 0.7


@kind
def prints_100_mb(left):
    for _ in range(100):
        print("x" * (1 << 20))  # noqa: T201
    return 0.7


@kind
def moves_elsewhere(left):
    os.chdir("/")
    os.environ.clear()
    sys.path.clear()
    return 0.7


@kind
def replaces_what_all_use(left):
    json.loads = json.dumps = os.getpid = socket.socket = None
    socket.setdefaulttimeout(1e-6)
    return 0.7


@kind
def changes_handlers(left):
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    return 0.7


@kind
def starts_endless_threads(left):
    for _ in range(3):
        threading.Thread(target=time.sleep, args=(600,)).start()
    return 0.7


@kind
def stops_the_garbage_collector(left):
    gc.disable()
    return 0.7


def returns(name, value):
    KINDS[name] = lambda left: value


returns("nothing", None)
returns("a_string", "0.7")
returns("nan", float("nan"))
returns("infinity", float("inf"))
returns("the_largest", 1e308)
returns("a_huge_integer", 10**400)
returns("a_list", [0.7])
returns("an_empty_tuple", ())
returns("three", (0.7, True, None))
returns("two_words", ("0.7", "yes"))
returns("an_array_of_two", np.array([0.7, 0.7]))
returns("a_complex_number", 0.7 + 0j)
returns("a_generator", (x for x in ()))
returns("a_bool", True)
returns("a_numpy_scalar", np.float32(0.5))
returns("a_numpy_verdict", (np.float64(0.7), np.bool_(False)))
returns("minus_zero", -0.0)


def works(problem, response):
    """Use as many seconds of CPU time as the response says."""
    end = time.process_time() + float(response)
    while time.process_time() < end:
        pass
    return 1.0
