"""Connects to a server of the recipe: its address, its key, its headers, the proxy in between.

Errors in them are reported before anything is sent. A server is not trusted: redirects stay at its address,
and replies are bounded, also when they are compressed.
"""

import ipaddress
import os
import re
import ssl
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from rlcs.errors import EndpointError
from rlcs.recipe.sampling import FROM_ENVIRONMENT, Endpoint
from rlcs.redaction import DECLARED, cleaned, is_key, shown

if TYPE_CHECKING:
    import openai

LARGEST_REPLY = 16 << 20
"""Most bytes of a reply, unpacked: a million tokens of text with their reasoning are smaller."""
_MOST_REDIRECTS = 3
_KNOWN_PORTS = {"http": 80, "https": 443}
_ENDING = re.compile(r"/(chat/)?completions/*$", re.IGNORECASE)
_EXAMPLE = "write it out, like http://localhost:8000/v1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a server is: `url` without query, user and password, which can be shown."""

    url: str
    scheme: str
    host: str
    query: tuple[tuple[str, str], ...] = ()


def address(base_url: str) -> Address:
    """Read an address as people write it: capitals, quotes, the path of a request. Raises EndpointError."""
    text = base_url.strip().strip("\"'").strip()
    seen = shown(text).partition("?")[0][:200] or "base URL"
    try:
        parts = urlsplit(text)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        fix = "a port is a number up to 65535, and an IPv6 address stands in brackets: http://[::1]:8000/v1"
        raise EndpointError(f"this is not the URL of a server ({error})", where=seen, fix=fix) from error
    if parts.scheme not in ("http", "https"):
        raise EndpointError("this is not the URL of a server", where=seen, fix=_EXAMPLE)
    if not host or re.search(r"[\s\x00-\x1f\x7f\\<>\"{}|^`]", text) or not _is_host(host):
        raise EndpointError("this URL names no server", where=seen, fix=_EXAMPLE)
    if port == 0:
        raise EndpointError("no server has port 0", where=seen, fix=_EXAMPLE)
    name = f"[{host}]" if ":" in host else host
    path = _ENDING.sub("", parts.path).rstrip("/")
    url = f"{parts.scheme}://{name}{f':{port}' if port else ''}{path}"
    return Address(url=url, scheme=parts.scheme, host=host, query=tuple(parse_qsl(parts.query)))


def _is_host(host: str) -> bool:
    """Whether a name can be looked up: labels of 1 to 63 characters."""
    try:
        host.rstrip(".").encode("idna")
    except UnicodeError:
        return False
    return True


def key(server: Endpoint) -> str:
    """The server's key as it is sent: without the line break, quotes or `Bearer` that came with it; or "".

    Raises EndpointError, without the key, for one that no header can hold, and for a variable that is not
    named as a key.
    """
    value = _value(server.key_env, server.key("key_env")) if server.key_env else ""
    return _sendable(cleaned(value), f"environment variable {server.key_env}")


def _value(variable: str, where: str) -> str:
    """The value of a variable that may be sent. Raises EndpointError for one that is not named as a key."""
    if not is_key(variable):
        what = f"the variable {variable} is not named as the key of a model server, so it is not sent to one"
        fix = f"give it a name that ends in _API_KEY, or allow it yourself: export {DECLARED}={variable}"
        raise EndpointError(what, where=where, fix=fix)
    return os.environ.get(variable, "").strip()


def headers(server: Endpoint) -> dict[str, str]:
    """The further headers of the recipe, with the values of environment variables. Raises EndpointError."""
    found = {}
    for name, value in server.request.headers.items():
        where = f"{server.key('request.headers')}, {name}"
        if value.startswith(FROM_ENVIRONMENT):
            variable = value.removeprefix(FROM_ENVIRONMENT)
            if not (value := _value(variable, where)):
                raise EndpointError(f"{variable} is not set", where=where, fix=f"export {variable}=...")
        found[name] = _sendable(value, where)
    return found


def _sendable(value: str, where: str) -> str:
    if value.isascii() and (value.isprintable() or not value):
        return value
    what = "a line break or a control character" if value.isascii() else "a character that is not ASCII"
    raise EndpointError(f"the value holds {what} inside", where=where, fix="copy it again, on one line")


