"""Reads the replies of servers with the OpenAI chat protocol: answers in all their forms, and failures.

A failure is one of three: it may pass (RetryableError), it is of this request (FinalError), or no request can
be answered (EndpointError).
"""

import html
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlcs.engines.stop_reasons import RETRYABLE, STOP_REASONS, TOOL_CALLS, plain, stop_reason
from rlcs.errors import EndpointError
from rlcs.recipe.sampling import Endpoint
from rlcs.records import Request, Sample, StopReason
from rlcs.redaction import redacted

_SHORT = 300  # characters of a server's message that are shown
_LONGEST = 10_000  # of it are looked at
_NAME = 60  # and of a name that a server gives, such as a finish reason
_DEEPEST = 50  # levels of values in values in a reply
NO_CHAT = "no chat server answers there"
_RETRYABLE_STATUS = frozenset({408, 409, 425, 429})  # and all of 5xx
_STATUS_OF_CODE = (
    (r"insufficient_quota|insufficient_balance|billing|arrearage|payment", 402),
    (r"rate_?limit|too_many_requests|resource_exhausted", 429),
    (r"api_?key|authenti|unauthori|permission", 401),
    (r"model_not_found|not_found", 404),
    (r"invalid|unsupported|context_length|content|bad_request|unprocessable", 400),
)
"""The HTTP status that an error's name stands for, where a server answers 200 with an error in it."""
_NO_CREDIT = re.compile(r"^(insufficient_quota|insufficient_balance|billing_.*|arrearage)$", re.IGNORECASE)
_TOO_LONG = re.compile(
    r"context[ _]?(length|window|size)|maximum (context|input|prompt)|max_model_len|prompt is too long"
    r"|too many (input )?tokens|token count|longer than the (maximum|model)|reduce the length"
    r"|max_tokens must be at least 1|exceeds? the (model|max\w* len)",
    re.IGNORECASE,
)
_CUT_OFF = re.compile(r"output limit was reached|could not finish the message", re.IGNORECASE)
_MODERATED = re.compile(
    r"content[ _]?(filter|management|policy|policies|violation)|responsible ?ai|data_?inspection|moderation"
    r"|inappropriate|safety (system|filter|polic)|\bflagged\b|prohibited content|sensitive content",
    re.IGNORECASE,
)
_THOUGHT = re.compile(r"think|reason", re.IGNORECASE)


