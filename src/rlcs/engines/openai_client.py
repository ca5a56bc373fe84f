"""Any server that speaks the OpenAI chat protocol, with images: vLLM, SGLang, hosted APIs.

Requests go in lazily and answers come out as they arrive, so that the caller can write each at once.
Inside, one event loop in a thread of its own keeps `concurrency` requests under way, also while the
caller is busy with an answer; outside there is a plain iterator. What may pass (busy, down, cut off,
garbled, empty) is tried again; what cannot (a wrong key, a wrong name) ends the run with a sentence.
"""

import asyncio
import base64
import email.utils
import os
import queue
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Self

import openai

from rlcs.errors import DataError, EndpointError
from rlcs.recipe.sampling import Endpoint
from rlcs.records import IMAGE_SLOT, ImageRef, Message, Problem
from rlcs.signals import StopFlag
from rlcs.storage import encoded_image, image_kind

IMAGE_LIMIT = 50_000_000
"""Pixels; the bound of the bytes read for one image."""
FIRST_WAIT_S = 0.5
"""Before the second try; doubled for each further one, up to LONGEST_WAIT_S."""
LONGEST_WAIT_S = 30.0
LONGEST_RETRY_AFTER_S = 600.0
"""A server that asks for a longer pause than this is not waited for any longer than this."""
_LOOK_S = 0.1  # between two looks at the stop flag
_PASSING = frozenset({408, 409, 425, 429})  # and all of 5xx


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked: (id, index) is the caller's key, index the number of the try or sample."""

    id: str
    messages: tuple[Message, ...]
    max_tokens: int
    index: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came back, or why nothing did (`finish` is `error` and `error` says it; `refused`: for good).

    `reasoning` is what some servers keep apart from the text. `seconds` run from the first try,
    pauses included; `attempts` counts tries, 0 if nothing could be sent.
    """

    id: str
    index: int
    text: str = ""
    finish: Literal["stop", "length", "error"] = "error"
    reasoning: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    attempts: int = 0
    error: str = ""
    refused: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Totals so far. `cost` is in the currency of the prices, None without any."""

    answers: int = 0
    failed: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cost: float | None = None

    @property
    def answers_per_s(self) -> float:
        """Answers a second of wall time."""
        return self.answers / self.seconds if self.seconds else 0.0


class _AgainError(Exception):
    """A failure that may pass, and the seconds that the server asked to wait, if it did."""

    def __init__(self, why: str, *, after_s: float | None = None, unreachable: bool = False) -> None:
        super().__init__(why)
        self.after_s = after_s
        self.unreachable = unreachable


class _RefusedError(Exception):
    """A failure of this one request that no further try can mend."""


