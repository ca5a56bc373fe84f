"""Serves the local engine over HTTP, compatible with OpenAI.

The number of requests at once, their time and their sizes are limited; a request is cancelled when its
client disconnects. Prompts are built in one thread, the model runs in another.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from rlcs.data.images import image_from_bytes
from rlcs.engines.branches import Token
from rlcs.errors import ImageError, OutOfMemory, UserError
from rlcs.records import ImageRef, Message, Prompt, Sampling, StopReason
from rlcs.serving.defaults import SamplingDefaults
from rlcs.serving.image_sources import DOWNLOAD_S, ImageDownloader, ImageHosts, ImageUrlError
from rlcs.serving.protocol import (
    ApiError,
    ChatRequest,
    Json,
    Limits,
    parse_request,
    reply,
    require_model,
    token_logprob,
    usage,
)
from rlcs.serving.session import Session, Settings
from rlcs.serving.turns import Picture, RequestTurn, read_turns, wrong
from rlcs.serving.uploads import Uploads

log = logging.getLogger(__name__)

_CLIENT_CLOSED = 499  # nginx's status for a client that closed the connection


class Metrics:
    """Counts of requests and tokens so far, for Prometheus."""

    def __init__(self) -> None:
        """Use a registry of this server alone, not the process's."""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rlcs_requests", "Chat requests by HTTP status (499: cut off).", ["code"], registry=self.registry
        )
        self.seconds = Counter("rlcs_request_seconds", "Seconds spent on them.", registry=self.registry)
        tokens = Counter("rlcs_tokens", "Tokens read and written.", ["kind"], registry=self.registry)
        self.prompt_tokens, self.completion_tokens = tokens.labels("prompt"), tokens.labels("completion")
        started = Gauge("rlcs_start_time_seconds", "When the server started.", registry=self.registry)
        started.set_to_current_time()


@dataclass(kw_only=True)
class Service:
    """A session, the limits of requests to it, and the requests so far."""

    session: Session
    name: str
    limits: Limits
    key: str | None = None
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    image_hosts: ImageHosts = field(default_factory=ImageHosts)
    started: float = field(default_factory=time.time)
    active: int = 0
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        """Add the requests under way to the metrics."""
        self._downloader = ImageDownloader(self.image_hosts)
        self.uploads = Uploads(max_bytes=self.limits.max_body_bytes)
        for name, about, value in (
            ("rlcs_requests_active", "Requests that hold a place.", lambda: self.active),
            ("rlcs_engine_running", "Requests being answered.", lambda: self.session.engine.running),
            ("rlcs_engine_waiting", "Requests waiting to begin.", lambda: self.session.engine.waiting),
        ):
            Gauge(name, about, registry=self.metrics.registry).set_function(value)

    def authorise(self, request: Request) -> None:
        """Raises ApiError unless the request brings the key (compared in constant time)."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            what = "wrong or missing API key (Authorization: Bearer KEY)"
            raise ApiError(401, what, code="invalid_api_key")

    def require_place(self) -> None:
        """Raises ApiError when there are too many active requests."""
        if self.active >= self.limits.concurrency + self.limits.queue:
            raise ApiError(429, "too many requests at once; try again later", code="rate_limit_exceeded")

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Count one request as active. Raises ApiError when there are too many."""
        self.require_place()
        self.active += 1
        began = time.perf_counter()
        try:
            yield
        finally:
            self.active -= 1
            self.metrics.seconds.inc(time.perf_counter() - began)

    def read(self, body: bytes) -> tuple[ChatRequest, list[RequestTurn]]:
        """Read a request; its messages become turns. Raises ApiError."""
        options = parse_request(body, self.limits, model=self.name)
        turns = read_turns(options.messages, max_images=self.limits.max_images)
        # Drop its messages: they hold megabytes of images that the turns hold too.
        return options.model_copy(update={"messages": []}), turns

    async def with_images(self, turns: list[RequestTurn]) -> list[RequestTurn]:
        """Download the images that turns name by address. Raises ApiError."""
        left, complete = self.limits.max_body_bytes, []
        end = asyncio.get_running_loop().time() + DOWNLOAD_S
        for turn in turns:
            parts: list[str | Picture] = []
            for part in turn.parts:
                if isinstance(part, Picture) and part.address:
                    try:
                        async with asyncio.timeout_at(end):
                            data = await self._downloader.download(part.address, limit=left)
                    except (ImageUrlError, TimeoutError) as error:
                        what = str(error) or f"the images were not there within {DOWNLOAD_S:g} seconds"
                        raise wrong(part.where, what, code="invalid_image_url") from error
                    left -= len(data)
                    part = replace(part, address="", data=data)
                parts.append(part)
            complete.append(replace(turn, parts=tuple(parts)))
        return complete

    def prepare(self, options: ChatRequest, turns: list[RequestTurn]) -> tuple[Prompt, Sampling]:
        """Make the prompt and sampling of a request. Raises ApiError, PromptError."""
        messages = []
        for turn in turns:
            parts = (part if isinstance(part, str) else self._image(part) for part in turn.parts)
            role: Any = "system" if turn.role == "developer" else turn.role
            messages.append(Message(role=role, parts=tuple(parts)))
        prompt = self.session.chat.conversation(messages, name="conversation")
        own, longest = self.defaults, self.limits.max_tokens
        settings = Settings(
            temperature=own.temperature if options.temperature is None else options.temperature,
            top_p=own.top_p if options.top_p is None else options.top_p,
            max_new_tokens=options.max_completion_tokens
            or options.max_tokens
            or min(own.max_tokens or longest, longest),
            seed=options.seed,
        )
        return prompt, self.session.sampling(prompt, settings, n=options.n)

    def _image(self, picture: Picture) -> ImageRef:
        """Check an image, whose patches are then in memory for the prompt. Raises ApiError."""
        try:
            limit, measure = self.limits.max_pixels, self.session.measure
            image = image_from_bytes(picture.data, limit=limit, where=picture.where, measure=measure)
            self.session.chat.patches(image)
        except ImageError as error:
            raise wrong(picture.where, error.what, code="invalid_image_url") from error
        return image


