"""A chat-completions server on loopback that misbehaves as told: real sockets, no model.

`with LoopbackServer(answer=..., faults={"needle": ["500", "429"]}) as server:` and give `server.url` as base
URL. A request whose messages contain a needle gets that needle's faults one after the other, and from then on
the answer; `"always:500"` never ends. What was asked lies in `server.seen` (request bodies, in order).

Faults: an HTTP status (`429`, `500`, `503`, `400`, `401`, `404`), `retry-after` (429 with `Retry-After: 1`),
`cut` (the connection closes in the middle of the body), `hangup` (it closes before any byte), `not-json`,
`no-choices`, `empty` (an answer without text), `slow` (the answer after a minute), `length` (cut at the
limit), `quota` (429 with the code `insufficient_quota`), `filtered` (withheld).
"""

import asyncio
import json
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Self

PHRASES = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


def text_of(message: Mapping[str, Any]) -> str:
    """The text of one message, images left out."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def last_text(body: Mapping[str, Any]) -> str:
    """The text of the last message of a request."""
    return text_of(body["messages"][-1])


def _fixed_answer(body: Mapping[str, Any]) -> str:
    return "The answer is \\boxed{4}."


class LoopbackServer:
    """Serves in a thread of its own; a context manager."""

    def __init__(
        self,
        *,
        answer: Callable[[Mapping[str, Any]], str] = _fixed_answer,
        faults: Mapping[str, Sequence[str]] | None = None,
        delay_s: float = 0.0,
        finish_reason: str | None = "stop",
        echoes: bool = False,
        reply: Callable[[Mapping[str, Any]], object] | None = None,
    ) -> None:
        """Serve; with `echoes` errors and answers hold the headers of the request, and with them the key.

        `reply` makes whole replies instead, or awaits them: JSON, or text (a page, a stream), or a pair of a
        status and these; or bytes as they are, or a tuple of them with pauses between, before the
        connection closes.
        """
        self.seen: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.most_at_once = 0
        self.url = ""
        self._answer = answer
        self._faults = {needle: list(each) for needle, each in (faults or {}).items()}
        self._delay_s, self._echoes = delay_s, echoes
        self._finish_reason, self._reply = finish_reason, reply
        self._now = 0
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop, self._done = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._started.set()
        await self._done.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lengths = [
                    int(line.split(":")[1])
                    for line in head.split("\r\n")
                    if line.lower().startswith("content-length:")
                ]
                body = json.loads(await reader.readexactly(lengths[0])) if lengths else {}
                self.headers.append(head)
                self.seen.append(body)
                self._now += 1
                self.most_at_once = max(self.most_at_once, self._now)
                try:
                    keep = await self._respond(body, writer)
                finally:
                    self._now -= 1
                await writer.drain()
                if not keep:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _write_slowly(self, pieces: tuple[bytes, ...], writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.05)

    def _echo(self) -> str:
        """The headers of the last request, the key first: of a long message only the beginning is shown."""
        lines = self.headers[-1].split("\r\n")
        return "\r\n".join(sorted(lines, key=lambda line: not line.lower().startswith("authorization:")))

    def _fault(self, body: Mapping[str, Any]) -> str:
        text = "\n".join(map(text_of, body["messages"]))
        for needle, faults in self._faults.items():
            if needle in text and faults:
                return faults[0].removeprefix("always:") if "always" in faults[0] else faults.pop(0)
        return ""

    async def _respond(self, body: Mapping[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Write the response; False closes the connection."""
        if self._reply is not None:
            reply = self._reply(body)
            whole = _whole(await reply if isinstance(reply, Awaitable) else reply)
            if isinstance(whole, tuple):  # pieces, with pauses between
                await self._write_slowly(whole, writer)
                return False
            writer.write(whole)
            return not isinstance(reply, bytes)
        fault = self._fault(body)
        if fault == "hangup":
            return False
        if self._delay_s or fault == "slow":
            await asyncio.sleep(60 if fault == "slow" else self._delay_s)
        if fault.isdigit() or fault in ("retry-after", "quota"):
            status = int(fault) if fault.isdigit() else 429
            headers = "Retry-After: 1\r\n" if fault == "retry-after" else ""
            error = {"message": f"told to say {status}"}
            if self._echoes:
                error["message"] += f", by {self._echo()}"
            error |= {"code": "insufficient_quota"} if fault == "quota" else {}
            writer.write(_message(status, {"error": error}, headers))
            return True
        text = "" if fault == "empty" else self._answer(body)
        text += self._echo() if self._echoes else ""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": {"length": "length", "filtered": "content_filter"}.get(
                fault, self._finish_reason
            ),
        }
        usage = {"prompt_tokens": 10, "completion_tokens": len(text.split())}
        usage["total_tokens"] = sum(usage.values())
        reply: dict[str, Any] = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [] if fault == "no-choices" else [choice],
            "usage": usage,
        }
        data = _message(200, reply)
        if fault == "not-json":
            data = _message(200, None)
        if fault == "cut":
            writer.write(data[:-20])
            return False
        writer.write(data)
        return True


def _whole(reply: object) -> bytes | tuple[bytes, ...]:
    """A reply as `LoopbackServer` takes it: the content type follows from its beginning."""
    if isinstance(reply, bytes) or (isinstance(reply, tuple) and isinstance(reply[0], bytes)):
        return reply
    status, content = reply if isinstance(reply, tuple) else (200, reply)
    text = content if isinstance(content, str) else json.dumps(content)
    kinds = {"<": "text/html", "d": "text/event-stream", ":": "text/event-stream"}
    kind = (
        kinds.get(text.lstrip()[:1], "application/json") if isinstance(content, str) else "application/json"
    )
    data = text.encode()
    head = f"HTTP/1.1 {status} {PHRASES.get(status, 'Error')}\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def _message(status: int, reply: object, headers: str = "") -> bytes:
    body = b"<html>oops" if reply is None else json.dumps(reply).encode()
    head = (
        f"HTTP/1.1 {status} {PHRASES.get(status, 'Error')}\r\nContent-Type: application/json\r\n"
        f"{headers}Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


if __name__ == "__main__":  # a server in a process of its own, until standard input closes
    with LoopbackServer() as _server:
        sys.stdout.write(_server.url + "\n")
        sys.stdout.flush()
        sys.stdin.read()
