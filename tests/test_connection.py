"""Addresses, keys, headers, proxies and certificates, as people have them."""

import os
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from loopback_server import LoopbackServer
from rlcs.engines import openai_client as client
from rlcs.engines.connection import address, headers, key
from rlcs.engines.openai_client import EndpointClient
from rlcs.errors import EndpointError, RecipeError
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.sampling import Endpoint, RequestFields
from rlcs.records import Message, Request, Sampling
from rlcs.redaction import redacted

PROXIES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
QUESTION = Request(id="a", messages=(Message(role="user", parts=("?",)),))


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)
    for name in (*PROXIES, "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def ask(url, **settings):
    endpoint = Endpoint(base_url=url, model="m", **{"max_retries": 1, **settings})
    with EndpointClient(endpoint, Sampling(max_new_tokens=9)) as opened:
        (sample,) = opened.samples([QUESTION])
    return sample


# --- addresses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("HTTP://LOCALHOST:8000/v1/", "http://localhost:8000/v1"),
        ("Https://Example.org/v1//", "https://example.org/v1"),
        (' "http://x:1/v1"\n', "http://x:1/v1"),
        ("http://x/v1/chat/completions", "http://x/v1"),
        ("http://x/v1/chat/completions/", "http://x/v1"),
        ("http://x/v1/completions", "http://x/v1"),
        ("http://x/openai/v1/chat/completions?api-version=2", "http://x/openai/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("http://x", "http://x"),
        ("http://x.:80/V1", "http://x.:80/V1"),
    ],
)
def test_an_address_is_read_as_people_write_it(written, read):
    assert address(written).url == read


@pytest.mark.parametrize(
    ("written", "told"),
    [
        *((text, "not the URL of a server") for text in ("localhost:8000/v1", "", "ftp://x", "x", "//x/v1")),
        *((f"http://x:{port}/v1", "port is a number up to 65535") for port in ("99999", "-1", "8OOO")),
        ("http://127.0.0.1:0/v1", "no server has port 0"),
        *(
            (text, "names no server")
            for text in ("http://", "https:///v1", "http://:80/v1", "http://my host")
        ),
        ("http://a..b/v1", "names no server"),
        (f"http://{'a' * 64}.org/v1", "names no server"),
        ("http://::1:8000/v1", "IPv6 address stands in brackets"),
        ("http://[::1/v1", "IPv6"),
        ("http://<host>:8000/v1", "names no server"),
    ],
)
def test_an_address_that_cannot_be_one_is_a_sentence(written, told):
    with pytest.raises(EndpointError, match=told) as caught:
        ask(written)
    assert caught.value.exit_code == 2 and len(str(caught.value)) < 500


@pytest.mark.parametrize("host", ["256.256.256.256", "\uff11\uff12\uff17.0.0.1"])
def test_a_host_that_the_client_refuses_is_a_sentence(host):
    with pytest.raises(EndpointError, match="this URL names no server"):
        ask(f"http://{host}/v1")