class EndpointClient:
    """Asks one server; a context manager. Not for several threads at once."""

    def __init__(self, settings: Endpoint) -> None:
        """Nothing is sent yet. Raises EndpointError for a URL that is none."""
        if not settings.base_url.startswith(("http://", "https://")):
            raise EndpointError(
                "this is not the URL of a server",
                where=settings.base_url or "base URL",
                fix="write it out, like http://localhost:8000/v1",
            )
        self._settings = settings
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=os.environ.get(settings.key_env) or "none",
            max_retries=0,  # the tries are counted here, and cover more than the client's own
            timeout=settings.request_timeout_s,
        )
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._next_start = 0.0
        self._usage = Usage()

    def __enter__(self) -> Self:
        """Start the thread that talks."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give up what is under way and close the connections."""
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

    @property
    def usage(self) -> Usage:
        """Totals over all `ask` so far."""
        return self._usage

    def ask(self, requests: Iterable[Request], *, stop: StopFlag | None = None) -> Iterator[Answer]:
        """Answers as they arrive, one for each request, in no order.

        `requests` is drawn from in this thread, never more than twice `concurrency` ahead. When `stop`
        is set, what has arrived is still yielded and the rest is given up. Raises EndpointError, after
        yielding what has arrived, when the server cannot be used at all.
        """
        assert self._thread.is_alive(), "use it as a context manager"
        arrived: queue.SimpleQueue[Future[Answer]] = queue.SimpleQueue()
        under_way: set[Future[Answer]] = set()
        source = iter(requests)
        exhausted = False
        started, before = time.monotonic(), self._usage
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
                    future = arrived.get_nowait() if stopped else arrived.get(timeout=_LOOK_S)
                except queue.Empty:
                    if stopped:
                        break
                    continue
                under_way.discard(future)
                if error := future.exception():
                    failure = failure or (error if isinstance(error, Exception) else None)
                    continue
                self._count(future.result(), before, started)
                yield future.result()
        finally:
            for future in under_way:
                future.cancel()
        if failure is not None:
            raise failure

    def _submit(self, request: Request, arrived: "queue.SimpleQueue[Future[Answer]]") -> Future[Answer]:
        try:
            body = self._body(request)
        except DataError as error:  # its image is gone: this request fails, the others go on
            future: Future[Answer] = Future()
            future.set_result(Answer(id=request.id, index=request.index, error=str(error), refused=True))
        else:
            future = asyncio.run_coroutine_threadsafe(self._answer(request, body), self._loop)
        future.add_done_callback(arrived.put)
        return future

    def _count(self, answer: Answer, before: Usage, started: float) -> None:
        settings, old = self._settings, self._usage
        prompt = old.prompt_tokens + answer.prompt_tokens
        completion = old.completion_tokens + answer.completion_tokens
        prices = (settings.prompt_price, settings.completion_price)
        cost = (prompt * (prices[0] or 0.0) + completion * (prices[1] or 0.0)) / 1e6
        self._usage = Usage(
            answers=old.answers + (answer.finish != "error"),
            failed=old.failed + (answer.finish == "error"),
            attempts=old.attempts + answer.attempts,
            prompt_tokens=prompt,
            completion_tokens=completion,
            seconds=before.seconds + time.monotonic() - started,
            cost=None if prices == (None, None) else cost,
        )

    def _body(self, request: Request) -> dict[str, object]:
        """The request as JSON. Raises DataError for an image that cannot be read."""
        body: dict[str, object] = {
            "model": self._settings.model,
            "messages": [{"role": m.role, "content": content(m)} for m in request.messages],
            "temperature": request.temperature,
            "top_p": request.top_p,
            "max_tokens": request.max_tokens,
            "n": 1,
        }
        return body if request.seed is None else {**body, "seed": request.seed}

    async def _answer(self, request: Request, body: Mapping[str, object]) -> Answer:
        async with self._slots:
            started = time.monotonic()
            attempt = 0
            while True:
                attempt, refused = attempt + 1, False
                await self._pace()
                try:
                    answer = _read(request, await self._post(body))
                    return replace(answer, attempts=attempt, seconds=time.monotonic() - started)
                except _RefusedError as error:
                    why, refused = str(error), True
                except _AgainError as error:
                    why = str(error)
                    if attempt <= self._settings.max_retries:
                        await asyncio.sleep(_pause(attempt, error.after_s))
                        continue
                    if error.unreachable and not self._usage.answers:
                        raise self._unreachable(why) from error
                seconds = time.monotonic() - started
                return Answer(
                    id=request.id,
                    index=request.index,
                    error=why,
                    refused=refused,
                    attempts=attempt,
                    seconds=seconds,
                )

    async def _pace(self) -> None:
        """Wait for this try's turn under `requests_per_minute`."""
        if self._settings.requests_per_minute is not None:
            now = self._loop.time()
            start = max(now, self._next_start)
            self._next_start = start + 60.0 / self._settings.requests_per_minute
            await asyncio.sleep(start - now)

    async def _post(self, body: Mapping[str, object]) -> object:
        """One try. Raises _AgainError, _RefusedError or EndpointError.

        `post` instead of `chat.completions.create`: the latter checks and copies every message and
        reply through its models, which halves the rate. What is needed of a reply is checked in `_read`.
        """
        limit = self._settings.request_timeout_s
        try:
            async with asyncio.timeout(limit):
                return await self._client.post("/chat/completions", body=body, cast_to=object)
        except (TimeoutError, openai.APITimeoutError) as error:
            raise _AgainError(f"no answer within {limit:g} s") from error
        except openai.APIStatusError as error:
            raise status_error(error, self._settings) from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            unreachable = type(cause).__name__ == "ConnectError"
            what = f"{type(cause).__name__}: {cause}".rstrip(": ")
            raise _AgainError(f"the connection failed: {what}", unreachable=unreachable) from error
        except (openai.OpenAIError, ValueError) as error:
            raise _AgainError(f"the reply cannot be read: {error}") from error

    def _unreachable(self, why: str) -> EndpointError:
        return EndpointError(
            f"nothing answers there ({why})",
            where=self._settings.base_url,
            fix="start the server, or correct the URL and its port",
        )


