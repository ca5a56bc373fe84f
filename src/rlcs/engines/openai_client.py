"""Samples from any server with the OpenAI chat protocol, with images: vLLM, SGLang, hosted APIs.

Requests are drawn lazily and samples are yielded as they arrive, so that the caller can write each at once.
An event loop in a second thread keeps `concurrency` requests under way, also while the caller works on
a sample. A failure that may pass (busy, down, cut off) is retried, a reply that is of no use (empty, garbled)
seldom, as it is paid; what cannot pass (a wrong key, a wrong name) ends the run with an error that says what
to do.
"""

import asyncio
import email.utils
import logging
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Self

import openai

from rlcs.data.sent_images import SentImages
from rlcs.engines import connection, replies
from rlcs.engines.providers import Fields
from rlcs.engines.replies import EmptyError, Fault, FinalError, PaidError, RetryableError
from rlcs.errors import DataError, EndpointError
from rlcs.recipe.sampling import Endpoint
from rlcs.recipe.schema import Images
from rlcs.records import Message, Request, Sample, Sampling, StopReason, rollout_seed
from rlcs.redaction import redacted
from rlcs.signals import StopFlag

log = logging.getLogger("rlcs")

FIRST_WAIT_S = 0.5
"""Pause before the second attempt; doubled for each further one, up to LONGEST_WAIT_S."""
LONGEST_WAIT_S = 30.0
LONGEST_RETRY_AFTER_S = 600.0
"""Longest pause that a server's `Retry-After` can cause."""
CONNECT_S = 20.0
"""Seconds in which a server must accept the connection."""
PAID_RETRIES = 2
"""Most further attempts after a reply without an answer, which is paid; one after an empty one at temperature
0."""
_ALL_REFUSED = 8
"""Least refused requests, with none answered, after which a server counts as refusing every request."""
_POLL_S = 0.1  # between two checks of the stop flag
_REFUSALS = frozenset({400, 422})  # statuses with which servers refuse fields


