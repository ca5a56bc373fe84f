"""Reads the `messages` of a request into turns, and names exactly what is wrong with one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlcs.serving.image_sources import ImageUrlError, is_data_url, read_data_url
from rlcs.serving.protocol import ApiError

_ROLES = ("system", "developer", "user", "assistant")
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""The key of the text, by the type of a part; the last two are what clients send back of an answer."""
_IMAGES = ("image_url", "input_image")
_OF_TOOLS = "tools need vLLM: rlcs serve --engine vllm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An image of a request: its content, or the address from which to download it; `where` it was named."""

    where: str
    address: str = ""
    data: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestTurn:
    """One turn of a request."""

    role: str
    parts: tuple[str | Picture, ...]


def wrong(where: str, what: str, *, code: str | None = None) -> ApiError:
    """The error for the field `where`, as in `messages.0.content.1.image_url`."""
    return ApiError(400, f"{where}: {what}", param=where, code=code)


def read_turns(messages: Sequence[Any], *, max_images: int) -> list[RequestTurn]:
    """Read the messages of a request. Raises ApiError."""
    turns = [_turn(message, f"messages.{number}") for number, message in enumerate(messages)]
    images = sum(isinstance(part, Picture) for turn in turns for part in turn.parts)
    if images > max_images:
        what = f"{images} images are more than the {max_images} that this server takes"
        raise ApiError(400, what, param="messages")
    return turns


def _turn(message: Any, where: str) -> RequestTurn:
    if not isinstance(message, dict):
        raise wrong(where, f"a message is an object with role and content, not {_kind(message)}")
    role, content = message.get("role"), message.get("content")
    if role in ("tool", "function"):
        raise wrong(f"{where}.role", _OF_TOOLS)
    if role not in _ROLES:
        what = "missing" if role is None else f"{str(role)[:40]!r} is no role"
        raise wrong(f"{where}.role", f"{what}; known: {', '.join(_ROLES)}")
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise wrong(f"{where}.{key}", _OF_TOOLS)
    where += ".content"
    if isinstance(content, str):
        return RequestTurn(role=role, parts=(content,))
    if not isinstance(content, list) or not content:
        kind = "an empty list" if content == [] else _kind(content)
        raise wrong(where, f"content is a text or a list of parts, not {kind}")
    parts = tuple(_part(part, f"{where}.{number}") for number, part in enumerate(content))
    if role != "user":
        for part in parts:
            if isinstance(part, Picture):
                raise wrong(part.where, f"images belong to turns of the user, not of {role}")
    return RequestTurn(role=role, parts=parts)


def _part(part: Any, where: str) -> str | Picture:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise wrong(where, f"a part is an object with a type, not {_kind(part)}")
    kind = part.get("type")
    if kind in _IMAGES:
        return _picture(part.get("image_url"), f"{where}.image_url")
    if not isinstance(kind, str) or kind not in _TEXTS:
        what = "missing" if kind is None else f"{str(kind)[:40]!r} is not supported"
        raise wrong(f"{where}.type", f"{what}; a part is of type text or image_url")
    text = part.get(_TEXTS[kind])
    if not isinstance(text, str):
        raise wrong(f"{where}.{_TEXTS[kind]}", f"a text, not {_kind(text)}")
    return text


def _picture(image: Any, where: str) -> Picture:
    """Read an image, given as `{"url": ...}` or as the URL itself."""
    url, at = (image.get("url"), f"{where}.url") if isinstance(image, dict) else (image, where)
    if not isinstance(url, str):
        raise wrong(
            at, f'an image is {{"url": "data:image/png;base64,..."}} or the URL itself, not {_kind(url)}'
        )
    if not is_data_url(url):
        return Picture(where=where, address=url.strip())
    try:
        return Picture(where=where, data=read_data_url(url))
    except ImageUrlError as error:
        raise wrong(where, str(error), code="invalid_image_url") from error


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list"}
    return "nothing (null, or left out)" if value is None else kinds.get(type(value), "an object")