def connect(server: Endpoint, place: Address, limits: "openai.Timeout") -> "openai.AsyncOpenAI":
    """Make the client for an event loop; nothing is sent yet. Raises EndpointError."""
    import openai

    stays = _stays(place)

    async def check(request: Any) -> None:
        stays(request)

    async def bound(response: Any) -> None:
        _bound(response)

    hooks = {"request": [check], "response": [bound]}
    transport = _transport(openai.DefaultAsyncHttpxClient, place, limits, hooks)
    with _usable(place):
        return openai.AsyncOpenAI(http_client=transport, timeout=limits, **_settings(server, place))


def connect_blocking(server: Endpoint, place: Address, limits: "openai.Timeout") -> "openai.OpenAI":
    """Make the client for plain calls; nothing is sent yet. Raises EndpointError."""
    import openai

    hooks = {"request": [_stays(place)], "response": [_bound]}
    transport = _transport(openai.DefaultHttpxClient, place, limits, hooks)
    with _usable(place):
        return openai.OpenAI(http_client=transport, timeout=limits, **_settings(server, place))


@contextmanager
def _usable(place: Address) -> Iterator[None]:
    """Turn the client's own verdict on an address, such as 256.0.0.1, into EndpointError."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "InvalidURL":  # of the HTTP library that the client chooses
            raise
        raise EndpointError("this URL names no server", where=place.url[:200], fix=_EXAMPLE) from error


def _settings(server: Endpoint, place: Address) -> dict[str, Any]:
    return {
        "base_url": place.url,
        "api_key": key(server) or "none",
        "max_retries": 0,  # the callers retry, after more kinds of failures than the client does
        "organization": _from_environment("OPENAI_ORG_ID"),
        "project": _from_environment("OPENAI_PROJECT_ID"),
        "default_headers": headers(server),
        "default_query": dict(place.query),
    }


def _from_environment(name: str) -> str | None:
    """A variable that the client sends as a header, if it is set. Raises EndpointError."""
    return _sendable(os.environ.get(name, "").strip(), f"environment variable {name}") or None


def _stays(place: Address) -> Callable[[Any], None]:
    """A check of requests: EndpointError where a redirect leads to another server or loses the content."""
    first: list[tuple[str, str, int | None]] = []

    def check(request: Any) -> None:
        url = request.url
        origin = (url.scheme, url.host, url.port or _KNOWN_PORTS.get(url.scheme))
        if not first:
            first.append(origin)
        lost = request.method == "GET" and url.path.endswith("/chat/completions")
        if origin == first[0] and not lost:
            return
        to = shown(f"{url.scheme}://{url.netloc.decode()}{_ENDING.sub('', url.path)}")[:200]
        what = f"the server sends requests on to {to}; the key and the questions do not follow"
        raise EndpointError(what, where=place.url, fix="if you trust it, write that address as base_url")

    return check


class UnreadableReply(Exception):
    """A reply that is larger than LARGEST_REPLY, or compressed in a way that cannot be read."""


class _Unpacker:
    """Unpacks and counts the bytes of one reply. Raises UnreadableReply."""

    def __init__(self, encoding: str) -> None:
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise UnreadableReply(f"the reply is packed by {encoding[:20]!r}, which nobody asked for")
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding not in ("", "identity") else None
        self._left = LARGEST_REPLY

    def read(self, data: bytes) -> bytes:
        """Unpack a part."""
        try:
            data = self._zlib.decompress(data, self._left + 1) if self._zlib else data
        except zlib.error as error:
            raise UnreadableReply(f"the reply is damaged ({error})") from error
        self._left -= len(data)
        if self._left < 0:
            raise UnreadableReply(f"the reply is larger than {LARGEST_REPLY:,} bytes")
        return data


def _bound(response: Any) -> None:
    """Let a reply be read through an `_Unpacker`; it has not been read yet."""
    library = import_module(type(response).__module__.partition(".")[0])  # that the client chooses
    encoding = response.headers.pop("content-encoding", "").strip().lower()
    stream, unpacker = response.stream, _Unpacker(encoding)

    class Bounded(library.SyncByteStream):  # type: ignore[misc, name-defined]
        def __iter__(self) -> Iterator[bytes]:
            return map(unpacker.read, stream)

        def close(self) -> None:
            stream.close()

    class BoundedAsync(library.AsyncByteStream):  # type: ignore[misc, name-defined]
        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for data in stream:
                yield unpacker.read(data)

        async def aclose(self) -> None:
            await stream.aclose()

    response.stream = (BoundedAsync if hasattr(stream, "__aiter__") else Bounded)()


def _transport(
    kind: Callable[..., Any], place: Address, limits: "openai.Timeout", hooks: Mapping[str, Any]
) -> Any:
    """The HTTP client, with the proxy that the environment names for this one host.

    It is chosen here: the client would prepare all proxies of the environment, also those that do not concern
    this host, and end with an ImportError for the first SOCKS proxy.
    """
    proxy, variable = _proxy(place)
    options: dict[str, Any] = {"proxy": proxy} if proxy else {}
    options |= {"verify": own} if (own := _own_certificates()) else {}
    options |= {"max_redirects": _MOST_REDIRECTS, "headers": {"Accept-Encoding": "gzip, deflate"}}
    try:
        return kind(trust_env=False, timeout=limits, event_hooks=hooks, **options)
    except ImportError as error:
        fix = f"pip install socksio, or add the server to NO_PROXY={place.host}, or unset {variable}"
        raise EndpointError("SOCKS proxies need the package socksio", where=variable, fix=fix) from error


def _own_certificates() -> ssl.SSLContext | None:
    """The certificates that the environment names; None: the client's. Raises EndpointError."""
    file, folder = os.environ.get("SSL_CERT_FILE") or None, os.environ.get("SSL_CERT_DIR") or None
    if not file and not folder:
        return None
    try:
        return ssl.create_default_context(cafile=file, capath=folder)
    except (OSError, ssl.SSLError) as error:
        where, fix = "SSL_CERT_FILE", "name a file with certificates in PEM format, or unset it"
        raise EndpointError(f"it cannot be read ({error})", where=where, fix=fix) from error


