"""Spreads prompts over vLLM servers; a prompt that one server fails to answer goes to another.

A server that dies, hangs or comes back with older weights gets no requests until it is well again and has
the newest weights; its requests under way go back into the queue. The run stops only when no server is well
for a long while, or when a prompt fails too often.
"""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from rlcs.engines.base import EngineView
from rlcs.engines.vllm.protocol import OnAnswers, PromptRequest
from rlcs.engines.vllm.server import DownError, Launch, LostWeightsError, RetryableError, Server
from rlcs.engines.vllm.weights import Weights
from rlcs.errors import TrainingError
from rlcs.recipe.sampling import Rollouts

log = logging.getLogger("rlcs")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_CLOSING_POLL_S, _CLOSING_LIMIT_S = 0.1, 30.0


class _Work:
    """The requests of one round: the queue, the tries of each, and how many have no answer yet."""

    def __init__(self, requests: Sequence[PromptRequest], weights: Weights, on_answers: OnAnswers) -> None:
        self.requests, self.weights, self.on_answers = requests, weights, on_answers
        self.queue: asyncio.Queue[int] = asyncio.Queue()
        for index in range(len(requests)):
            self.queue.put_nowait(index)
        self.tries: Counter[int] = Counter()
        self.left = len(requests)
        self.lost = 0
        self.finished = asyncio.Event()
        self.last_well = time.monotonic()

    def done(self) -> None:
        self.last_well = time.monotonic()
        self.left -= 1
        if not self.left:
            self.finished.set()


