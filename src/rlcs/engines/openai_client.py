"""Samples from any server with the OpenAI chat protocol, with images: vLLM, SGLang, hosted APIs.

Requests are drawn lazily and samples are yielded as they arrive, so that the caller can write each at once.
An event loop in a second thread keeps `concurrency` requests under way, also while the caller works on
a sample. A failure that may pass (busy, down, cut off, garbled, empty) is retried; one that cannot (a wrong
key, a wrong name) ends the run with an error that says what to do.
"""

import asyncio
import email.utils
import os
import queue
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from typing import Any, Self

import openai

from rlcs.data.images import data_uri, encoded_image
from rlcs.engines.stop_reasons import RETRYABLE, STOP_REASONS, stop_reason
from rlcs.errors import DataError, EndpointError
from rlcs.recipe.sampling import Endpoint
from rlcs.records import Message, Request, Sample, Sampling, StopReason, rollout_seed
from rlcs.signals import StopFlag

FIRST_WAIT_S = 0.5
"""Pause before the second attempt; doubled for each further one, up to LONGEST_WAIT_S."""
LONGEST_WAIT_S = 30.0
LONGEST_RETRY_AFTER_S = 600.0
"""Longest pause that a server's `Retry-After` can cause."""
_POLL_S = 0.1  # between two checks of the stop flag
_SHORTEST_SECRET = 8  # shorter keys (EMPTY, none) are placeholders, and words of answers
_RETRYABLE_STATUS = frozenset({408, 409, 425, 429})  # and all of 5xx


class _RetryableError(Exception):
    """A failure that may pass; `after_s` is the pause that the server requested, if any."""

    def __init__(self, why: str, *, after_s: float | None = None, unreachable: bool = False) -> None:
        super().__init__(why)
        self.after_s = after_s
        self.unreachable = unreachable


class _FinalError(Exception):
    """A failure of this one request that further attempts would repeat."""


class EndpointClient:
    """Samples from one server; a context manager. Threads may share it, and with it `concurrency`."""

    def __init__(self, settings: Endpoint, sampling: Sampling) -> None:
        """Prepare the client; nothing is sent yet. Raises EndpointError for an invalid URL.

        Of `sampling` the limit, the temperature, top-p and the seed are used. A greedy request has no seed.
        """
        if not settings.base_url.startswith(("http://", "https://")):
            raise EndpointError(
                "this is not the URL of a server",
                where=settings.base_url or "base URL",
                fix="write it out, like http://localhost:8000/v1",
            )
        self._settings, self._sampling = settings, sampling
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=os.environ.get(settings.key_env) or "none",
            max_retries=0,  # `_answer` retries, after more kinds of failures than the client does
            timeout=settings.request_timeout_s,
        )
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._next_start = 0.0
        self._has_answered = False

    def __enter__(self) -> Self:
        """Start the thread that sends and receives."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel the requests under way and close the connections."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    def samples(self, requests: Iterable[Request], *, stop: StopFlag | None = None) -> Iterator[Sample]:
        """Yield samples as they arrive, one for each request, in no order.

        `requests` is drawn from in this thread, never more than twice `concurrency` ahead. When `stop` is
        set, samples that have arrived are still yielded and the rest is cancelled. Raises EndpointError,
        after yielding the samples that have arrived, when the server cannot be used at all.
        """
        assert self._thread.is_alive(), "use it as a context manager"
        arrived: queue.SimpleQueue[Future[Sample]] = queue.SimpleQueue()
        under_way: set[Future[Sample]] = set()
        source = iter(requests)
        exhausted = False
        failure: Exception | None = None
        try:
            while True:
                stopped = failure is not None or (stop is not None and stop.is_set)
                while not exhausted and not stopped and len(under_way) < 2 * self._settings.concurrency:
                    request = next(source, None)
                    exhausted = request is None
                    if request is not None:
                        under_way.add(self._submit(request, arrived))
                if not under_way:
                    break
                try:
                    future = arrived.get_nowait() if stopped else arrived.get(timeout=_POLL_S)
                except queue.Empty:
                    if stopped:
                        break
                    continue
                under_way.discard(future)
                if error := future.exception():
                    failure = failure or (error if isinstance(error, Exception) else None)
                    continue
                self._has_answered |= not future.result().error
                yield future.result()
        finally:
            for future in under_way:
                future.cancel()
        if failure is not None:
            raise failure

    def _submit(self, request: Request, arrived: "queue.SimpleQueue[Future[Sample]]") -> Future[Sample]:
        try:
            body = self._body(request)
        except DataError as error:  # its image is gone: this request fails, the others go on
            future: Future[Sample] = Future()
            future.set_result(request.sample(error=str(error)))
        else:
            future = asyncio.run_coroutine_threadsafe(self._answer(request, body), self._loop)
        future.add_done_callback(arrived.put)
        return future

    def _body(self, request: Request) -> dict[str, object]:
        """The request as JSON. Raises DataError for an image that cannot be read."""
        sampling = self._sampling
        body: dict[str, object] = {
            "model": self._settings.model,
            "messages": [{"role": m.role, "content": content(m)} for m in request.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "n": 1,
        }
        if sampling.temperature > 0:
            seed = rollout_seed(sampling.seed, request.turn, request.id, request.index)
            body["seed"] = seed >> 32  # some servers take 31 bits
        return body

    async def _answer(self, request: Request, body: Mapping[str, object]) -> Sample:
        async with self._slots:
            started = time.monotonic()
            for attempt in count(1):
                await self._pace()
                try:
                    sample = _sample(request, await self._post(body))
                    break
                except _FinalError as error:
                    sample = request.sample(error=str(error))
                    break
                except _RetryableError as error:
                    if attempt > self._settings.max_retries:
                        if error.unreachable and not self._has_answered:
                            raise self._unreachable(str(error)) from error
                        sample = request.sample(error=str(error), retryable=True)
                        break
                    await asyncio.sleep(_pause(attempt, error.after_s))
            text, reasoning, failure = (
                masked(each, self._settings) for each in (sample.text, sample.reasoning, sample.error)
            )
            seconds = round(time.monotonic() - started, 3)
            return replace(sample, seconds=seconds, text=text, reasoning=reasoning, error=failure)

    async def _pace(self) -> None:
        """Wait until `requests_per_minute` allows the next attempt."""
        if self._settings.requests_per_minute is not None:
            now = self._loop.time()
            start = max(now, self._next_start)
            self._next_start = start + 60.0 / self._settings.requests_per_minute
            await asyncio.sleep(start - now)

    async def _post(self, body: Mapping[str, object]) -> object:
        """Make one attempt. Raises _RetryableError, _FinalError or EndpointError.

        `post` instead of `chat.completions.create`: the latter checks and copies every message and
        reply through its models, which halves the rate. `_sample` checks the fields that are used.
        """
        limit = self._settings.request_timeout_s
        try:
            async with asyncio.timeout(limit):
                return await self._client.post("/chat/completions", body=body, cast_to=object)
        except (TimeoutError, openai.APITimeoutError) as error:
            raise _RetryableError(f"no answer within {limit:g} s") from error
        except openai.APIStatusError as error:
            raise status_error(error, self._settings) from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            unreachable = type(cause).__name__ == "ConnectError"
            what = f"{type(cause).__name__}: {cause}".rstrip(": ")
            raise _RetryableError(f"the connection failed: {what}", unreachable=unreachable) from error
        except (openai.OpenAIError, ValueError) as error:
            raise _RetryableError(f"the reply cannot be read: {error}") from error

    def _unreachable(self, why: str) -> EndpointError:
        return EndpointError(
            f"nothing answers there ({masked(why, self._settings)})",
            where=self._settings.base_url,
            fix="start the server, or correct the URL and its port",
        )


def masked(text: str, settings: Endpoint) -> str:
    """The text with `***` for the server's key: a server may send it back, in an error or an answer."""
    key = os.environ.get(settings.key_env, "").strip()
    return text.replace(key, "***") if len(key) >= _SHORTEST_SECRET else text


