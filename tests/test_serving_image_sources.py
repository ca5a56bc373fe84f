"""Images by URL: what `data:` URLs people send, and what a server downloads for whom."""

import asyncio
import base64
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import openai
import pytest

from bench.hostile import picture, serving
from rlcs.errors import UserError
from rlcs.serving import image_sources
from rlcs.serving.image_sources import (
    ImageDownloader,
    ImageHosts,
    ImageUrlError,
    is_data_url,
    is_public,
    read_data_url,
)

PNG = picture(28, 28)
TEXT = base64.b64encode(PNG).decode()
URL_SAFE = base64.urlsafe_b64encode(PNG).decode()
LINES = "\r\n".join(TEXT[start : start + 76] for start in range(0, len(TEXT), 76))


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{TEXT}",
        f"data:image/png;base64,{TEXT}\n",
        f"data:image/png;base64,\n{LINES}\n",
        f"data:image/png;base64, {TEXT[:40]} {TEXT[40:]}",
        f"DATA:IMAGE/PNG;BASE64,{TEXT}",
        f"data:image/png;charset=utf-8;base64,{TEXT}",
        f"data:image/png;name=a.png; base64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:application/octet-stream;base64,{TEXT}",
        f"data:image/png;base64,{TEXT.rstrip('=')}",
        f"data:image/png;base64,{URL_SAFE}",
        f"data:image/png;base64,{quote(TEXT, safe='')}",
        f"data:image/png;base64,{LINES.replace(chr(13) + chr(10), '%0D%0A')}",
        f"data:image/png,{quote(PNG, safe='')}",
    ],
)
def test_data_urls_are_read_as_mime_and_people_write_them(url):
    assert is_data_url(url) and read_data_url(url) == PNG


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png,iVBORw0", "not base64"),
        ("data:image/png;base64,i!VBO", "broken base64"),
        ("data:image/png;base64,abcd=efg", "broken base64"),
        ("data:image/png;base64,abcde", "broken base64"),
        ("data:image/png;base64,äöü=", "broken base64"),
        ("data:image/png," + "%41" * 1_000_001, "more than 1,000,000 escapes"),
    ],
)
def test_what_is_no_data_url_says_why(url, says):
    with pytest.raises(ImageUrlError, match=says):
        read_data_url(url)


def test_a_data_url_of_spaces_or_megabytes_takes_no_time():
    began = time.monotonic()
    read_data_url("data:;base64," + "A " * 8_000_000)
    read_data_url("data:;base64," + "A" * 32_000_000)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("::ffff:93.184.215.14", True),
        ("64:ff9b::5db8:d70e", True),
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("0.0.0.0", False),  # noqa: S104
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:a9fe:a9fe", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:5db8:d70e::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
    ],
)
def test_only_addresses_of_the_internet_are_public(address, public):
    assert is_public(address) is public


def get(url, *names, limit=1 << 20):
    return asyncio.run(ImageDownloader(ImageHosts(names=names)).download(url, limit=limit))


@pytest.mark.fault("server", "images at private addresses, in every spelling", "not connected to")
@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f.1",
        "017700000001",
        "127.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
    ],
)
def test_no_spelling_of_a_private_address_is_connected_to(host):
    """Even where every host is allowed."""
    with socket.create_server(("127.0.0.1", 0)) as inside:
        inside.settimeout(0.2)
        with pytest.raises(ImageUrlError, match=r"no public address|does not answer"):
            get(f"http://{host}:{inside.getsockname()[1]}/a.png", f"*:{inside.getsockname()[1]}")
        with pytest.raises(TimeoutError):
            inside.accept()


@pytest.mark.parametrize(
    ("names", "url", "says"),
    [
        ((), "https://example.com/a.png", "--image-host"),
        ((), "file:///etc/passwd", "--image-host"),
        (("example.com",), "https://example.org/a.png", "example.org: --image-host allows example.com"),
        (("example.com",), "https://www.example.com/a.png", "downloads no images from"),
        (("example.com",), "https://example.com.evil.org/a.png", "downloads no images from"),
        (("example.com",), "https://evil.org/example.com", "downloads no images from"),
        (("example.com",), "https://example.com:8443/a.png", "example.com:8443"),
        (("example.com",), "http://example.com:443/a.png", "downloads no images from"),
        (("example.com",), "https://example.com@evil.org/a.png", "without a password"),
        (("*",), "https://user:secret@example.com/a.png", "without a password"),
        (("*.example.com",), "https://example.com/a.png", "downloads no images from"),
        (("*.example.com",), "https://badexample.com/a.png", "downloads no images from"),
        (("*",), "ftp://example.com/a.png", "http://HOST"),
        (("*",), "file:///etc/passwd", "http://HOST"),
        (("*",), "/etc/passwd", "http://HOST"),
        (("*",), "https:///a.png", "http://HOST"),
        (("*",), "http://[::1/a.png", "not understood"),
        (("*",), "http://exa mple/a\x00", "not understood|does not answer"),
        (("*",), "", "http://HOST"),
    ],
)
def test_what_is_not_allowed_is_not_looked_up(monkeypatch, names, url, says):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("it was looked up"))
    with pytest.raises(ImageUrlError, match=says) as caught:
        get(url, *names)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["https://example.com", "example.com/a", "", "a b", "example.com:0", "example.com:99999", "*.*"]
)
def test_what_is_no_host_is_told_at_the_start(name):
    with pytest.raises(UserError, match="--image-host"):
        ImageHosts(names=(name,))


