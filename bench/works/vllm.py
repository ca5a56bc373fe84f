"""Rollouts and serving against vLLM, which lives in an environment of its own (`make vllm-test` makes one).

`RLCS_VLLM` names the environment; without it, `.venv-vllm` in this repository's folder is looked for. Both
servers are started by `rlcs serve`, with vLLM and with the local engine; clients stream answers about images.
Rollouts go to vLLM as 64 requests for 8 answers each. Answers end where the model ends them, so seconds are
those of 1,000 answer tokens; with `--cpu-time` they are CPU seconds of the server's processes.
"""

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from bench.meter import wall_seconds
from bench.pairs import Clock, Options, Pair, cpu_seconds, in_turns, row
from bench.table import Row
from bench.works import rollouts
from rlcs.data.images import data_uri, encoded_image
from rlcs.records import Problem

CLIENTS = (1, 8, 32)
REQUESTS = 8
"""Of a client, at least; 32 clients send 2 each."""
ROWS = 256
"""Answers that either server may decode at once."""
START_LIMIT_S, ANSWER_LIMIT_S = 1800.0, 600.0
NAME = "bench"
KEY = "bench"
CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENGINE_READY_TIMEOUT_S": str(int(START_LIMIT_S)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A running server."""

    url: str
    pid: int

    def clock(self, options: Options) -> Clock:
        """Seconds of this server."""
        return partial(cpu_seconds, self.pid) if options.cpu_time else wall_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a client got: `first_s` wall seconds to the first token."""

    first_s: float
    tokens: int


def program() -> Path | None:
    """The folder of vLLM's programs, if there is one."""
    named = os.environ.get("RLCS_VLLM")
    environment = Path(named) if named else Path(__file__).parents[2] / ".venv-vllm"
    folder = environment / "bin" if environment.is_dir() else environment.parent
    return folder.absolute() if (folder / "vllm").exists() else None


def rows(options: Options) -> list[Row]:
    """Rollouts, then serving; none, and a word about it, where there is no vLLM."""
    folder = program()
    if folder is None:
        print("vllm: no environment, so no rows: run `make vllm-test`, or name one in RLCS_VLLM")
        return []
    with server(options, vllm=folder) as theirs:
        found = [rollouts_row(options, theirs)]
        with server(options, vllm=None) as ours:
            return found + [serving_row(options, ours, theirs, clients) for clients in CLIENTS]


def rollouts_row(options: Options, server: Served) -> Row:
    """A step's rollouts: our engine in this process, vLLM behind its server."""
    work = rollouts.make_work(options)
    groups = rollouts.ours(work)
    tokens = sum(len(rollout.ids) for group in groups for rollout in group)
    ours = in_turns(partial(rollouts.ours, work), None, rounds=options.rounds, clock=_own_clock(options))
    sampled: list[int] = []
    problems = rollouts.problems(len(work.prompts))
    ask = partial(_sampled, server, problems, rollouts.GROUP, sampled)
    theirs = in_turns(ask, None, rounds=options.rounds, clock=server.clock(options))
    pair = Pair(
        ours=[1000 * seconds / tokens for seconds in ours.ours],
        theirs=[1000 * seconds / got for seconds, got in zip(theirs.ours, sampled, strict=True)],
    )
    return row(
        work="vllm",
        shape="rollouts",
        phase="1,000 answer tokens",
        peer=_version(),
        pair=pair,
        says=f"{len(work.prompts)} problems x {rollouts.GROUP} answers, {tokens:,} tokens",
    )


def _own_clock(options: Options) -> Clock:
    return time.process_time if options.cpu_time else wall_seconds


def _sampled(server: Served, problems: Sequence[Problem], group: int, tokens: list[int]) -> None:
    """Let a server answer every problem `group` times, all at once; adds the number of tokens to `tokens`."""

    def ask(problem: Problem) -> int:
        body = _body(problem) | {"n": group, "temperature": 1.0}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=_headers(), timeout=600)
        reply.raise_for_status()
        return int(reply.json()["usage"]["completion_tokens"])

    with ThreadPoolExecutor(len(problems)) as pool:
        tokens.append(sum(pool.map(ask, problems)))


def serving_row(options: Options, ours: Served, theirs: Served, clients: int) -> Row:
    """So many clients at once, each with one request after the other."""
    requests = max(2, REQUESTS // clients)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    first: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(options.rounds + 1):
        for name, server in (("theirs", theirs), ("ours", ours)):
            clock = server.clock(options)
            started = clock()
            replies = answered(server, clients, requests)
            used = clock() - started
            if number:  # the first round warms up
                seconds[name].append(1000 * used / sum(reply.tokens for reply in replies))
                first[name] += [reply.first_s for reply in replies]
    return row(
        work="vllm",
        shape=f"serving, {clients} client{'s' if clients > 1 else ''}",
        phase="1,000 answer tokens",
        peer=_version(),
        pair=Pair(ours=seconds["ours"], theirs=seconds["theirs"]),
        first_token_wall_s=round(statistics.median(first["ours"]), 3),
        peer_first_token_wall_s=round(statistics.median(first["theirs"]), 3),
    )


def answered(server: Served, clients: int, requests: int) -> list[Reply]:
    """All replies; every client asks about images of its own."""
    problems = rollouts.problems(clients * requests)

    def client(number: int) -> list[Reply]:
        return [_ask(server, problem) for problem in problems[number::clients]]

    with ThreadPoolExecutor(clients) as pool:
        return [reply for replies in pool.map(client, range(clients)) for reply in replies]


def _ask(server: Served, problem: Problem) -> Reply:
    body = _body(problem) | {"temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}}
    started = time.perf_counter()
    first, tokens = 0.0, 0
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=_headers(), timeout=ANSWER_LIMIT_S) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            data = line.removeprefix("data: ")
            if not data.startswith("{"):
                continue
            event: dict[str, Any] = json.loads(data)
            if not first and any(each["delta"].get("content") for each in event["choices"]):
                first = time.perf_counter() - started
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    assert tokens, "a stream ends with the number of its tokens"
    return Reply(first_s=first, tokens=tokens)


def _body(problem: Problem) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": data_uri(encoded_image(problem.images[0]))}}
    content = [image, {"type": "text", "text": problem.question_with_choices}]
    messages = [{"role": "user", "content": content}]
    return {"model": NAME, "messages": messages, "max_tokens": rollouts.MAX_NEW_TOKENS}


def _headers() -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}"}


@contextlib.contextmanager
def server(options: Options, *, vllm: Path | None) -> Iterator[Served]:
    """`rlcs serve` as a process of its own, with vLLM or with the local engine; ends it afterwards."""
    port = _free_port()
    words = ["serve", options.model, "--port", port, "--name", NAME, "--concurrency", ROWS, "--queue", ROWS]
    words += ["--engine", "vllm" if vllm else "local"]
    path = f"{vllm}:{os.environ['PATH']}" if vllm else os.environ["PATH"]
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        log = Path(scratch) / "serve.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlcs", *map(str, words)],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | CPU | {"RLCS_API_KEY": KEY, "PATH": path},
            )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(lambda: process.poll() is None, url, log)
            yield Served(url=url, pid=process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(lives: Callable[[], bool], url: str, log: Path) -> None:
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end and lives():
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-3000:]}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _version() -> str:
    folder = program()
    assert folder is not None, "it has been started"
    script = "import importlib.metadata as m; print(m.version('vllm'))"
    done = subprocess.run([folder / "python", "-c", script], capture_output=True, text=True, check=True)
    return f"vllm {done.stdout.strip()}"