def _proxy(place: Address) -> tuple[str | None, str]:
    """The proxy of the environment for a server, and the variable that names it. Raises EndpointError."""
    known = getproxies_environment()
    scheme = place.scheme if known.get(place.scheme) else "all"
    url, variable = known.get(scheme, "").strip(), f"{scheme.upper()}_PROXY"
    if not url or _needs_no_proxy(place.host, known.get("no", "")):
        return None, ""
    url = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(url)
        usable = parts.hostname and _is_host(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.scheme not in ("http", "https", "socks5", "socks5h"):
        raise EndpointError("this is not the URL of a proxy", where=variable, fix=_proxy_fix(place))
    return url, variable


def _needs_no_proxy(host: str, exceptions: str) -> bool:
    """Whether NO_PROXY covers a host: by its name, its domain, its address or a network like 10.0.0.0/8."""
    if proxy_bypass(host):
        return True
    try:
        number = ipaddress.ip_address(host)
        networks = [
            ipaddress.ip_network(word.strip(), strict=False) for word in exceptions.split(",") if "/" in word
        ]
    except ValueError:
        return False
    return any(number in network for network in networks)


def _proxy_fix(place: Address) -> str:
    return f"write it like http://proxy.example.org:3128, or unset it, or set NO_PROXY={place.host}"


def proxy_note(place: Address) -> str:
    """A note for messages: the variable of the proxy through which a server is reached, or ""."""
    return f", through the proxy of {variable}" if (variable := _proxy(place)[1]) else ""


def untrusted(error: BaseException, place: Address) -> EndpointError | None:
    """The error of a server whose certificate is not trusted, or that speaks no TLS; None for any other.

    A redirect that is not followed is one of these too.
    """
    for raised in (error, error.__cause__):
        if isinstance(raised, EndpointError):
            return raised
        if type(raised).__name__ == "TooManyRedirects":  # of the HTTP library that the client chooses
            fix = "correct base_url, or see the server's settings"
            return EndpointError("the server redirects in a circle", where=place.url, fix=fix)
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, ssl.SSLError):
        seen = seen.__cause__ or seen.__context__
    if seen is None:
        return None
    if isinstance(seen, ssl.SSLCertVerificationError):
        what = f"its certificate is not trusted ({seen.verify_message})"
        fix = "put the certificate, or that of its authority, into a PEM file and set SSL_CERT_FILE to it"
        return EndpointError(what, where=place.url, fix=fix)
    if seen.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return EndpointError("it speaks no TLS", where=place.url, fix="write http:// instead of https://")
    return None
