"""Replies by content: nothing is asked twice, late replies are cancelled, requests are bounded."""

import time

import pytest

from loopback_server import LoopbackServer, last_text
from rlcs.engines.openai_client import EndpointClient
from rlcs.errors import EndpointError
from rlcs.generation import CachedSampler
from rlcs.recipe.sampling import Endpoint
from rlcs.records import Message, Sampling, StopReason
from rlcs.signals import StopFlag
from rlcs.storage import read_jsonl

SAMPLING = Sampling(max_new_tokens=9, temperature=0.0)


def said(*texts: str) -> list[tuple[Message, ...]]:
    return [(Message(role="user", parts=(text,)),) for text in texts]


def client(server: LoopbackServer, **changes) -> EndpointClient:
    settings = {"base_url": server.url, "model": "m", "max_retries": 0} | changes
    return EndpointClient(Endpoint(**settings), SAMPLING)


def echo(body) -> str:
    return last_text(body).upper()


def test_a_conversation_is_asked_once_whoever_asks_again(tmp_path):
    path = tmp_path / "replies.jsonl"
    with LoopbackServer(answer=echo) as server, client(server) as sampler:
        with CachedSampler(sampler, "m", path) as cached:
            cached.start(said("b"))
            assert [s.text for s in cached.samples(said("a", "b", "a"))] == ["A", "B", "A"]
            assert [s.text for s in cached.samples(said("b"))] == ["B"]
        assert len(server.seen) == 2
        with CachedSampler(sampler, "m", path) as again:
            assert [s.text for s in again.samples(said("b", "c"))] == ["B", "C"]
        assert len(server.seen) == 3
        with CachedSampler(sampler, "another", path) as other:
            other.samples(said("b"))
        assert len(server.seen) == 4, "another model replies for itself"
    assert len(read_jsonl(path)) == 4


def test_replies_are_written_as_they_arrive_while_others_are_under_way(tmp_path):
    """What a kill then loses is what was under way alone."""
    path = tmp_path / "replies.jsonl"
    with (
        LoopbackServer(answer=echo, faults={"never": ["always:slow"]}) as server,
        client(server) as sampler,
        CachedSampler(sampler, "m", path, threads=4) as cached,
    ):
        for texts in (["never"], ["a"], ["b", "c"]):
            cached.start(said(*texts))
        deadline = time.monotonic() + 10
        while len(read_jsonl(path)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert {row["response"] for row in read_jsonl(path)} == {"A", "B", "C"}


def test_what_does_not_reply_in_time_is_retryable_and_asked_again(tmp_path):
    with (
        LoopbackServer(answer=echo, faults={"b": ["slow"]}) as server,
        client(server) as sampler,
        CachedSampler(sampler, "m", tmp_path / "replies.jsonl") as cached,
    ):
        started = time.monotonic()
        a, b = cached.samples(said("a", "b"), limit_s=0.3)
        assert time.monotonic() - started < 5
        assert a.text == "A" and b.retryable and b.error == "no reply in time"
        assert [s.text for s in cached.samples(said("a", "b"))] == ["A", "B"]
        assert [last_text(body) for body in server.seen] == ["a", "b", "b"]


def test_a_stop_ends_the_wait(tmp_path):
    with (
        LoopbackServer(faults={"a": ["slow"]}) as server,
        client(server) as sampler,
        CachedSampler(sampler, "m", tmp_path / "replies.jsonl") as cached,
    ):
        stop = StopFlag()
        stop.is_set = True
        assert cached.samples(said("a"), stop=stop)[0].retryable


def test_requests_are_bounded_also_over_restarts(tmp_path):
    path = tmp_path / "replies.jsonl"
    with LoopbackServer(answer=echo) as server, client(server) as sampler:
        with CachedSampler(sampler, "m", path, max_requests=2) as cached:
            samples = cached.samples(said("a", "b", "c"))
            assert cached.exhausted and [s.text for s in samples] == ["A", "B", ""]
            assert samples[2].error == "the limit of 2 requests is reached" and samples[2].retryable
        with CachedSampler(sampler, "m", path, max_requests=3) as cached:
            assert [s.stop for s in cached.samples(said("b", "c", "d"))] == [
                StopReason.EOS,
                StopReason.EOS,
                StopReason.ERROR,
            ]
        assert len(server.seen) == 3


def test_a_final_refusal_is_kept_and_a_temporary_failure_is_not(tmp_path):
    faults = {"secret": ["always:filtered"], "busy": ["500"]}
    with (
        LoopbackServer(answer=echo, faults=faults) as server,
        client(server) as sampler,
        CachedSampler(sampler, "m", tmp_path / "replies.jsonl") as cached,
    ):
        for _ in range(2):
            refused, busy = cached.samples(said("secret", "busy"))
        assert "withheld" in refused.error and busy.text == "BUSY"
        assert sorted(last_text(body) for body in server.seen) == ["busy", "busy", "secret"]


def test_a_server_that_cannot_be_used_is_an_error(tmp_path):
    wrong = Endpoint(base_url="http://127.0.0.1:9/v1", model="m", max_retries=0)
    with (
        EndpointClient(wrong, SAMPLING) as sampler,
        CachedSampler(sampler, "m", tmp_path / "replies.jsonl") as cached,
        pytest.raises(EndpointError, match="nothing answers there"),
    ):
        cached.samples(said("a"))