@contextmanager
def redirecting(status, location):
    """A server that sends every request elsewhere."""

    class Redirect(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Location", location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Redirect) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_neither_key_nor_question_follow_a_redirect_to_another_host(status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    with LoopbackServer() as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        told = f"sends requests on to {elsewhere};"
        with (
            redirecting(status, f"{elsewhere}/chat/completions") as url,
            pytest.raises(EndpointError, match=told) as caught,
        ):
            ask(url)
        assert not other.seen and "secret" not in str(caught.value)


def test_a_redirect_that_loses_the_question_says_where_it_leads():
    told = r"sends requests on to http://127.0.0.1:.*/v2;"
    with redirecting(301, "/v2/chat/completions") as url, pytest.raises(EndpointError, match=told):
        ask(url)


def test_capitals_and_the_whole_path_of_a_request_are_asked(monkeypatch):
    with LoopbackServer() as server:
        ask(server.url.replace("http", "HTTP"))
        ask(f"{server.url}/chat/completions?api-version=7")
        assert server.headers[0].startswith("POST /v1/chat/completions HTTP")
        assert server.headers[1].startswith("POST /v1/chat/completions?api-version=7 HTTP")


def test_a_missing_version_is_guessed_when_nothing_is_there():
    with (
        LoopbackServer(faults={"?": ["always:404"]}) as server,
        pytest.raises(EndpointError, match="ends in /v1"),
    ):
        ask(server.url.removesuffix("/v1"))
    with pytest.raises(EndpointError, match=r"nothing answers there(?s:.*)/v1 at its end"):
        ask("http://127.0.0.1:9")


@pytest.mark.parametrize(
    "url", ["http://me:pa55word@x/v1", "http://x/v1?api_key=pa55word", "http://pa55word@x:99999/v1"]
)
def test_a_secret_in_an_address_is_neither_shown_nor_written(url):
    with pytest.raises(RecipeError, match="environment variable") as caught:
        load_recipe("quickstart", [f"teacher.base_url={url}", "teacher.model=m"])
    assert "pa55word" not in str(caught.value) and caught.value.where == "teacher.base_url"
    with pytest.raises(RecipeError, match=r"rollout\.urls"):
        load_recipe("quickstart", [f"rollout.urls=['{url}']", "rollout.engine=vllm_server"])
    with pytest.raises(RecipeError, match=r"judge\.base_url"):
        load_recipe("quickstart", [f"grpo.reward.judge.base_url={url}", "grpo.reward.judge.model=m"])
    with pytest.raises(EndpointError) as other:
        address("http://me:pa55word@:1/v1?token=pa55word")
    assert "pa55word" not in str(other.value)


# --- keys and headers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "sk-abc\n",
        "sk-abc\r\n",
        " sk-abc ",
        '"sk-abc"',
        "'sk-abc'\n",
        "Bearer sk-abc",
        '"Bearer sk-abc"',
        "sk-abc",
    ],
)
def test_what_came_along_with_a_key_is_taken_off(value, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", value)
    with LoopbackServer() as server:
        assert not ask(server.url, key_env="MY_API_KEY").error
        assert "authorization: bearer sk-abc\r\n" in server.headers[0].lower()


@pytest.mark.parametrize(
    "value",
    ["sk-abcdefgh\nsk-second", "sk-abc\tdefgh", "sk-äbcdefgh", "sk-abcdefgh\u200b1", "sk-\x00abcdefgh"],
)
def test_a_key_that_cannot_be_sent_is_a_sentence_without_the_key(value, monkeypatch):
    server = Endpoint(base_url="http://x/v1", model="m", key_env="MY_API_KEY")
    monkeypatch.setattr("rlcs.engines.connection.os.environ", {"MY_API_KEY": value})  # NUL cannot be set
    with pytest.raises(EndpointError, match=r"MY_API_KEY(?s:.*)copy it again") as caught:
        key(server)
    assert "abc" not in str(caught.value) and "second" not in str(caught.value)


@pytest.mark.parametrize("value", ["", "  ", '""', "\n"])
def test_without_a_key_a_local_server_is_asked(value, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", value)
    with LoopbackServer() as server:
        assert not ask(server.url, key_env="MY_API_KEY").error


def test_headers_come_from_the_environment_and_are_masked(monkeypatch):
    monkeypatch.setenv("AZURE_API_KEY", "az-0123456789\n")
    request = RequestFields(headers={"api-key": "env:AZURE_API_KEY", "X-Team": "vision"})
    server = Endpoint(base_url="http://x/v1", model="m", request=request, section="teacher")
    assert headers(server) == {"api-key": "az-0123456789", "X-Team": "vision"}
    assert redacted("vision: az-0123456789") == "vision: ***"
    monkeypatch.delenv("AZURE_API_KEY")
    with pytest.raises(EndpointError, match=r"teacher\.request\.headers, api-key: AZURE_API_KEY is not set"):
        ask("http://x/v1", request=request, section="teacher")


def test_an_organisation_with_a_line_break_is_cleaned_or_named(monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1\n")
    with LoopbackServer() as server:
        assert not ask(server.url).error
        assert "org-1" in server.headers[0]
    monkeypatch.setenv("OPENAI_PROJECT_ID", "one\ntwo")
    with pytest.raises(EndpointError, match="OPENAI_PROJECT_ID: the value holds a line break"):
        ask("http://127.0.0.1:8000/v1")


# --- proxies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"])
@pytest.mark.parametrize("value", ["socks5://127.0.0.1:9", "garbage:/:", "http://127.0.0.1:99999"])
def test_a_proxy_that_no_proxy_excepts_is_not_touched(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    for excepted in ("127.0.0.1", "localhost,127.0.0.1", "*", "127.0.0.0/8"):
        monkeypatch.setenv("NO_PROXY", excepted)
        with LoopbackServer() as server:
            assert not ask(server.url).error


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9", "ALL_PROXY: SOCKS proxies need the package socksio"),
        ("http_proxy", "socks5h://me:pa55word@127.0.0.1:9", "HTTP_PROXY: SOCKS"),
        ("HTTP_PROXY", "garbage://x", "HTTP_PROXY: this is not the URL of a proxy"),
        ("HTTP_PROXY", "http://me:pa55word@127.0.0.1:99999", "HTTP_PROXY: this is not the URL of a proxy"),
        ("HTTP_PROXY", "://", "HTTP_PROXY: this is not the URL of a proxy"),
        ("HTTP_PROXY", "127.0.0.1:9", "through the proxy of HTTP_PROXY"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_a_sentence(name, value, told, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(EndpointError, match=told) as caught:
        ask("http://127.0.0.1:8000/v1")
    assert "pa55word" not in str(caught.value) and "NO_PROXY" in str(caught.value) + "NO_PROXY" * (
        "through" in told
    )


def test_the_proxy_of_another_scheme_does_not_matter(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "garbage")
    with LoopbackServer() as server:
        assert not ask(server.url).error


def test_a_request_goes_through_the_proxy(monkeypatch):
    with LoopbackServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        assert not ask("http://nowhere.invalid/v1").error
        assert proxy.headers[0].startswith("POST http://nowhere.invalid/v1/chat/completions")


def test_the_command_ends_with_a_sentence_and_exit_2(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "?", "answer": "5"}\n')
    program = [sys.executable, "-m", "rlcs", "distill", "quickstart", "--out", str(tmp_path / "run")]
    words = [
        f"data.problems={tmp_path}/rows.jsonl",
        "teacher.base_url=http://127.0.0.1:8000/v1",
        "teacher.model=m",
    ]
    environment = {**os.environ, "ALL_PROXY": "socks5://127.0.0.1:9"}
    done = subprocess.run([*program, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "socksio" in done.stderr and "Traceback" not in done.stderr


# --- certificates -----------------------------------------------------------------------------------


@pytest.fixture
def tls(tmp_path):
    """The URL of a server with a self-signed certificate, and the certificate's file."""
    pem, certificate = tmp_path / "own.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(pem), "-out", str(certificate)]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    pem.write_text(pem.read_text() + certificate.read_text())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_port}/v1", certificate
    server.shutdown()
    server.server_close()


class _Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"choices": [{"message": {"content": "5"}, "finish_reason": "stop"}]}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_self_signed_certificate_is_named_at_once_and_can_be_trusted(tls, monkeypatch, tmp_path):
    url, certificate = tls
    with pytest.raises(EndpointError, match=r"(?s)certificate is not trusted \(self.signed.*SSL_CERT_FILE"):
        ask(url, max_retries=50)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert ask(url).text == "5"
    for wrong in (tmp_path / "missing.pem", __file__):
        monkeypatch.setenv("SSL_CERT_FILE", str(wrong))
        with pytest.raises(EndpointError, match="SSL_CERT_FILE: it cannot be read"):
            ask(url)


@pytest.fixture
def silent():
    """The port of a server that accepts connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_wrong_scheme_is_named():
    class Plain(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1)
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(EndpointError, match=r"speaks no TLS(?s:.*)http://"):
            ask(f"https://127.0.0.1:{server.server_address[1]}/v1")
        server.shutdown()
    page = (400, "<html><h1>The plain HTTP request was sent to HTTPS port</h1></html>")
    with (
        LoopbackServer(reply=lambda body: page) as server,
        pytest.raises(EndpointError, match="write https://"),
    ):
        ask(server.url)


@pytest.mark.fault("teacher", "an address where nobody answers", "a sentence in seconds")
def test_a_connection_that_is_not_made_takes_seconds_not_minutes(silent, monkeypatch):
    monkeypatch.setattr(client, "CONNECT_S", 0.2)
    with pytest.raises(EndpointError, match=r"nothing answers there.*ConnectTimeout"):
        ask(f"https://127.0.0.1:{silent}/v1")
