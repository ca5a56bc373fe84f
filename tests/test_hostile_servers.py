"""Model servers that misbehave in every way: no traceback, no bill without end, nothing sent elsewhere."""

import gzip
import json
import zlib
from collections import Counter

import pytest

from loopback_server import LoopbackServer, last_text
from rlcs.data.rows import Row
from rlcs.distill.run import run
from rlcs.engines import openai_client as client
from rlcs.engines.openai_client import EndpointClient
from rlcs.errors import EndpointError, UserError
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.sampling import Endpoint, RequestFields
from rlcs.recipe.schema import Teacher
from rlcs.records import Message, Problem, Request, Sampling
from rlcs.storage import read_json, read_jsonl

ANSWER = {"message": {"role": "assistant", "content": "So \\boxed{4}."}, "finish_reason": "stop"}
USAGE = {"prompt_tokens": 10, "completion_tokens": 4}
REPLY = {"choices": [ANSWER], "usage": USAGE}
TEXT = json.dumps(REPLY)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(client, "LONGEST_RETRY_AFTER_S", 0.05)


def raw(body, *headers, status="200 OK", length=None):
    """A response byte by byte."""
    data = body if isinstance(body, bytes) else body.encode()
    head = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(data) if length is None else length}"]
    return "\r\n".join([*head, "", ""]).encode() + data


def plain(body, *headers, **more):
    return raw(body, "Content-Type: application/json", *headers, **more)


def packed(encoding, data):
    return plain(data, f"Content-Encoding: {encoding}")


def chunked(*chunks, end=b"0\r\n\r\n"):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + end


def deep(depth):
    return "[" * depth + "]" * depth


def instead(**fields):
    return json.dumps({**REPLY, **fields})


def message(**fields):
    return instead(choices=[{**ANSWER, "message": {"role": "assistant", **fields}}])


