"""Prompts spread over vLLM servers: each has as many under way as it may; what one fails, another answers.

A server that dies, hangs or comes back with older weights gets no requests until it is well again and has
the newest weights; what it had under way goes back into the queue. Only when no server is well for a long
while, or a prompt fails again and again, does the run stop.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import httpx

from rlcs.engines.vllm.protocol import PromptRequest, Take
from rlcs.engines.vllm.server import DownError, Launch, RetryableError, Server
from rlcs.engines.vllm.weights import Weights
from rlcs.errors import TrainingError
from rlcs.recipe.sampling import Rollouts

log = logging.getLogger("rlcs")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0


class _Work:
    """The requests of one round: which wait, how often each was tried, how many have no answer yet."""

    def __init__(self, requests: Sequence[PromptRequest], weights: Weights, take: Take) -> None:
        self.requests, self.weights, self.take = requests, weights, take
        self.queue: asyncio.Queue[int] = asyncio.Queue()
        for place in range(len(requests)):
            self.queue.put_nowait(place)
        self.tries: Counter[int] = Counter()
        self.left = len(requests)
        self.finished = asyncio.Event()
        self.last_sign = time.monotonic()

    def done(self) -> None:
        self.last_sign = time.monotonic()
        self.left -= 1
        if not self.left:
            self.finished.set()


class Fleet:
    """All vLLM servers of a run."""

    def __init__(self, settings: Rollouts, *, logs: Path, launch: Launch) -> None:
        """Nothing is started yet; where `settings.urls` names the servers, nothing ever is."""
        self._settings = settings
        urls = settings.urls or ("",) * settings.servers
        self._servers = [
            Server(settings, index, logs=logs, url=url, launch=launch) for index, url in enumerate(urls)
        ]

    def generate(self, requests: Sequence[PromptRequest], weights: Weights, take: Take) -> None:
        """See `Backend.generate`. Raises TrainingError also when no server is well for too long."""
        asyncio.run(self._generate(requests, weights, take))

    def close(self) -> None:
        """End our own servers."""
        for server in self._servers:
            server.close()

    async def _generate(self, requests: Sequence[PromptRequest], weights: Weights, take: Take) -> None:
        work = _Work(requests, weights, take)
        # No proxy stands between a trainer and its servers.
        async with httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=None)) as client:
            serving = (self._serve(server, client, work) for server in self._servers)
            await _until_first([work.finished.wait(), *serving])

    async def _serve(self, server: Server, client: httpx.AsyncClient, work: _Work) -> None:
        """Keep one server busy, bringing it back whenever it fails, without an end. Raises RlcsError."""
        wait = _FIRST_WAIT_S
        while True:
            try:
                await server.up(client, work.weights)
                # A server whose engine dies now never answers, which a limit on loading would find out late.
                loading = server.load_weights(client, work.weights)
                await _until_first([self._watch(server, client, work), loading])
                work.last_sign, wait = time.monotonic(), _FIRST_WAIT_S
                senders = [self._answer_all(server, client, work) for _ in range(self._settings.concurrency)]
                await _until_first([self._watch(server, client, work), *senders])
            except DownError as down:
                log.warning("%s: %s; trying again", server.name, down)
                if down.needs_restart:
                    server.restart()
                limit = self._settings.dead_limit_s
                if time.monotonic() - work.last_sign > limit:
                    raise TrainingError(
                        f"no vLLM server was well for {limit:g} s; last: {down}",
                        where=server.name,
                        fix="see its log; the same command continues from the last checkpoint",
                    ) from down
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT_S)

    async def _watch(self, server: Server, client: httpx.AsyncClient, work: _Work) -> None:
        """Find out that a server hangs long before its requests time out."""
        while True:
            await asyncio.sleep(self._settings.health_limit_s / 3)
            await server.require_well(client)
            work.last_sign = time.monotonic()

    async def _answer_all(self, server: Server, client: httpx.AsyncClient, work: _Work) -> None:
        """Send one request after the other, without an end."""
        while True:
            place = await work.queue.get()
            answered = False
            try:
                work.tries[place] += 1
                if work.tries[place] > self._settings.max_tries:
                    raise TrainingError(
                        f"a prompt got no answer in {self._settings.max_tries} tries",
                        where=server.name,
                        fix="see its log; the same command continues from the last checkpoint",
                    )
                work.take(place, await server.generate(client, work.requests[place], work.weights))
                answered = True
            except RetryableError as error:
                log.warning("%s", error)
                await asyncio.sleep(_FIRST_WAIT_S * work.tries[place])
            finally:  # also when it was cancelled with its server: then another one answers
                if answered:
                    work.done()
                else:
                    work.queue.put_nowait(place)


async def _until_first(jobs: Sequence[Coroutine[Any, Any, object]]) -> None:
    """Run all jobs until one ends or fails; then cancel the others. Raises what failed."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