class EndpointClient:
    """Samples from one server; a context manager. Threads may share it, and with it `concurrency`."""

    def __init__(self, settings: Endpoint, sampling: Sampling, images: Images | None = None) -> None:
        """Prepare the client; nothing is sent yet. Raises EndpointError for a wrong address, key or proxy.

        Of `sampling` the limit, the temperature, top-p and the seed are used. A greedy request has no seed.
        Images are sent within the pixels of `images`; None: of the default recipe.
        """
        self._settings, self._sampling = settings, sampling
        self._address = connection.address(settings.base_url)
        patience = settings.request_timeout_s
        limits = openai.Timeout(patience, connect=min(patience, CONNECT_S))
        self._client = connection.connect(settings, self._address, limits)
        self._fields = Fields(settings)
        self._images = SentImages(max_pixels=(images or Images()).max_pixels)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._next_start = 0.0
        self._has_answered = False
        self._num_asking = self._num_refused = 0
        self._warned: set[str] = set()
        self.retries: Counter[str] = Counter()
        """How many attempts were repeated, by their failure."""
        self.lost = (0, 0)
        """Tokens of prompts and answers that were paid in attempts that were repeated."""

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
                yield future.result()
        finally:
            for future in under_way:
                future.cancel()
        if failure is not None:
            raise failure

    def _submit(self, request: Request, arrived: "queue.SimpleQueue[Future[Sample]]") -> Future[Sample]:
        try:
            messages = [{"role": m.role, "content": content(m, self._images)} for m in request.messages]
        except DataError as error:  # its image is gone: this request fails, the others go on
            future: Future[Sample] = Future()
            future.set_result(request.sample(error=str(error)))
        else:
            future = asyncio.run_coroutine_threadsafe(self._answer(request, messages), self._loop)
        future.add_done_callback(arrived.put)
        return future

    async def _answer(self, request: Request, messages: object) -> Sample:
        async with self._slots:
            self._num_asking += 1
            started = time.monotonic()
            try:
                sample = await self._ask(request, {"model": self._settings.model, "messages": messages})
            except FinalError as error:
                self._require_some_answer(error)
                prompt, completion = error.tokens
                sample = request.sample(error=str(error), prompt_tokens=prompt, tokens=completion)
            except RetryableError as error:
                if error.unreachable and not self._has_answered:
                    raise self._unreachable(error) from error
                prompt, completion = error.tokens
                sample = request.sample(
                    error=str(error), retryable=True, prompt_tokens=prompt, tokens=completion
                )
            finally:
                self._num_asking -= 1
            text, reasoning, failure = (
                redacted(each) for each in (sample.text, sample.reasoning, sample.error)
            )
            seconds = round(time.monotonic() - started, 3)
            return replace(sample, seconds=seconds, text=text, reasoning=reasoning, error=failure)

    async def _ask(self, request: Request, body: Mapping[str, object]) -> Sample:
        """Repeat attempts within their limits. Raises RetryableError, FinalError or EndpointError."""
        seed = rollout_seed(self._sampling.seed, request.turn, request.id, request.index)
        attempts, paid = 0, 0
        while True:
            # Some servers take 31 bits. Twice empty, the answer to this seed is empty: another is tried.
            fields = self._fields.body(self._sampling, (seed >> 32) ^ (paid > 1))
            await self._pace()
            try:
                return self._read(request, await self._post({**body, **fields}, fields))
            except _Refused as error:
                if replies.is_cut_off(error.fault):
                    return request.sample(stop=StopReason.LENGTH)
                if not self._adapt(error.fault, fields):
                    raise replies.failure(error.fault, self._settings, url=self._address.url) from error
            except PaidError as error:
                paid += 1
                most = (
                    PAID_RETRIES if self._sampling.temperature > 0 or not isinstance(error, EmptyError) else 1
                )
                if paid > min(most, self._settings.max_retries):
                    if error.unreachable and not self._has_answered:
                        raise
                    what = f"{error}, {paid} times"
                    raise FinalError(what, kind=error.kind, tokens=error.tokens) from error
                self._repeat(error)
            except RetryableError as error:
                attempts += 1
                if attempts > self._settings.max_retries:
                    raise
                self._repeat(error)
                await asyncio.sleep(pause(attempts, error.after_s))

    def _repeat(self, error: RetryableError) -> None:
        """Count an attempt that is repeated."""
        self.lost = (self.lost[0] + error.tokens[0], self.lost[1] + error.tokens[1])
        self.retries[error.kind] += 1

    async def _pace(self) -> None:
        """Wait until `requests_per_minute` allows the next attempt."""
        if self._settings.requests_per_minute is not None:
            now = self._loop.time()
            start = max(now, self._next_start)
            self._next_start = start + 60.0 / self._settings.requests_per_minute
            await asyncio.sleep(start - now)

    async def _post(self, body: Mapping[str, object], fields: Mapping[str, object]) -> bytes:
        """Make one attempt. Raises RetryableError, FinalError, EndpointError or _Refused.

        `post` instead of `chat.completions.create`: the latter checks and copies every message and
        reply through its models, which halves the rate. `replies.read` checks the fields that are used.
        """
        limit = self._settings.request_timeout_s
        try:
            async with asyncio.timeout(limit):
                return await self._client.post("/chat/completions", body=body, cast_to=bytes)
        except (TimeoutError, openai.APITimeoutError) as error:
            if type(error.__cause__).__name__ == "ConnectTimeout":
                raise self._disconnected(error) from error
            raise RetryableError(f"no answer within {limit:g} s", kind="no answer in time") from error
        except openai.APIStatusError as error:
            found = status_fault(error)
            if found.status in _REFUSALS:
                raise _Refused(found) from error
            raise self._failure(found, error.response.headers) from error
        except openai.APIConnectionError as error:
            raise self._disconnected(error) from error
        except Exception as error:  # of sockets and of name look-up, which the client does not wrap
            raise self._disconnected(error) from error

    def _disconnected(self, error: Exception) -> Exception:
        if untrusted := connection.untrusted(error, self._address):
            return untrusted
        cause = error.__cause__ or error
        for raised in (error, cause):
            if isinstance(raised, connection.UnreadableReply):
                return PaidError(str(raised), kind="unreadable")
        name = type(cause).__name__
        what = replies.short(f"{name}: {cause}".rstrip(": ")) + connection.proxy_note(self._address)
        is_new = name in ("ConnectError", "ConnectTimeout", "ProxyError") or not isinstance(
            error, openai.APIConnectionError
        )
        return RetryableError(
            f"the connection failed: {what}",
            kind="connection failed",
            unreachable="nothing answers there" if is_new else "",
        )

    def _read(self, request: Request, body: bytes) -> Sample:
        reply = replies.parsed(body)
        if found := replies.fault_in(reply):
            raise _Refused(found) if found.status in _REFUSALS else self._failure(found, {})
        sample = replies.read(request, reply)
        self._has_answered = True
        if (finish := replies.unknown_finish(reply)) is not None and finish not in self._warned:
            self._warned.add(finish)
            what = (
                f"end with finish_reason {redacted(finish)!r}, which rlcs does not know"
                if finish
                else ("have no finish_reason")
            )
            log.warning("answers of %s %s: they count as cut off", self._address.host, what)
        return sample

    def _failure(self, found: Fault, headers: Mapping[str, str]) -> Exception:
        if headers.get("x-should-retry") == "true":  # as the client of openai does
            return RetryableError(str(found), kind=f"HTTP {found.status}", after_s=_retry_after(headers))
        return replies.failure(found, self._settings, url=self._address.url, after_s=_retry_after(headers))

    def _adapt(self, found: Fault, fields: Mapping[str, object]) -> bool:
        """Whether the same request may be sent again, with other fields. Raises EndpointError."""
        if replies.is_about_content(found):
            return False
        current = self._fields.body(self._sampling, 0)
        if current.keys() != fields.keys():  # learnt from another request meanwhile
            return True
        if not (change := self._fields.learn(found, fields)):
            return False
        log.warning("%s (%s)", change, self._settings.key("request"))
        return True

    def _require_some_answer(self, error: FinalError) -> None:
        """Raise EndpointError when the server refuses every request, and not some of them."""
        self._num_refused += error.kind.startswith("HTTP 4") or error.kind == "too long"
        # Refusals arrive before answers: so they must outnumber the requests that may still be answered.
        if self._has_answered or self._num_refused < max(_ALL_REFUSED, 4 * (self._num_asking - 1)):
            return
        key = self._settings.key
        raise EndpointError(
            f"the server refuses every request ({error})",
            where=self._address.url,
            fix=f"change what it names: the model, {key('request.omit')}, {key('request.max_tokens')}, "
            f"{key('request.extra')}, the limit of tokens, or images.max_pixels",
        )

    def _unreachable(self, error: RetryableError) -> EndpointError:
        version = "" if "/v" in self._address.url else "; most servers want /v1 at its end"
        return EndpointError(
            f"{error.unreachable} ({error})",
            where=self._address.url,
            fix=f"start the server, or correct the URL and its port{version}",
        )