WHOLE = TEXT.encode()
BOMB = gzip.compress(b" " * (300 << 20), 1)
ANSWERED, PAID, BUSY, REFUSED = 1, 2, 3, 4
"""Outcomes: an answer; a reply that is paid and of no use, asked for 3 times; a failure that may pass, tried
`max_retries` more times; a refusal, tried once."""
KINDS = {
    # bodies that hold an answer, in odd clothes
    "text/plain": (raw(TEXT, "Content-Type: text/plain"), ANSWERED),
    "no content type": (raw(TEXT), ANSWERED),
    "wrong charset": (raw(TEXT, "Content-Type: application/json; charset=utf-99"), ANSWERED),
    "byte order mark": (plain("\ufeff" + TEXT), ANSWERED),
    "damaged character": (plain(WHOLE.replace(b"So", b"S\xff")), ANSWERED),
    "gzip": (packed("gzip", gzip.compress(WHOLE)), ANSWERED),
    "deflate": (packed("deflate", zlib.compress(WHOLE)), ANSWERED),
    "chunks": (chunked(WHOLE[:9], WHOLE[9:]), ANSWERED),
    "one byte at a time": (tuple(plain(TEXT)[i : i + 40] for i in range(0, len(plain(TEXT)), 40)), ANSWERED),
    "usage 1e308": (plain(TEXT.replace("10", "1e308")), ANSWERED),
    "usage 1e999": (plain(TEXT.replace("10", "1e999")), ANSWERED),
    "usage Infinity": (plain(TEXT.replace("10", "Infinity")), ANSWERED),
    "usage NaN": (plain(TEXT.replace("10", "NaN")), ANSWERED),
    "usage negative": (plain(TEXT.replace("10", "-10")), ANSWERED),
    "usage a list": (plain(instead(usage=[1, 2])), ANSWERED),
    "usage nested": (plain(TEXT.replace("10", deep(40))), ANSWERED),
    "lone surrogate": (plain(message(content="So \ud800 \\boxed{4}.")), ANSWERED),
    "many headers": (plain(TEXT, *(f"X-{n}: y" for n in range(90))), ANSWERED),
    # bodies without one
    "empty body": (plain(""), PAID),
    "text": (raw("Hello!", "Content-Type: text/plain"), PAID),
    "a page": (raw("<html><title>Sign in</title></html>", "Content-Type: text/html"), PAID),
    "binary": (plain(bytes(range(256))), PAID),
    "cut JSON": (plain(TEXT[:-9]), PAID),
    "null": (plain("null"), PAID),
    "a number": (plain("5"), PAID),
    "a long number": (plain("9" * 5000), PAID),
    "a list": (plain("[]"), PAID),
    "an empty object": (plain("{}"), PAID),
    "choices null": (plain(instead(choices=None)), PAID),
    "choices a number": (plain(instead(choices=7)), PAID),
    "choices of text": (plain(instead(choices=["4"])), PAID),
    "message a number": (plain(instead(choices=[{**ANSWER, "message": 4}])), PAID),
    "content a number": (plain(message(content=4)), PAID),
    "no content": (plain(message()), PAID),
    "spaces": (plain(message(content="  \n ")), PAID),
    "nested": (plain(deep(100_000)), PAID),
    "nested a little": (plain(instead(choices=json.loads(deep(300)))), PAID),
    "nested in the reasoning": (plain(message(content="", reasoning=json.loads(deep(900)))), PAID),
    "damaged stream": (raw('data: {"choices": [\n\n', "Content-Type: text/event-stream"), PAID),
    "empty stream": (raw("data: [DONE]\n\n", "Content-Type: text/event-stream"), PAID),
    "damaged gzip": (packed("gzip", b"no gzip at all"), PAID),
    "cut gzip": (packed("gzip", gzip.compress(WHOLE)[:-30]), PAID),
    "unknown encoding": (packed("br", WHOLE), PAID),
    "packed twice": (packed("gzip, gzip", gzip.compress(gzip.compress(WHOLE))), PAID),
    "bomb": (packed("gzip", BOMB), PAID),
    "17 MB": (plain(TEXT + " " * (17 << 20)), PAID),
    # connections and statuses
    "hung up": (b"", BUSY),
    "cut body": (plain(TEXT, length=10_000), BUSY),
    "cut chunks": (chunked(WHOLE[:9], end=b""), BUSY),
    "wrong chunks": (chunked(WHOLE, end=b"zz\r\n"), BUSY),
    "no HTTP": (b"SSH-2.0-OpenSSH_9\r\n\r\n", BUSY),
    "broken head": (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", BUSY),
    "endless header": (b"HTTP/1.1 200 OK\r\nX: " + b"y" * (1 << 20), BUSY),
    "wrong length": (raw(TEXT, "Content-Length: -5"), BUSY),
    "408": ((408, {"error": "slow"}), BUSY),
    "429 for ever": (raw("{}", "Retry-After: 1e400", status="429 Busy"), BUSY),
    "429 in the past": (raw("{}", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT", status="429 Busy"), BUSY),
    "429 nonsense": (raw("{}", "Retry-After: \xff", status="429 Busy"), BUSY),
    "500 nested": ((500, deep(100_000)), BUSY),
    "502 page": ((502, "<html><h1>Bad gateway</h1></html>"), BUSY),
    "503 bomb": (raw(BOMB, "Content-Encoding: gzip", status="503 Busy"), PAID),
    "599": ((599, ""), BUSY),
    "error in 200": (plain(json.dumps({"error": {"code": 503, "message": "busy"}})), BUSY),
    "204": (raw("", status="204 No Content"), PAID),
    "304": (raw("", status="304 Not Modified"), REFUSED),
    "400 nested": ((400, deep(100_000)), REFUSED),
    "400 list": ((400, [[[]]]), REFUSED),
    "413": ((413, ""), REFUSED),
    "418": ((418, {"error": {"message": ["tea", {"pot": 1}]}}), REFUSED),
}  # fmt: skip


def ask(*texts):
    return [Request(id=text, messages=(Message(role="user", parts=(text,)),)) for text in texts]


def sampled(server, requests, **changes):
    settings = Endpoint(base_url=server.url, model="m", **{"max_retries": 4, "concurrency": 1, **changes})
    with EndpointClient(settings, Sampling(max_new_tokens=64, temperature=0.7, seed=5)) as opened:
        return {sample.id: sample for sample in opened.samples(requests)}


def misbehaving(kind):
    """A server that answers "good" well, and everything else as told."""
    return LoopbackServer(reply=lambda body: REPLY if last_text(body) == "good" else KINDS[kind][0])


@pytest.mark.fault(
    "teacher", "a reply of each of 69 kinds", "answered, or failed alone; paid at most 3 times"
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_misbehaving_reply_fails_alone_and_is_not_paid_again_and_again(kind):
    with misbehaving(kind) as server:
        got = sampled(server, ask("good", "bad"))
        requests = Counter(map(last_text, server.seen))["bad"]
    outcome = KINDS[kind][1]
    bad = got["bad"]
    assert got["good"].text == "So \\boxed{4}." and len(bad.error) < 1000
    assert requests == {ANSWERED: 1, PAID: 3, BUSY: 5, REFUSED: 1}[outcome]
    assert bool(bad.error) == (outcome != ANSWERED) and bad.retryable == (outcome == BUSY)
    assert ("boxed{4}" in bad.text) == (outcome == ANSWERED) and bad.prompt_tokens in (0, 10)


@pytest.mark.fault("teacher", "a redirect to the server itself, or on and on", "a sentence after 4 requests")
@pytest.mark.parametrize("where", ["/v1/chat/completions", "/v1/{}/chat/completions", ""])
def test_a_server_that_redirects_in_a_circle_is_a_sentence(where):
    def reply(body):
        return raw("", f"Location: {where.format(len(server.seen))}", status="307 Elsewhere")

    with LoopbackServer(reply=reply) as server:
        with pytest.raises(EndpointError, match="redirects in a circle"):
            sampled(server, ask("a", "b"))
        assert len(server.seen) <= 8  # of both requests, which are on their way


@pytest.mark.fault("teacher", "a redirect to another host, port or scheme", "nothing is sent there")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("change", [("127.0.0.1", "localhost"), ("", ""), ("http:", "https:")])
def test_nothing_follows_a_redirect_to_another_server(status, change, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789")
    with LoopbackServer() as other:
        target = f"{other.url.replace(*change)}/chat/completions?key=sk-planted-0123456789"
        reply = raw("", f"Location: {target}", status=f"{status} Elsewhere")
        with LoopbackServer(reply=lambda body: reply) as server:
            with pytest.raises(EndpointError, match="sends requests on to") as caught:
                sampled(server, ask("a"))
            assert len(server.seen) == 1
        assert not other.headers and "planted" not in str(caught.value)


@pytest.mark.fault("teacher", "an address that is none", "a sentence before anything is sent")
@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://\0/",
            "http://\x07/v1",
            "http://x\n.org",
            "http://x:99999/v1",
            "http://[/v1",
            "http://x:-1",
        ),
        *("http://%/", "http://\ud800/", "file:///etc/passwd", "http://" + "a." * 5000, "//", "http://?"),
        *("http://x/\r\nHost: y", "\0"),
    ],
)
def test_an_address_that_is_none_is_a_sentence(url):
    with pytest.raises(UserError):
        recipe = load_recipe("quickstart", [f"teacher.base_url={url}", "teacher.model=m"]).recipe
        with EndpointClient(recipe.teacher.endpoint, Sampling(max_new_tokens=4)) as opened:
            list(opened.samples(ask("a")))


@pytest.mark.fault("secrets", "a recipe that names another secret as its key", "nothing is sent")
@pytest.mark.parametrize("name", ["GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "HOME", "SSH_KEY", "PATH"])
def test_only_variables_that_are_named_as_keys_are_sent(name, monkeypatch):
    monkeypatch.setenv(name, "ghp-planted-0123456789")
    headers = RequestFields(headers={"X-Title": f"env:{name}"})
    with LoopbackServer() as server:
        for settings in ({"key_env": name}, {"request": headers}):
            with pytest.raises(EndpointError, match=f"{name} is not named as the key(?s:.*)RLCS_KEYS={name}"):
                sampled(server, ask("a"), section="teacher", **settings)
        assert not server.seen
        monkeypatch.setenv("RLCS_KEYS", f"OTHER, {name}")
        assert not sampled(server, ask("a"), key_env=name)["a"].error
        assert "ghp-planted-0123456789" in server.headers[0]


# --- what it may cost ---------------------------------------------------------------------------------


def rows(count):
    problems = [Problem(id=f"p{n}", source="mine", question=f"{n}?", answer="4") for n in range(count)]
    return [Row(problem=problem, response=None) for problem in problems]


@pytest.mark.fault("teacher", "a budget of tokens or money that is too small", "stops at it, and goes on")
@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"token_budget": 140}, "140 tokens are spent, of teacher.token_budget=140"),
        ({"cost_budget": 0.1, "prompt_price": 1000.0}, "0.1 is spent, of teacher.cost_budget=0.1"),
    ],
)
def test_a_distillation_stops_at_its_budget_and_goes_on_with_a_higher_one(budget, said, tmp_path):
    with LoopbackServer(reply=lambda body: REPLY) as server:
        settings = {"base_url": server.url, "model": "m", "concurrency": 8, "max_tokens": 20}
        with pytest.raises(UserError, match=said):
            run(rows(30), Teacher(**settings, **budget), folder=tmp_path, seed=1)
        assert len(server.seen) == len(read_jsonl(tmp_path / "samples.jsonl")) == 10
        with pytest.raises(UserError, match=said):
            run(rows(30), Teacher(**settings, **budget), folder=tmp_path, seed=1)
        assert len(server.seen) == 10
        assert len(run(rows(30), Teacher(**settings), folder=tmp_path, seed=1)) == 30
        assert len(server.seen) == 30


def test_replies_without_an_answer_count_too(tmp_path):
    empty = {"choices": [{**ANSWER, "message": {"content": ""}}], "usage": USAGE}
    with LoopbackServer(reply=lambda body: REPLY if len(server.seen) % 2 == 0 else empty) as server:
        settings = {"base_url": server.url, "model": "m", "concurrency": 1, "completion_price": 1e6}
        with pytest.raises(UserError, match="140 tokens are spent"):
            run(rows(30), Teacher(**settings, token_budget=140), folder=tmp_path, seed=1)
        assert len(server.seen) == 10
        run(rows(5), Teacher(**settings), folder=tmp_path / "whole", seed=1)
    stats = read_json(tmp_path / "whole/stats.json")
    assert stats["repeated_tokens"] == 5 * 14 and stats["cost"] == pytest.approx(4 * 10)
    assert stats["retries"] == {"empty": 5}
