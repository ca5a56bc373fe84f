"""Images of requests: reads `data:` URLs, and downloads from hosts that the operator has allowed.

A download connects only to addresses that were checked to be public, so that nobody can use a server to reach
its own network: not by a name that resolves there, by a redirect, or by another spelling of an address.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urlsplit

import httpcore
import httpx

from rlcs.data.values import decoded_base64
from rlcs.errors import UserError

DOWNLOAD_S = 20.0
"""Longest time for all images of a request."""
MAX_REDIRECTS = 3
MOST_ESCAPES = 1_000_000
"""Most `%` escapes of a data URL, which are decoded one by one."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_UNICAST = ipaddress.ip_network("2000::/3")
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)


class ImageUrlError(ValueError):
    """An image cannot be had from its URL; the message is for the client."""


def is_data_url(url: str) -> bool:
    """Whether a URL holds its content itself."""
    return url.lstrip()[:5].lower() == "data:"


def read_data_url(url: str) -> bytes:
    """Decode the content of a `data:` URL (RFC 2397): base64, or `%` escapes. Raises ImageUrlError.

    Base64 may have line breaks, the alphabet of URLs, and no padding. The media type does not matter: the
    content tells what it is.
    """
    head, comma, body = url.partition(",")
    if not comma:
        raise ImageUrlError("this data: URL has no comma before its content (data:image/png;base64,...)")
    if body.count("%") > MOST_ESCAPES:
        raise ImageUrlError(f"this data: URL has more than {MOST_ESCAPES:,} escapes; send it as base64")
    content = unquote_to_bytes(body)
    if "base64" not in (word.strip().lower() for word in head.split(";")[1:]):
        if content and "%" not in body:
            raise ImageUrlError("this data: URL is not base64 (data:image/png;base64,...)")
        return content
    try:
        return decoded_base64(content)
    except ValueError as error:
        raise ImageUrlError(f"broken base64: {error}") from error


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet; of no tunnel, and a mapped one by its IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        if not (inner := ip.ipv4_mapped or nat64):
            return ip in _UNICAST and ip.is_global and not (ip.sixtofour or ip.teredo)
        ip = inner
    return ip.is_global and not ip.is_multicast


class _PublicNetwork(httpcore.AnyIOBackend):
    """Opens connections to public addresses only: a name is resolved once, checked, and that address used."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """See httpcore's AsyncNetworkBackend. Raises ImageUrlError for a private address."""
        found = await asyncio.to_thread(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        public = [address for *_, (address, *_) in found if is_public(str(address))]
        if not public:
            raise ImageUrlError("this host has no public address")
        for address in public[:-1]:
            try:
                return await super().connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore.NetworkError, httpcore.TimeoutException):
                continue
        return await super().connect_tcp(str(public[-1]), port, timeout, local_address, socket_options)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageHosts:
    """The hosts from which images may be downloaded: `example.com`, `*.example.com`, `example.com:8080`, `*`.

    Ports are 80 and 443 where none is named.
    """

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError for what is no host."""
        for name in self.names:
            written = re.fullmatch(r"(?:\*|(?:\*\.)?[\w.-]+|\[[0-9a-fA-F:.]+\])(?::(\d{1,5}))?", name)
            if not written or int(written[1] or 1) not in range(1, 1 << 16):
                fix = "write a host alone: --image-host images.example.com, *.example.com, or *"
                raise UserError(f"{name[:80]!r} is no host", where="--image-host", fix=fix)

    def require(self, url: httpx.URL) -> None:
        """Raises ImageUrlError unless images may be downloaded from a URL."""
        if not self.names:
            what = (
                "this server downloads no images: send a data: URL (data:image/png;base64,...), or start the "
            )
            raise ImageUrlError(what + "server with --image-host HOST")
        if url.scheme not in _PORTS or not url.host or url.userinfo:
            raise ImageUrlError(
                "an image's address is http://HOST/... or https://HOST/..., without a password"
            )
        if not any(self._matches(name.lower(), url) for name in self.names):
            what = f"this server downloads no images from {url.netloc.decode()[:100]}"
            raise ImageUrlError(f"{what}: --image-host allows {', '.join(self.names)[:200]}")

    @staticmethod
    def _matches(name: str, url: httpx.URL) -> bool:
        parts = urlsplit(f"//{name}")
        host, standard = url.host.rstrip("."), _PORTS[url.scheme]
        if (url.port or standard) != (parts.port or standard):
            return False
        pattern = parts.hostname or ""
        return pattern == "*" or host == pattern or (pattern[:2] == "*." and host.endswith(pattern[1:]))


class ImageDownloader:
    """Downloads images from allowed hosts, without proxies, cookies or compression."""

    def __init__(self, hosts: ImageHosts) -> None:
        """Certificates are loaded once, if any host is allowed."""
        self.hosts = hosts
        self._tls = httpcore.default_ssl_context() if hosts.names else None

    async def download(self, address: str, *, limit: int) -> bytes:
        """Get at most `limit` bytes, following a few redirects to allowed hosts. Raises ImageUrlError."""
        network = _PublicNetwork()
        try:
            async with httpcore.AsyncConnectionPool(self._tls, network_backend=network) as pool:
                url = httpx.URL(address)
                for _ in range(MAX_REDIRECTS + 1):
                    self.hosts.require(url)
                    content = await self._get(pool, url, limit)
                    if isinstance(content, bytes):
                        return content
                    url = content
        except ImageUrlError:
            raise
        except (httpcore.NetworkError, httpcore.TimeoutException, OSError) as error:
            raise ImageUrlError("the image's host does not answer") from error
        except (httpcore.ProtocolError, httpx.InvalidURL, ValueError) as error:
            raise ImageUrlError("the image's host, or its address, is not understood") from error
        raise ImageUrlError(f"more than {MAX_REDIRECTS} redirects")

    async def _get(self, pool: httpcore.AsyncConnectionPool, url: httpx.URL, limit: int) -> bytes | httpx.URL:
        """The content, or where it has moved to."""
        target = httpcore.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path or b"/"
        )
        headers = [("Accept", "image/*"), ("Accept-Encoding", "identity"), ("User-Agent", "rlcs")]
        limits = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), DOWNLOAD_S)}
        async with pool.stream("GET", target, headers=headers, extensions=limits) as response:
            sent = {name.lower(): value for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in sent:
                return url.join(sent[b"location"].decode("latin-1"))
            if response.status != 200:
                raise ImageUrlError(f"the image's host answers with {response.status}")
            content = bytearray()
            async for chunk in response.aiter_stream():
                content += chunk
                if len(content) > limit:
                    raise ImageUrlError(
                        f"the image has more than {limit:,} bytes, all images of the request counted"
                    )
        return bytes(content)