class _Refused(Exception):
    """A request that the server refuses for its content or for its fields."""

    def __init__(self, found: Fault) -> None:
        super().__init__(str(found))
        self.fault = found


def status_fault(error: openai.APIStatusError) -> Fault:
    """What an HTTP error says."""
    return replies.fault(error.status_code, replies.error_body(error.response.text))


def status_error(error: openai.APIStatusError, settings: Endpoint) -> Exception:
    """Turn an HTTP status into the error that retries, fails this request, or ends the run."""
    found, url = status_fault(error), connection.address(settings.base_url).url
    return replies.failure(found, settings, url=url, after_s=_retry_after(error.response.headers))


def content(message: Message, images: SentImages) -> str | list[dict[str, object]]:
    """Convert a message's content to the protocol's format. Raises ImageError.

    Content without images is a string: some servers accept no lists for it.
    """
    if all(isinstance(part, str) for part in message.parts):
        return "".join(str(part) for part in message.parts)
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": images.url(part)}}
        for part in message.parts
        if part != ""
    ]


def pause(attempt: int, after_s: float | None) -> float:
    """Seconds before the next attempt: as the server requested, or else doubling; with jitter."""
    if after_s is not None:
        return min(after_s, LONGEST_RETRY_AFTER_S) + random.uniform(0.0, 0.25)
    return min(FIRST_WAIT_S * 2.0 ** (attempt - 1), LONGEST_WAIT_S) * random.uniform(0.75, 1.25)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds in a `Retry-After` header, which holds a number or a date; None without a readable one."""
    value = headers.get("retry-after", "")
    for text, a_second in ((headers.get("retry-after-ms", ""), 1000), (value, 1)):
        with suppress(ValueError):
            return max(0.0, float(text) / a_second)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
