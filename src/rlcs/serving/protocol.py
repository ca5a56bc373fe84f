"""Reads requests and builds replies and errors of the OpenAI chat protocol; requests are checked strictly."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from rlcs.errors import RlcsError, UserError

HARMLESS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
})  # fmt: skip
"""Keys that change no answer and are ignored. Other unknown keys are refused."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,), "length_penalty": (1,), "top_k": (-1,), "best_of": (1,),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],),
    "verbosity": ("medium",), "response_format": ({"type": "text"},),
}  # fmt: skip
"""Values of unsupported keys that change nothing and are accepted, beside zero and empty ones."""
WITH_VLLM = {
    "tools": "calling tools",
    "functions": "calling tools",
    "tool_choice": "calling tools",
    "response_format": "JSON mode",
}
"""Keys that a server with vLLM supports, and what they are for."""
STOP_CHARS = 256
MOST_VALUES = 100_000
"""Most values in a request, bounded by counting commas before parsing, which takes seconds for millions."""
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits on requests."""

    max_images: int = 8
    max_pixels: int = 25_000_000
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


class StreamOptions(_Strict):
    """What a stream holds besides the text."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """The body of `/v1/chat/completions`; keys that change nothing here are ignored."""

    messages: Annotated[list[Any], Field(min_length=1, max_length=512)]
    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def parse_request(body: bytes, limits: Limits, *, model: str) -> ChatRequest:
    """Read a request. Raises ApiError for one that is malformed, unsupported or over a limit."""
    if body.count(b",") > MOST_VALUES:
        raise ApiError(400, f"the request has more than {MOST_VALUES:,} values (or commas in its text)")
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the request is no JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the request is no JSON object")
    _require_supported(values)
    try:
        request = ChatRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Below `stop`, pydantic also names the branches of its union.
        keys = first["loc"][:1] if first["loc"][:1] == ("stop",) else first["loc"]
        param = ".".join(str(key)[:40] for key in keys) or None
        named = first["msg"].partition(" or instance of ")[0][:300]
        message = "a text or a list of texts" if param == "stop" else named
        raise ApiError(400, f"{param}: {message}" if param else message, param=param) from error
    if request.model is not None:
        require_model(request.model, model)
    if request.n > limits.max_n:
        raise ApiError(400, f"n is at most {limits.max_n}", param="n")
    if max(request.max_completion_tokens or 0, request.max_tokens or 0) > limits.max_tokens:
        what = f"max_tokens is at most {limits.max_tokens} on this server"
        raise ApiError(400, what, param="max_tokens")
    if len(request.stops) > 4 or not all(0 < len(stop) <= STOP_CHARS for stop in request.stops):
        raise ApiError(400, f"stop is up to 4 texts of 1 to {STOP_CHARS} characters", param="stop")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return request


def require_model(name: str, served: str) -> None:
    """Raises ApiError if a client names another model than the one that is served."""
    if name != served:
        what = f"there is no model {name[:100]!r} here, only {served!r}"
        raise ApiError(404, what, param="model", code="model_not_found")


def _require_supported(values: Json) -> None:
    """Raises ApiError for a key that is not known here, unless its value changes nothing."""
    for key in sorted(values.keys() - ChatRequest.model_fields.keys() - HARMLESS):
        if values[key] and values[key] not in NEUTRAL.get(key, ()):
            what = f"{key[:40]} is not supported"
            if key in WITH_VLLM:
                what = (
                    f"{key}: {WITH_VLLM[key]} needs vLLM (rlcs serve --engine vllm), this is the local engine"
                )
            raise ApiError(400, what, param=key[:40])


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


Spelling = tuple[str, bytes]
"""A token's name, and the bytes that it adds to the text: of a control token (the end of a turn) none."""


def token_logprob(token: Spelling, logprob: float, others: Sequence[tuple[Spelling, float]] = ()) -> Json:
    """One entry of `logprobs.content`, with the tokens that were most likely there (`top_logprobs`)."""
    return {
        **_logprob(token, logprob),
        "top_logprobs": [_logprob(other, its_logprob) for other, its_logprob in others],
    }


def _logprob(token: Spelling, logprob: float) -> Json:
    """A token: a part of a character, which is no text, is written by its bytes, as OpenAI does."""
    name, content = token
    try:
        text = content.decode() or name
    except UnicodeDecodeError:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
    return {"token": text, "logprob": logprob, "bytes": list(content)}
