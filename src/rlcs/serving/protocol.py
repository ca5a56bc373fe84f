"""Reads requests and builds replies and errors of the OpenAI chat protocol; requests are checked strictly."""

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rlcs.data.images import image_from_bytes
from rlcs.errors import RlcsError, UserError
from rlcs.records import ImageRef, Message

HARMLESS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "parallel_tool_calls", "response_format",
})  # fmt: skip
"""Keys that change no answer and are ignored. Other unknown keys are refused."""
NEUTRAL = {"repetition_penalty": 1, "length_penalty": 1, "top_k": -1, "best_of": 1, "tool_choice": "none"}
"""Values of unsupported keys that ask for nothing and are accepted, beside zero and empty ones."""
STOP_CHARS = 256
MOST_VALUES = 100_000
"""Most values in a request, bounded by counting commas before parsing, which takes seconds for millions."""
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits on requests."""

    max_images: int = 8
    max_pixels: int = 1 << 24
    max_tokens: int = 4096
    max_n: int = 8
    max_body_bytes: int = 32 << 20
    concurrency: int = 32
    queue: int = 64
    request_s: float = 600.0

    def __post_init__(self) -> None:
        """Raises UserError for a limit that refuses every request."""
        for limit in fields(self):
            least = {"queue": 0, "max_images": 0, "request_s": 0.001}.get(limit.name, 1)
            if getattr(self, limit.name) < least:
                option = f"--{limit.name.replace('_', '-')}"
                raise UserError("this limit refuses every request", where=option, fix="make it larger")


class ApiError(RlcsError):
    """A request that is answered with an error: `status` is HTTP's, `param` the faulty field."""

    def __init__(self, status: int, what: str, *, param: str | None = None, code: str | None = None) -> None:
        """`code` is OpenAI's short name of the error."""
        super().__init__(what)
        self.status, self.param, self.code = status, param, code

    def to_json(self) -> Json:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.what, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """The address of an image."""

    url: str


class ImagePart(_Strict):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(_Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class StreamOptions(_Strict):
    """What a stream holds besides the text."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """The body of `/v1/chat/completions`; keys that change nothing here are ignored."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=512)]
    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: bool = False

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data.keys() - cls.model_fields.keys() - HARMLESS:
                if data[key] and data[key] != NEUTRAL.get(key):
                    raise ValueError(f"{key[:40]} is not supported")
            if (data.get("response_format") or {"type": "text"}) != {"type": "text"}:
                raise ValueError("response_format: only text is supported")
        return data

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def parse_request(body: bytes, limits: Limits, *, model: str) -> ChatRequest:
    """Read a request. Raises ApiError for one that is malformed, unsupported or over a limit."""
    if body.count(b",") > MOST_VALUES:
        raise ApiError(400, f"the request has more than {MOST_VALUES:,} values (or commas in its text)")
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(str(key)[:40] for key in first["loc"]) or None
        message = first["msg"].removeprefix("Value error, ")[:300]
        raise ApiError(400, f"{param}: {message}" if param else message, param=param) from error
    if request.model is not None and request.model != model:
        what = f"there is no model {request.model[:100]!r} here, only {model!r}"
        raise ApiError(404, what, param="model", code="model_not_found")
    if request.n > limits.max_n:
        raise ApiError(400, f"n is at most {limits.max_n}", param="n")
    if max(request.max_completion_tokens or 0, request.max_tokens or 0) > limits.max_tokens:
        what = f"max_tokens is at most {limits.max_tokens} on this server"
        raise ApiError(400, what, param="max_tokens")
    if len(request.stops) > 4 or not all(0 < len(stop) <= STOP_CHARS for stop in request.stops):
        raise ApiError(400, f"stop is up to 4 texts of 1 to {STOP_CHARS} characters", param="stop")
    return request


def conversation(request: ChatRequest, limits: Limits) -> list[Message]:
    """Read the turns of a request with their images. Raises ApiError or ImageError."""
    parts = [
        part for message in request.messages if isinstance(message.content, list) for part in message.content
    ]
    images = sum(isinstance(part, ImagePart) for part in parts)
    if images > limits.max_images:
        what = f"{images} images are more than the {limits.max_images} that this server takes"
        raise ApiError(400, what, param="messages")
    turns = []
    for number, message in enumerate(request.messages):
        content = message.content
        texts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        where = f"messages.{number}.content"
        read = (p.text if isinstance(p, TextPart) else _image(p.image_url.url, limits, where) for p in texts)
        role: Any = "system" if message.role == "developer" else message.role
        turns.append(Message(role=role, parts=tuple(read)))
        if role != "user" and any(isinstance(part, ImageRef) for part in turns[-1].parts):
            raise ApiError(400, "images belong to turns of the user", param=where)
    return turns


def _image(url: str, limits: Limits, where: str) -> ImageRef:
    head, comma, data = url.partition(",")
    if not head.startswith("data:"):
        what = "images come as data: URLs (data:image/png;base64,...); this server opens no other address"
        raise ApiError(400, what, param=where, code="invalid_image_url")
    if not comma or not head.endswith(";base64"):
        raise ApiError(400, "this data: URL is not base64", param=where, code="invalid_image_url")
    try:
        decoded = base64.b64decode(data, validate=True)
    except ValueError as error:
        raise ApiError(400, f"broken base64: {error}", param=where, code="invalid_image_url") from error
    return image_from_bytes(decoded, limit=limits.max_pixels, where=where)


def reply(kind: str, key: str, model: str, choices: Sequence[Json], **more: Any) -> Json:
    """Build a reply or one chunk of a stream; `kind` is the object's name, `key` its id."""
    head = {"id": key, "object": kind, "created": int(time.time()), "model": model}
    return {**head, "choices": list(choices), **more}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens as OpenAI counts them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def token_logprob(text: str, logprob: float) -> Json:
    """One entry of `logprobs.content`."""
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