def status_error(error: openai.APIStatusError, settings: Endpoint) -> Exception:
    """Turn an HTTP status into the error that retries, fails this request, or ends the run."""
    status, url = error.status_code, settings.base_url
    message = f"HTTP {status}: {_short(masked(error.message, settings))}"
    if status == 402 or error.code == "insufficient_quota":
        return EndpointError(f"the account has no credit left ({message})", where=url, fix="top it up")
    if status in _RETRYABLE_STATUS or status >= 500:
        return _RetryableError(message, after_s=_retry_after(error.response.headers))
    if status in (401, 403):
        name = settings.key_env
        state = "holds a key that is refused" if os.environ.get(name) else "is not set"
        fix = f"put the server's key into the environment variable {name}, which {state}"
        return EndpointError(f"the server refuses the key ({message})", where=url, fix=fix)
    if status == 404:
        fix = f"see {url.rstrip('/')}/models for the names; the URL mostly ends in /v1"
        what = f"there is no model {settings.model!r}, or no chat server ({message})"
        return EndpointError(what, where=url, fix=fix)
    return _FinalError(message)


def content(message: Message) -> str | list[dict[str, object]]:
    """Convert a message's content to the protocol's format. Raises ImageError.

    Content without images is a string: some servers accept no lists for it.
    """
    if all(isinstance(part, str) for part in message.parts):
        return "".join(str(part) for part in message.parts)
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_uri(encoded_image(part))}}
        for part in message.parts
        if part != ""
    ]


def _sample(request: Request, reply: object) -> Sample:
    """Read a reply. Raises _RetryableError when it is garbled or empty, _FinalError when withheld."""
    try:
        reply = reply if isinstance(reply, dict) else {}
        choice = reply["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        finish = str(choice.get("finish_reason")).lower()
        usage: Mapping[str, Any] = reply.get("usage") or {}
        tokens = [int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion")]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _RetryableError("the reply is no chat completion") from error
    stop = stop_reason(finish)
    if finish in RETRYABLE:
        raise _RetryableError(f"the server broke the answer off ({finish})")
    if stop is StopReason.ERROR:
        raise _FinalError(f"the server withheld the answer ({finish})")
    if not isinstance(text, str) or not isinstance(reasoning, str):
        raise _RetryableError("the reply is no chat completion")
    if not text.strip() and (stop is StopReason.EOS or finish not in STOP_REASONS):
        raise _RetryableError("the answer is empty")
    return request.sample(
        text=text, stop=stop, reasoning=reasoning, prompt_tokens=tokens[0], tokens=tokens[1]
    )


def _pause(attempt: int, after_s: float | None) -> float:
    """Seconds before the next attempt: as the server requested, or else doubling; with jitter."""
    if after_s is not None:
        return min(after_s, LONGEST_RETRY_AFTER_S) + random.uniform(0.0, 0.25)
    return min(FIRST_WAIT_S * 2.0 ** (attempt - 1), LONGEST_WAIT_S) * random.uniform(0.75, 1.25)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds in a `Retry-After` header, which holds a number or a date; None without a readable one."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 300 else flat[:299] + "\u2026"