def status_error(error: openai.APIStatusError, settings: Endpoint) -> Exception:
    """What an HTTP status means: try again, give this request up, or give all up."""
    status, url = error.status_code, settings.base_url
    said = f"HTTP {status}: {_short(error.message)}"
    if status == 402 or error.code == "insufficient_quota":
        return EndpointError(f"the account has no credit left ({said})", where=url, fix="top it up")
    if status in _PASSING or status >= 500:
        return _AgainError(said, after_s=_retry_after(error.response.headers))
    if status in (401, 403):
        name = settings.key_env
        state = "holds a key that is refused" if os.environ.get(name) else "is not set"
        fix = f"put the server's key into the environment variable {name}, which {state}"
        return EndpointError(f"the server refuses the key ({said})", where=url, fix=fix)
    if status == 404:
        fix = f"see {url.rstrip('/')}/models for the names; the URL mostly ends in /v1"
        what = f"there is no model {settings.model!r}, or no chat server ({said})"
        return EndpointError(what, where=url, fix=fix)
    return _RefusedError(said)


def user_parts(problem: Problem) -> tuple[str | ImageRef, ...]:
    """Texts and images in their order: at their slots, or first where there are none."""
    pieces = problem.question.split(IMAGE_SLOT)
    if len(pieces) == 1:
        return (*problem.images, problem.question)
    parts: list[str | ImageRef] = [pieces[0]]
    for image, piece in zip(problem.images, pieces[1:], strict=True):
        parts += [image, piece]
    return tuple(part for part in parts if part != "")


def content(message: Message) -> str | list[dict[str, object]]:
    """What a message says, in the words of the protocol. Raises ImageError.

    A text alone stays a text: some servers take no lists where no image is.
    """
    if all(isinstance(part, str) for part in message.parts):
        return "".join(str(part) for part in message.parts)
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in message.parts
        if part != ""
    ]


def data_url(ref: ImageRef) -> str:
    """The image in its own bytes as a `data:` URL. Raises ImageError."""
    data = encoded_image(ref, limit=IMAGE_LIMIT)
    return f"data:image/{image_kind(data)};base64,{base64.b64encode(data).decode()}"


def _read(request: Request, reply: object) -> Answer:
    """The answer in a reply. Raises _AgainError when it is garbled or empty, _RefusedError when withheld."""
    try:
        reply = reply if isinstance(reply, dict) else {}
        choice = reply["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        finish = choice.get("finish_reason")
        usage: Mapping[str, Any] = reply.get("usage") or {}
        tokens = [int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion")]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _AgainError("the reply is no chat completion") from error
    if finish == "content_filter":
        raise _RefusedError("the server withheld the answer (content_filter)")
    if not isinstance(text, str) or not isinstance(reasoning, str):
        raise _AgainError("the reply is no chat completion")
    if not text.strip() and finish != "length":
        raise _AgainError("the answer is empty")
    return Answer(
        id=request.id,
        index=request.index,
        text=text,
        reasoning=reasoning,
        finish="length" if finish == "length" else "stop",
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
    )


def _pause(attempt: int, after_s: float | None) -> float:
    """Seconds before the next try: what the server asked for, else doubling; with jitter upwards."""
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