class Fleet:
    """All vLLM servers of a run."""

    def __init__(self, settings: Rollouts, *, logs: Path, launch: Launch) -> None:
        """Nothing is started yet; the servers in `settings.urls`, if any, are used instead of new ones."""
        self._settings, self._launch = settings, launch
        urls = settings.urls or ("",) * settings.servers
        # A thread that lasts: `generate` may be called in threads that end before the servers should.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="vllm-starter")
        self._servers = [
            Server(settings, launch.number + index, logs=logs, url=url, launch=launch, starter=self._starter)
            for index, url in enumerate(urls)
        ]
        self._generating = threading.Lock()
        self._closing = threading.Event()

    def generate(self, requests: Sequence[PromptRequest], weights: Weights, on_answers: OnAnswers) -> None:
        """See `Backend.generate`. Raises TrainingError also when no server is well for too long."""
        with self._generating:
            asyncio.run(self._generate(_Work(requests, weights, on_answers)))

    def inspect(self, requests: Sequence[PromptRequest], weights: Weights) -> list[EngineView]:
        """See `Backend.inspect`."""

        async def view(server: Server, client: httpx.AsyncClient) -> None:
            await server.load_weights(client, weights)
            # One after the other: what a cache keeps of a prompt must show in the next.
            seen = [await server.see(client, request, weights) for request in requests]
            views.append(EngineView(name=server.name, precision=server.precision, prompts=tuple(seen)))

        async def watched(server: Server, client: httpx.AsyncClient, _: int) -> None:
            try:
                await _until_first([self._until_closing(), server.up(client, weights)])
                watch = self._watch(server, client, _Work(requests, weights, lambda *_: None))
                await _until_first([self._until_closing(), watch, view(server, client)])
            except (DownError, RetryableError, LostWeightsError) as error:
                why = str(error) or "it was restarted"
                log.warning("%s is not compared with the trainer: %s", server.name, why)

        views: list[EngineView] = []
        with self._generating:
            self._all(watched)
        return sorted(views, key=lambda each: each.name)

    def rest(self) -> None:
        """See `Backend.rest`: servers that take turns with training sleep; one that cannot is ended."""
        if self._launch.sleep_level:
            self._all(lambda server, client, _: server.rest(client))

    @property
    def shares_gpu(self) -> bool:
        """See `Backend.shares_gpu`."""
        return self._launch.shares_gpu

    def __len__(self) -> int:
        return len(self._servers)

    def is_connected(self, channel: str) -> bool:
        """Whether all servers are connected to this channel of weights."""
        return all(server.channel == channel for server in self._servers)

    def begin_update(self, weights: Weights, channel: str, info: Callable[[int], Mapping[str, Any]]) -> None:
        """Prepare all servers for weights that are sent; those without the channel are connected to it.

        `info` has what vLLM needs for that, by the server's number. Raises DownError, EndpointError.
        """
        self._all(lambda server, client, index: server.begin_update(client, weights, channel, info(index)))

    def update(self, info: Mapping[str, Any]) -> None:
        """Let all servers receive some weights. Raises DownError."""
        self._all(lambda server, client, _: server.update(client, info))

    def finish_update(self, version: str) -> None:
        """Let all servers use the weights that they have received, under this name. Raises DownError."""
        self._all(lambda server, client, _: server.finish_update(client, version))

    def restart(self) -> None:
        """End the servers that were started here at once; they start again with the next answers."""
        for server in self._servers:
            server.restart()

    def close(self) -> None:
        """End the servers that were started here, and first a `generate` in another thread.

        That one would start a server again.
        """
        self._closing.set()
        if self._generating.acquire(timeout=_CLOSING_LIMIT_S):
            self._generating.release()
        for server in self._servers:
            server.close()
        self._starter.shutdown()

    async def _generate(self, work: _Work) -> None:
        # `trust_env=False`: no proxy between a trainer and its servers.
        async with httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=None)) as client:
            serving = (self._serve(server, client, work) for server in self._servers)
            await _until_first([work.finished.wait(), self._until_closing(), *serving])
        if work.left:
            raise TrainingError("the vLLM servers were ended before all prompts had answers")

    async def _until_closing(self) -> None:
        while not self._closing.is_set():
            await asyncio.sleep(_CLOSING_POLL_S)

    def _all(self, work: Callable[[Server, httpx.AsyncClient, int], Coroutine[Any, Any, None]]) -> None:
        async def run() -> None:
            async with httpx.AsyncClient(trust_env=False) as client:
                each = (work(server, client, index) for index, server in enumerate(self._servers))
                await asyncio.gather(*each)

        asyncio.run(run())

    async def _serve(self, server: Server, client: httpx.AsyncClient, work: _Work) -> None:
        """Keep one server busy until cancelled, restarting it when it fails. Raises RlcsError."""
        wait = _FIRST_WAIT_S
        while True:
            try:
                await server.up(client, work.weights)
                # A server whose engine dies now never replies; the watch notices before the limit on loading.
                loading = server.load_weights(client, work.weights)
                await _until_first([self._watch(server, client, work), loading])
                work.last_well, wait = time.monotonic(), _FIRST_WAIT_S
                senders = [self._answer_all(server, client, work) for _ in range(self._settings.concurrency)]
                await _until_first([self._watch(server, client, work), *senders])
            except LostWeightsError:
                work.lost += 1
                if work.lost == len(self._servers):
                    raise
                log.warning("%s: it was restarted, and waits for the next weights", server.name)
                await asyncio.Event().wait()  # until it is cancelled at the end of the round
            except DownError as down:
                log.warning("%s: %s; trying again", server.name, down)
                if down.needs_restart:
                    server.restart()
                limit = self._settings.dead_limit_s
                if time.monotonic() - work.last_well > limit:
                    raise TrainingError(
                        f"no vLLM server was well for {limit:g} s; last: {down}",
                        where=server.name,
                        fix="see its log; the same command continues from the last checkpoint",
                    ) from down
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT_S)

    async def _watch(self, server: Server, client: httpx.AsyncClient, work: _Work) -> None:
        """Check a server's health until it fails: a hang is noticed long before requests time out."""
        while True:
            await asyncio.sleep(self._settings.health_limit_s / 3)
            await server.require_well(client)
            work.last_well = time.monotonic()

    async def _answer_all(self, server: Server, client: httpx.AsyncClient, work: _Work) -> None:
        """Send one request after the other until cancelled."""
        while True:
            index = await work.queue.get()
            answered = False
            try:
                work.tries[index] += 1
                if work.tries[index] > self._settings.max_tries:
                    raise TrainingError(
                        f"a prompt got no answer in {self._settings.max_tries} tries",
                        where=server.name,
                        fix="see its log; the same command continues from the last checkpoint",
                    )
                work.on_answers(index, await server.generate(client, work.requests[index], work.weights))
                answered = True
            except RetryableError as error:
                log.warning("%s", error)
                await asyncio.sleep(_FIRST_WAIT_S * work.tries[index])
            finally:  # also when cancelled because the server failed: then another one answers
                if answered:
                    work.done()
                else:
                    work.queue.put_nowait(index)


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