class RetryableError(Exception):
    """A failure that may pass; `after_s` is the pause that the server requested, if any.

    `kind` says in a word or two what is counted. `unreachable` says what it means if it never passes: perhaps
    no chat server is there at all. `tokens` (prompt, answer) were paid.
    """

    def __init__(
        self,
        why: str,
        *,
        kind: str,
        after_s: float | None = None,
        unreachable: str = "",
        tokens: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(why)
        self.kind, self.after_s, self.unreachable, self.tokens = kind, after_s, unreachable, tokens


class PaidError(RetryableError):
    """A whole reply without a usable answer, which is paid; another may have one, and is paid too."""


class EmptyError(PaidError):
    """An empty answer; at temperature 0 another attempt mostly gives the same."""


class FinalError(Exception):
    """A failure of this one request that further attempts would repeat; it may have cost tokens."""

    def __init__(self, why: str, *, kind: str, tokens: tuple[int, int] = (0, 0)) -> None:
        super().__init__(why)
        self.kind, self.tokens = kind, tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What a server says about an error, in whatever form: bounded, on one line."""

    status: int
    message: str
    code: str = ""
    param: str = ""

    def __str__(self) -> str:
        """The status and the start of the message."""
        return f"HTTP {self.status}: {short(self.message)}"


def fault(status: int, body: object) -> Fault:
    """Read an error: OpenAI's, FastAPI's, Google's list, a proxy's page, that of a reply of HTTP 200."""
    if isinstance(body, list) and body:
        body = body[0]
    if isinstance(body, str):
        return Fault(status=status, message=_page(body) or body[:_LONGEST] or "no message")
    if not isinstance(body, dict):
        return Fault(status=status, message="no message")
    error = body.get("error") or body
    if isinstance(error, str):
        return Fault(status=status, message=error[:_LONGEST])
    error = error if isinstance(error, dict) else body
    named = [error.get(name) for name in ("code", "type", "status") if isinstance(error.get(name), str)]
    message = (
        error.get("message") or error.get("detail") or error.get("msg") or error.get("metadata") or error
    )
    details = error.get("metadata") or {}  # of OpenRouter: the message of the provider behind it
    raw = details.get("raw") if isinstance(details, dict) else None
    text = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
    text = f"{text}: {raw}" if isinstance(raw, str) else text
    return Fault(
        status=status,
        message=text[:_LONGEST],
        code=next((str(each) for each in named if not str(each).isdigit()), ""),
        param=str(error.get("param") or ""),
    )


def fault_in(reply: object) -> Fault | None:
    """The error in a reply that came with HTTP 200, as OpenRouter and other proxies send it."""
    if not isinstance(reply, dict):
        return None
    choices = reply.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(first, dict) and first.get("error"):
        reply = {"error": first["error"]}
    elif choices or not (reply.get("error") or reply.get("object") == "error"):
        return None
    found = fault(0, reply)
    inside = reply.get("error")
    error: Mapping[str, Any] = inside if isinstance(inside, dict) else reply
    status = str(error.get("code") or error.get("status") or "")
    if status.isdigit() and 400 <= int(status) < 600:
        return replace(found, status=int(status))
    words = f"{found.code} {error.get('type') or ''}"
    by_name = (number for pattern, number in _STATUS_OF_CODE if re.search(pattern, words, re.IGNORECASE))
    return replace(found, status=next(by_name, 500))


def failure(found: Fault, server: Endpoint, *, url: str, after_s: float | None = None) -> Exception:
    """The error for what a server says: it may pass, it fails this request, or it ends the run."""
    status, code, text = found.status, found.code, found.message
    if status == 402 or _NO_CREDIT.search(code):
        return EndpointError(f"the account has no credit left ({found})", where=url, fix="top it up")
    if status in _RETRYABLE_STATUS or status >= 500:
        return RetryableError(str(found), kind=f"HTTP {status}", after_s=after_s)
    if status == 413:
        fix = f"lower images.max_pixels, or raise the server's limit on requests ({found})"
        return FinalError(f"the request is too large for the server: {fix}", kind="HTTP 413")
    if _MODERATED.search(f"{code} {text}"):
        return FinalError(f"refused: the provider's moderation ({found})", kind="refused")
    if _TOO_LONG.search(f"{code} {text}"):
        return FinalError(
            f"question and longest answer are too long for the server ({found})", kind="too long"
        )
    if status in (401, 403):
        return _key_refused(found, server, url)
    if status in (404, 405, 410):
        fix = f"see {url.rstrip('/')}/models for the names; the URL mostly ends in /v1"
        what = f"there is no model {server.model!r}, or no chat server ({found})"
        return EndpointError(what, where=url, fix=fix)
    if "plain http request" in text.lower():
        return EndpointError("the server speaks HTTPS", where=url, fix="write https:// in the URL")
    return FinalError(str(found), kind=f"HTTP {status}")


def is_about_content(found: Fault) -> bool:
    """Whether a refusal is about what was asked, not about how."""
    return bool(_MODERATED.search(f"{found.code} {found.message}") or _TOO_LONG.search(found.message))


def is_cut_off(found: Fault) -> bool:
    """Whether a refusal means that the answer reached its limit: of OpenAI's models, while they think."""
    return bool(_CUT_OFF.search(found.message))


def _key_refused(found: Fault, server: Endpoint, url: str) -> EndpointError:
    state = "holds a key that is refused" if os.environ.get(server.key_env) else "is not set"
    fix = f"put the server's key into the environment variable {server.key_env}, which {state}"
    return EndpointError(f"the server refuses the key ({found})", where=url, fix=fix)


def read(request: Request, reply: object) -> Sample:
    """Read a reply. Raises RetryableError if it is garbled or broken off, FinalError if it is withheld."""
    reply = reply if isinstance(reply, dict) else {}
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        text, thoughts, refusal = _parts(message.get("content"))
        finish = _finish(choice)
        reasoning = thoughts or _reasoning(message)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        what = f"the reply is no chat completion{_written(reply)}"
        raise PaidError(what, kind="garbled", unreachable=NO_CHAT, tokens=_tokens(reply)) from error
    tokens = _tokens(reply)
    stop = stop_reason(finish)
    if finish in RETRYABLE:
        what, kind = f"the server broke the answer off ({finish})", f"broken off ({finish})"
        raise RetryableError(what, kind=kind, tokens=tokens)
    if stop is StopReason.ERROR:
        raise FinalError(f"refused: the server withheld the answer ({finish})", kind="refused", tokens=tokens)
    if not text.strip():
        refusal = refusal or _text(message.get("refusal"))
        if refusal:
            raise FinalError(f"refused: {short(refusal)}", kind="refused", tokens=tokens)
        if finish in TOOL_CALLS or _calls_tool(message):
            raise FinalError("the model called a tool instead of answering", kind="tool call", tokens=tokens)
        if stop is StopReason.EOS and reasoning.strip():  # a server's parser found no end of the reasoning
            text, reasoning = reasoning, ""
        elif stop is StopReason.EOS or finish not in STOP_REASONS:
            raise EmptyError("the answer is empty", kind="empty", tokens=tokens)
    if stop is StopReason.EOS and _calls_tool(message):  # what was written before is no finished answer
        stop = StopReason.LENGTH
    text, reasoning = _whole(text), _whole(reasoning)
    return request.sample(
        text=text, stop=stop, reasoning=reasoning, prompt_tokens=tokens[0], tokens=tokens[1]
    )


def _calls_tool(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    kinds = {str(part.get("type")) for part in parts if isinstance(part, dict)}
    return bool(message.get("tool_calls") or message.get("function_call") or TOOL_CALLS & kinds)


def _whole(text: str) -> str:
    """The text with U+FFFD for halves of characters, which no tokeniser reads."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _written(reply: object) -> str:
    """What a reply says that is no chat completion, such as the error of a server with its own format."""
    if not reply or not isinstance(reply, dict) or reply.get("choices"):
        return ""
    return f": {short(json.dumps(reply, ensure_ascii=False))}"


def unknown_finish(reply: object) -> str | None:
    """The finish reason of a reply that the table does not know; "" for none at all, None for a known one."""
    try:
        choice = reply["choices"][0]  # type: ignore[index]  # what is not there raises
        finish = _finish(choice)
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    if finish in STOP_REASONS or not finish:
        return None if finish else ""
    return short(str(choice.get("finish_reason") or choice.get("stop_reason") or finish))[:_NAME]


def _finish(choice: Mapping[str, Any]) -> str:
    """The finish reason; of a proxy's and its provider's, the one by which the answer is not whole."""
    own, native = plain(choice.get("finish_reason")), plain(choice.get("native_finish_reason"))
    if not own and isinstance(choice.get("stop_reason"), str):  # of proxies before Anthropic
        own = plain(choice["stop_reason"])
    if native in STOP_REASONS and (own not in STOP_REASONS or stop_reason(own) is StopReason.EOS):
        return native
    return own


def _parts(content: object) -> tuple[str, str, str]:
    """Text, reasoning and refusal of a message's content, which may be a list of parts."""
    if content is None or isinstance(content, str):
        return content or "", "", ""
    if isinstance(content, dict):  # one part, or Google's {"parts": [...]}
        content = content.get("parts") or [content]
    if not isinstance(content, list):
        raise TypeError(f"content is a {type(content).__name__}")
    text, thoughts, refusals = [], [], []
    for part in (part for part in content if part is not None):
        kind = "text" if isinstance(part, str) else str(part.get("type") or "text").lower()
        if kind == "refusal":
            refusals.append(_text(part))
        elif _THOUGHT.search(kind):
            thoughts.append(_text(part))
        elif kind in ("text", "output_text"):
            text.append(_text(part))
    return "".join(text), "\n".join(thoughts), "".join(refusals)


def _reasoning(message: Mapping[str, Any]) -> str:
    names = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks")
    return next((text for name in names if (text := _text(message.get(name)))), "")


def _text(value: object) -> str:
    """All text in a value: a text, a part that holds one, or a list of these."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "".join(map(_text, value))
    if isinstance(value, Mapping):
        names = ("text", "thinking", "summary", "content", "refusal", "reasoning", "value")
        return next((text for name in names if (text := _text(value.get(name)))), "")
    return ""


def _tokens(reply: Mapping[str, Any]) -> tuple[int, int]:
    """The tokens of prompt and answer that a reply says it took."""
    usage = reply.get("usage")
    return _count(usage, "prompt", "input"), _count(usage, "completion", "output")


def _count(usage: object, *names: str) -> int:
    """A number of tokens in the usage, which may be missing or damaged."""
    values = [usage.get(f"{name}_tokens") for name in names] if isinstance(usage, dict) else []
    return next((int(value) for value in values if isinstance(value, int | float) and 0 <= value < 1e12), 0)


def parsed(body: bytes) -> object:
    """The JSON of a reply, whatever its content type says; events of a stream are put together.

    Raises PaidError.
    """
    text = redacted(
        body.decode("utf-8-sig", "replace")
    )  # where a character is damaged, the answer is still paid
    start = text.lstrip()[:200]
    if start.startswith(("data:", "event:", ":", "id:", "retry:")):
        return _joined(_events(text))
    if title := _page(text):
        raise PaidError(f"the reply is no chat completion but {title}", kind="a page", unreachable=NO_CHAT)
    try:
        return _json(text)
    except ValueError as error:
        why = short(text) or "it is empty"
        why = f"{error}: {why}" if start.startswith("{") else why
        raise PaidError(
            f"the reply is no chat completion: {why}", kind="garbled", unreachable=NO_CHAT
        ) from error


def error_body(text: str) -> object:
    """The body of an HTTP error: JSON or text."""
    text = redacted(text)
    try:
        return _json(text)
    except ValueError:
        return text


def _json(text: str) -> object:
    """Parse JSON of bounded depth. Raises ValueError."""
    try:
        value: object = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(_DEEPEST):
        inner = (
            each.values() if isinstance(each, dict) else each
            for each in level
            if isinstance(each, dict | list)
        )
        if not (level := [each for values in inner for each in values]):
            return value
    raise ValueError("nested too deeply")


def _events(text: str) -> Iterator[Mapping[str, Any]]:
    """The chunks of an answer that a server streams although nobody asked it to."""
    for line in text.splitlines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            try:
                chunk = _json(data)
            except ValueError as error:
                raise PaidError("the reply is a damaged stream", kind="garbled") from error
            if isinstance(chunk, dict):
                yield chunk


def _joined(chunks: Iterator[Mapping[str, Any]]) -> dict[str, Any]:
    """One reply from the chunks of a stream."""
    content: list[object] = []
    rest: dict[str, list[object]] = {}
    choice: dict[str, Any] = {}
    reply: dict[str, Any] = {}
    for chunk in chunks:
        if chunk.get("error"):
            return {"error": chunk["error"]}
        reply |= {"usage": chunk["usage"]} if chunk.get("usage") else {}
        choices = chunk.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else {}
        for part in [first] if isinstance(first, dict) and not first.get("index") else []:
            delta = part.get("delta") or part.get("message")
            delta = delta if isinstance(delta, dict) else {}
            piece = delta.get("content")
            content += piece if isinstance(piece, list) else [piece] if piece else []
            for name, value in delta.items():
                if value and name not in ("content", "role"):
                    rest.setdefault(name, []).append(value)
            ends = ("finish_reason", "native_finish_reason", "stop_reason")
            choice |= {name: part[name] for name in ends if part.get(name)}
    choice["message"] = {"content": content, **rest}
    return {**reply, "choices": [choice]} if content or rest or len(choice) > 1 else {}


def _page(text: str) -> str:
    """An HTML page in a few words, or ""."""
    if not re.match(
        r"\s*(<!--.*?-->\s*)*<(!doctype|html|head|title|body|h1|center|\?xml)", text, re.I | re.S
    ):
        return ""
    found = re.search(r"<(title|h1)[^>]*>(.*?)</\1", text, re.IGNORECASE | re.DOTALL)
    title = short(html.unescape(re.sub(r"<[^>]+>", " ", found[2]))) if found else ""
    return f"a web page, {title!r}" if title else "a web page"


def short(text: str) -> str:
    """The start of a text, on one line."""
    flat = " ".join(redacted(text)[: 20 * _SHORT].split())
    flat = "".join(char if char.isprintable() else "\ufffd" for char in flat)
    return flat if len(flat) <= _SHORT else flat[: _SHORT - 1] + "\u2026"