class ChatCompletions:
    """`POST /v1/chat/completions` as an ASGI application."""

    def __init__(self, service: Service) -> None:
        """Requests are parsed and prompts built one after another, off the event loop."""
        self._service = service
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="rlcs-prompts")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; an error before the first byte becomes an error reply."""
        service, request = self._service, Request(scope, receive)
        begun = False

        async def tracked(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        code = 500
        try:
            service.authorise(request)
            service.require_place()
            body = await self._body(request)
            with service.slot():
                async with asyncio.timeout(service.limits.request_s):
                    await self._serve(request, body, tracked)
            code = 200
        except ClientDisconnect:
            code = _CLIENT_CLOSED
        except Exception as error:  # what nobody foresaw has the form of an error too
            refusal = _refusal(error)
            code = refusal.status
            if begun:  # too late for an error reply: the connection is cut
                log.warning("an answer was cut off: %s", refusal.what)
            else:
                await _error_reply(refusal)(scope, receive, send)
        finally:
            service.metrics.requests.labels(code).inc()

    async def _serve(self, request: Request, body: bytes, send: Send) -> None:
        service, loop = self._service, asyncio.get_running_loop()
        options, turns = await loop.run_in_executor(self._builder, service.read, body)
        turns = await service.with_images(turns)
        prompt, sampling = await loop.run_in_executor(self._builder, service.prepare, options, turns)
        del turns
        events: asyncio.Queue[Token | Exception] = asyncio.Queue()

        def receive(event: Token | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop closed while the server was ending
                loop.call_soon_threadsafe(events.put_nowait, event)

        submitted = service.session.engine.submit(
            prompt, sampling, listener=receive, stops=options.stops, num_likeliest=options.top_logprobs
        )
        answer = _Reply(service, options, len(prompt.ids), _tokens(events, sampling.n))
        writing = asyncio.create_task(answer.write(request, send))
        disconnect = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({writing, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                raise ClientDisconnect
            writing.result()
        finally:
            submitted.cancel()
            writing.cancel()
            disconnect.cancel()
            await asyncio.gather(writing, disconnect, return_exceptions=True)

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "send the request as application/json")
        return await self._service.uploads.read(request)


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _tokens(events: "asyncio.Queue[Token | Exception]", n: int) -> AsyncIterator[Token]:
    """Yield the tokens of `n` answers until each has ended. Raises ApiError when the engine failed."""
    while n:
        event = await events.get()
        if isinstance(event, Exception):
            why = event.what if isinstance(event, OutOfMemory) else type(event).__name__
            raise ApiError(500, f"the model failed: {why}") from event
        n -= event.stop is not None
        yield event


class _Reply:
    """Writes one reply, whole or as server-sent events."""

    def __init__(
        self, service: Service, options: ChatRequest, prompt: int, tokens: AsyncIterator[Token]
    ) -> None:
        self._service, self._options, self._tokens = service, options, tokens
        self._key = f"chatcmpl-{secrets.token_hex(12)}"
        self._prompt, self._completion = prompt, 0

    async def write(self, request: Request, send: Send) -> None:
        self._service.metrics.prompt_tokens.inc(self._prompt)
        if self._options.stream:
            await self._stream(send)
        else:
            await (await self._whole())(request.scope, request.receive, send)

    async def _counted(self) -> AsyncIterator[tuple[Token, Json | None]]:
        """Count and yield tokens, with their `logprobs` if those are requested."""
        chat = self._service.session.chat
        async for token in self._tokens:
            self._completion += 1
            self._service.metrics.completion_tokens.inc()
            entry = None
            if self._options.logprobs:
                ids = (token.id, *(other for other, _ in token.likeliest))
                own, *spelt = [(chat.token(index), chat.token_bytes(index)) for index in ids]
                others = [(each, logprob) for each, (_, logprob) in zip(spelt, token.likeliest, strict=True)]
                entry = token_logprob(own, token.logprob, others)
            yield token, entry

    async def _whole(self) -> Response:
        texts, ends = [""] * self._options.n, [""] * self._options.n
        entries: list[list[Json]] = [[] for _ in texts]
        async for token, entry in self._counted():
            texts[token.index] += token.text
            entries[token.index] += [entry] if entry else []
            ends[token.index] = _finish(token)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "finish_reason": ends[index],
                "logprobs": {"content": entries[index]} if self._options.logprobs else None,
            }
            for index, text in enumerate(texts)
        ]
        counts = usage(self._prompt, self._completion)
        return JSONResponse(reply("chat.completion", self._key, self._service.name, choices, usage=counts))

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for index in range(self._options.n):
            await self._chunk(send, index, {"role": "assistant", "content": ""})
        async for token, entry in self._counted():
            if token.text or entry:
                logprobs = {"content": [entry]} if entry else None
                await self._chunk(send, token.index, {"content": token.text}, logprobs=logprobs)
            if token.stop is not None:
                await self._chunk(send, token.index, {}, finish_reason=_finish(token))
        if self._options.stream_options.include_usage:
            await self._event(send, [], usage=usage(self._prompt, self._completion))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _chunk(self, send: Send, index: int, delta: Json, **more: Any) -> None:
        await self._event(send, [{"index": index, "delta": delta, "finish_reason": None, **more}])

    async def _event(self, send: Send, choices: list[Json], **more: Any) -> None:
        if self._options.stream_options.include_usage:
            more = {"usage": None, **more}
        chunk = reply("chat.completion.chunk", self._key, self._service.name, choices, **more)
        body = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _finish(token: Token) -> str:
    return "length" if token.stop is StopReason.LENGTH else "stop"


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return ApiError(503, "the answer took too long", code="timeout")
    if isinstance(error, UserError):
        return ApiError(400, f"{error.where}: {error.what}" if error.where else error.what)
    log.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")


def _error_reply(error: ApiError) -> JSONResponse:
    headers = {"retry-after": "1"} if error.status == 429 else {}
    headers |= {"www-authenticate": "Bearer"} if error.status == 401 else {}
    return JSONResponse(error.to_json(), error.status, headers)


def make_app(service: Service, *, cors_origins: Sequence[str] = ()) -> FastAPI:
    """Make the ASGI application of the server; pages of the `cors_origins` (`*`: of all) may ask it too."""
    app = FastAPI(title="rlcs", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_route("/v1/chat/completions", ChatCompletions(service), methods=["POST"])  # type: ignore[arg-type]
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,
        )
    model = {"id": service.name, "object": "model", "created": int(service.started), "owned_by": "rlcs"}

    @app.get("/health")
    async def health() -> Json:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def list_models(request: Request) -> Json:
        service.authorise(request)
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(request: Request, name: str) -> Json:
        service.authorise(request)
        require_model(name, service.name)
        return model

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> JSONResponse:
        return _error_reply(error)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        return _error_reply(
            ApiError(error.status_code, f"{request.method} {request.scope['path'][:200]}: {error.detail}")
        )

    return app