class Pictures(BaseHTTPRequestHandler):
    """Serves a picture, and all that hosts may do instead."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Host"]))
        kind = self.path.split("?")[0]
        port = self.server.server_port
        moves = {
            "/moved": "/a.png",
            "/round": "/round",
            "/elsewhere": f"http://evil.test:{port}/a.png",
            "/inside": f"http://inside.test:{port}/a.png",
            "/file": "file:///etc/passwd",
        }
        if kind in moves:
            self.send_response(302)
            self.send_header("Location", moves[kind])
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif kind == "/none":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            if kind == "/slow":
                while not self.server.over.wait(0.1):
                    self.wfile.write(b"x")
            elif kind == "/endless":
                while not self.server.over.is_set():
                    self.wfile.write(bytes(1 << 16))
            else:
                self.wfile.write(b"<html>" if kind == "/page" else PNG)


@pytest.fixture
def pictures():
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as server:
        server.seen, server.over = [], threading.Event()
        server.handle_error = lambda *_: None  # who hangs up is right
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


NAMES = {"pictures.test": "127.0.0.1", "evil.test": "127.0.0.1", "inside.test": "10.0.0.1"}
"""As the resolver of these tests has it; 127.0.0.1 passes for public."""


def test_pictures_are_downloaded_within_limits(monkeypatch, pictures):
    lookups = []

    def resolve(host, port, *_, **__):
        lookups.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (NAMES[host.rstrip(".")], port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(image_sources, "is_public", lambda address: address == "127.0.0.1")
    site, allowed = f"http://pictures.test:{pictures.server_port}", f"pictures.test:{pictures.server_port}"
    inside = f"inside.test:{pictures.server_port}"
    assert get(f"{site}/a.png?size=1#part", allowed) == PNG
    assert pictures.seen == [("/a.png?size=1", allowed)]
    assert lookups == ["pictures.test"], "looked up once, so that no second answer counts"
    assert get(f"{site}/moved".replace("pictures.test", "PICTURES.test."), allowed) == PNG
    for path, says in (
        ("/elsewhere", "no images from evil.test"),
        ("/inside", "no public address"),
        ("/file", "http://HOST"),
        ("/round", "more than 3 redirects"),
        ("/none", "answers with 404"),
        ("/endless", "more than 1,048,576 bytes"),
    ):
        with pytest.raises(ImageUrlError, match=says):
            get(f"{site}{path}", allowed, inside)


SETUP = f"""
import socket
from rlcs.serving import image_sources, server
def resolve(host, port, *_, **__):
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ({NAMES!r}[host], port))]
socket.getaddrinfo = resolve
image_sources.is_public = lambda address: address == "127.0.0.1"
server.DOWNLOAD_S = 2
"""


def test_a_server_downloads_what_its_operator_allows(random_model_folder, pictures):
    site = f"http://pictures.test:{pictures.server_port}"
    hosts = ["--image-host", "example.com", "--image-host", f"pictures.test:{pictures.server_port}"]
    with serving(random_model_folder, *hosts, "--max-body-bytes", "100000", setup=SETUP) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)

        def ask(*urls):
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}, *parts]}]
            return client.chat.completions.create(model="m", messages=messages, temperature=0, max_tokens=8)

        inline = ask(f"data:image/png;base64,{TEXT}", f"data:image/png;base64,{TEXT}")
        outside = ask(f"{site}/a.png", f"{site}/moved")
        assert outside.choices[0].message.content == inline.choices[0].message.content
        assert outside.usage == inline.usage
        for path, says in (
            ("/page", "not a PNG"),
            ("/slow", "not there within 2 seconds"),
            ("/endless", "more than"),
            ("/elsewhere", "evil.test"),
        ):
            with pytest.raises(openai.BadRequestError, match=says) as caught:
                ask(f"{site}/a.png", f"{site}{path}")
            assert caught.value.param == "messages.0.content.2.image_url"
