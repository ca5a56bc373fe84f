"""Connections that hold the door: slow bodies, silent connections, readers who take nothing, tiny pieces."""

import json
import select
import socket
from contextlib import ExitStack, suppress

import openai
import psutil
import pytest

from bench.hostile import asked, get, metrics, post, serving, wait_until

MOST = 60
SETUP = f"""
from rlcs.serving import server, uploads, web
web.MAX_CONNECTIONS, web.TAKEN_S, web.IDLE_S = {MOST}, 1.0, 3.0
uploads.GRACE_S, uploads.MAX_UPLOADS = 2.0, 30
plain = server.Service.prepare
def prepare(self, options, turns):
    if turns[0].parts == ("break",):
        raise ZeroDivisionError("inside")
    return plain(self, options, turns)
server.Service.prepare = prepare
"""
"""The limits in seconds, so that they are reached, and a server that fails if it is asked to."""


@pytest.fixture(scope="module")
def server(random_model_folder):
    flags = ["--concurrency", "4", "--queue", "4", "--max-tokens", "3000", "--max-body-bytes", "1000000"]
    with serving(random_model_folder, *flags, setup=SETUP) as made:
        yield made


def answer(server, text="x"):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    reply = client.chat.completions.create(model="m", messages=asked(text), max_tokens=8, temperature=0)
    return reply.choices[0].message.content


def connect(server, stack, data=b""):
    made = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
    made.sendall(data)
    return made


def received(connection):
    heard = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            heard += piece
    return heard


def error_of(reply):
    return json.loads(reply.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.fault("server", "bodies of requests that come a byte at a time", "408; they hold no place")
def test_slow_bodies_hold_no_place(server):
    right = answer(server)
    with ExitStack() as stack:
        slow = [connect(server, stack, post(b"{", 900_000)) for _ in range(25)]
        for _ in range(4):
            assert answer(server) == right
            assert get(server, "/health") == '{"status":"ok"}'
            for connection in slow:
                with suppress(OSError):
                    connection.sendall(b" ")
        reply = received(slow[0])
        assert reply.startswith(b"HTTP/1.1 408") and error_of(reply)["code"] == "timeout"
    assert metrics(server)["rlcs_requests_active"] == 0


@pytest.mark.fault(
    "server", "more bodies on their way than are allowed", "the oldest, or the largest, is given up"
)
@pytest.mark.parametrize(("count", "data"), [(40, b"{"), (6, b" " * 990_000)])
def test_too_many_bodies_make_room(server, count, data):
    right = answer(server)
    with ExitStack() as stack:
        slow = [connect(server, stack, post(data, 999_999)) for _ in range(count)]
        assert answer(server) == right
        given_up, _, _ = select.select(slow, [], [], 60)
        assert received(given_up[0]).startswith(b"HTTP/1.1 408")


@pytest.mark.fault("server", "more silent connections than are allowed", "the oldest are closed")
def test_silent_connections_make_room(server):
    right, facts = answer(server), psutil.Process(server.process.pid)
    with ExitStack() as stack:
        for number in range(4 * MOST):
            connect(server, stack, b"POST /v1/cha" if number % 2 else b"")
            if number % MOST == 0:
                assert get(server, "/health") == '{"status":"ok"}' and answer(server) == right
        get(server, "/health")
        open_ones = [each for each in facts.net_connections() if each.status == psutil.CONN_ESTABLISHED]
        assert len(open_ones) <= MOST + 5


@pytest.mark.fault("server", "readers who do not take what they asked for", "cut off; their places are free")
def test_who_takes_nothing_is_cut_off(server):
    right = answer(server)
    ask = {
        "messages": asked("x"),
        "max_tokens": 200,
        "n": 8,
        "stream": True,
        "logprobs": True,
        "top_logprobs": 20,
    }
    with ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(post(json.dumps(ask).encode()))
        wait_until(lambda: metrics(server)["rlcs_requests_active"] == 2)
        wait_until(lambda: metrics(server)["rlcs_requests_active"] == 0, 120)
        assert metrics(server)['rlcs_requests_total{code="499"}'] >= 1, "cut off, or all of it is in buffers"
    assert answer(server) == right


@pytest.mark.fault("server", "a body in a hundred thousand pieces", "400, without reading them all")
def test_tiny_pieces_are_refused(server):
    head = post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    with ExitStack() as stack:
        connection = connect(server, stack)
        with suppress(OSError):
            connection.sendall(head + b"1\r\n \r\n" * 100_000)
        assert get(server, "/health") == '{"status":"ok"}'
        assert b" 408 " not in received(connection), "it is not waited for"
        last = head.replace(b"Host: x", b"Host: x\r\nConnection: close")
        small = connect(server, stack, last + b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n")
        assert b"messages" in received(small), "pieces as such are right"


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", post(b"")[:-2] + b"X\r\n\r\n"]
)
def test_what_is_not_http_is_answered_in_the_form_of_errors(server, data):
    with ExitStack() as stack:
        reply = received(connect(server, stack, data))
    assert reply.startswith(b"HTTP/1.1 400") and error_of(reply)["type"] == "invalid_request_error"


def test_addresses_that_are_none_are_answered(server):
    for line in (b"GET http://[/", b"POST http://[", b"GET //["):
        with ExitStack() as stack:
            data = line + b" HTTP/1.1\r\nHost: [\r\nConnection: close\r\n\r\n"
            reply = received(connect(server, stack, data))
        assert reply.startswith(b"HTTP/1.1 404") and error_of(reply)["message"]


@pytest.mark.fault("server", "an error that nobody foresaw", "500 in OpenAI's form, without its text")
def test_what_nobody_foresaw_has_the_form_of_errors_too(server):
    with pytest.raises(openai.InternalServerError) as caught:
        answer(server, "break")
    assert caught.value.body["code"] == "internal_error" and "inside" not in str(caught.value)
    assert answer(server)


@pytest.mark.fault("server", "temperatures next to zero, with logprobs", "the greedy answer")
@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-38, 1e-45, 5e-324])
def test_temperatures_next_to_zero_are_greedy(server, temperature):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    more = {"max_tokens": 8, "logprobs": True, "top_logprobs": 3, "temperature": temperature}
    reply = client.chat.completions.create(model="m", messages=asked("x"), **more)
    assert reply.choices[0].message.content == answer(server)
    assert all(entry.logprob <= 0 for entry in reply.choices[0].logprobs.content)
