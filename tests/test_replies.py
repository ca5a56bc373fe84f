"""Replies of all kinds, through the client and through distillation, from a real server."""

import asyncio
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from loopback_server import LoopbackServer
from rlcs.data.rows import Row
from rlcs.distill.run import run
from rlcs.engines import openai_client as client
from rlcs.engines.openai_client import EndpointClient
from rlcs.errors import EndpointError, UserError
from rlcs.recipe.sampling import Endpoint
from rlcs.recipe.schema import Teacher
from rlcs.records import Message, Problem, Request, Sampling, StopReason
from rlcs.storage import read_json, read_jsonl


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)


def answered(message, finish="stop", **rest):
    """A whole reply with this message."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"prompt_tokens": 30, "completion_tokens": 9}, **rest}


def said(message, finish="stop", *, temperature=0.7, **changes):
    """The client's sample for such a reply, and the number of requests."""
    return asked(lambda body: answered(message, finish, **changes), temperature=temperature)


def asked(reply, *, count=1, temperature=0.7, **settings):
    """The samples of as many requests, the only one without its list, and the number of requests sent."""
    sampling = Sampling(max_new_tokens=64, temperature=temperature)
    requests = [
        Request(id=str(number), messages=(Message(role="user", parts=(f"{number}?",)),))
        for number in range(count)
    ]
    with LoopbackServer(reply=reply) as server:
        endpoint = Endpoint(base_url=server.url, model="m", **{"max_retries": 2, **settings})
        with EndpointClient(endpoint, sampling) as opened:
            samples = list(opened.samples(requests))
        return samples[0] if count == 1 else samples, len(server.seen)


def distilled(reply, folder, *, problems=1, **changes):
    """Demonstrations, statistics and the number of requests of a teacher with these replies."""
    rows = [
        Row(
            problem=Problem(id=f"p{n}", source="mine", question=f"{n}: two and three?", answer="5"),
            response=None,
        )
        for n in range(problems)
    ]
    with LoopbackServer(reply=reply) as server:
        teacher = Teacher(base_url=server.url, model="m", **changes)
        try:
            kept = run(rows, teacher, folder=folder, seed=1)
        except UserError:
            kept = []
        return [each.response for each in kept], read_json(folder / "stats.json"), len(server.seen)


# --- answers in parts, with reasoning ---------------------------------------------------------------

PARTS = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "2 + 3 = 5"}]},
    {"type": "text", "text": "Hence \\boxed{5}"},
]


def test_an_answer_in_parts_is_one_demonstration_after_one_request(tmp_path):
    kept, stats, requests = distilled(lambda body: answered({"content": PARTS}), tmp_path, format="think")
    assert kept == ["<think>\n2 + 3 = 5\n</think>\n\nHence \\boxed{5}"]
    assert requests == 1 and stats["refused"] == stats["failed"] == 0 and not stats["retries"]


@pytest.mark.parametrize(
    ("message", "text", "reasoning"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}]}, "ab", ""),
        ({"content": ["plain", {"type": "text", "text": "!"}]}, "plain!", ""),
        ({"content": [{"type": "reasoning", "text": "so"}, {"type": "text", "text": "5"}]}, "5", "so"),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"text": "5"}]}, "5", "hm"),
        ({"content": [{"type": "reference", "reference_ids": [1]}, {"type": "text", "text": "5"}]}, "5", ""),
        ({"content": "5", "reasoning_content": "so"}, "5", "so"),
        ({"content": "5", "reasoning": "so"}, "5", "so"),
        ({"content": "5", "reasoning_details": [{"type": "reasoning.text", "text": "so"}]}, "5", "so"),
        ({"content": "5", "reasoning_details": [{"type": "reasoning.summary", "summary": "so"}]}, "5", "so"),
        ({"content": "5", "reasoning": None, "reasoning_content": "so"}, "5", "so"),
        ({"content": "5", "thinking_blocks": [{"type": "thinking", "thinking": "so"}]}, "5", "so"),
        # The reasoning parser of the server found no end of the reasoning: the answer stands in it.
        ({"content": None, "reasoning_content": "so \\boxed{5}"}, "so \\boxed{5}", ""),
        ({"content": "", "reasoning": "so \\boxed{5}"}, "so \\boxed{5}", ""),
        ({"content": [], "reasoning_details": [{"text": "so \\boxed{5}"}]}, "so \\boxed{5}", ""),
        ({"content": [{"type": "thinking", "thinking": "so 5"}]}, "so 5", ""),
        ({"content": [{"type": "TEXT", "text": {"value": "5", "annotations": []}}]}, "5", ""),
        ({"content": [None, "", {"type": "text", "text": "5"}]}, "5", ""),
        ({"content": {"type": "text", "text": "5"}}, "5", ""),
        ({"content": {"parts": [{"text": "5"}], "role": "model"}}, "5", ""),
        ({"content": "5\ud800 \ud83d\ude00"}, "5\ufffd \U0001f600", ""),
    ],
)
def test_text_and_reasoning_are_found_wherever_they_stand(message, text, reasoning):
    sample, requests = said(message)
    assert (sample.text, sample.reasoning, sample.stop) == (text, reasoning, StopReason.EOS)
    assert (sample.prompt_tokens, sample.tokens, requests) == (30, 9, 1)


def test_null_content_with_reasoning_is_a_demonstration(tmp_path):
    reply = answered({"content": None, "reasoning_content": "2 + 3 makes \\boxed{5}"})
    kept, _, requests = distilled(lambda body: reply, tmp_path)
    assert kept == ["2 + 3 makes \\boxed{5}"] and requests == 1


def test_reasoning_that_reaches_the_limit_is_no_answer():
    sample, requests = said({"content": None, "reasoning_content": "so \\boxed{5}, but"}, "length")
    assert (sample.text, sample.stop, requests) == ("", StopReason.LENGTH, 1)


@pytest.mark.parametrize(
    "usage",
    [
        *(None, {}, {"prompt_tokens": None}, "none", {"completion_tokens": "x"}),
        {"prompt_tokens": float("inf"), "completion_tokens": float("nan")},
        {"prompt_tokens": 10**400, "completion_tokens": -1},
    ],
)
def test_usage_may_be_missing_or_damaged(usage):
    sample, _ = said({"content": "5"}, usage=usage)
    assert sample.text == "5" and (sample.prompt_tokens, sample.tokens) == (0, 0)


# --- answers that are not finished ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finish", "requests"),
    [
        *((finish, 1) for finish in ("max_tokens", "model_length", "tool_calls", "quantum_flip", "", None)),
        *((finish, 3 * 2) for finish in ("insufficient_system_resource", "abort", "error")),
        *((finish, 1) for finish in ("content_filter", "SAFETY", "refusal")),
    ],
)
def test_a_half_answer_is_never_kept(finish, requests, tmp_path):
    half = {"content": "perhaps \\boxed{5}, although"}
    kept, stats, sent = distilled(lambda body: answered(half, finish), tmp_path, max_retries=1)
    assert not kept and stats["kept"] == 0 and sent == requests
    reasons = [row["why"] for row in read_jsonl(tmp_path / "rejected.jsonl")]
    assert reasons == ["cut off before its end"] or stats["errors"]


def test_the_reason_of_the_provider_behind_a_proxy_counts_when_it_is_worse():
    def finish(own, native):
        reply = answered({"content": "5"}, own)
        reply["choices"][0]["native_finish_reason"] = native
        return asked(lambda body: reply, max_retries=0)[0].stop

    assert finish("stop", "STOP") is StopReason.EOS and finish("stop", "completed") is StopReason.EOS
    assert finish("stop", "MAX_TOKENS") is StopReason.LENGTH and finish("stop", "SAFETY") is StopReason.ERROR
    assert finish(None, "end_turn") is StopReason.EOS and finish("length", "stop") is StopReason.LENGTH
    assert finish("stop", "something new") is StopReason.EOS


def test_an_unknown_or_missing_reason_is_told_once(caplog):
    with caplog.at_level(logging.WARNING, logger="rlcs"):
        asked(lambda body: answered({"content": "5"}, "tired"), count=20)
        asked(lambda body: answered({"content": "5"}, None), count=20)
        said({"content": "5"}, "model_length")
        said({"content": "5"}, "Tired " * 1000)
    unknown, missing, long = [record.getMessage() for record in caplog.records]
    assert "Tired Tired" in long and len(long) < 200
    assert "'tired', which rlcs does not know" in unknown and "have no finish_reason" in missing


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "tool_calls": [{"function": {"name": "zoom"}}]},
        {"content": None, "function_call": {"name": "zoom", "arguments": "{}"}},
        {"content": [{"type": "tool_use", "name": "zoom", "input": {}}]},
    ],
)
@pytest.mark.parametrize("finish", ["tool_calls", "stop"])
def test_a_tool_call_without_text_is_named(message, finish):
    sample, requests = said(message, finish)
    assert sample.error == "the model called a tool instead of answering" and requests == 1


def test_a_text_before_a_tool_call_is_no_finished_answer():
    sample, _ = said({"content": "Let me look. \\boxed{5}?", "tool_calls": [{"function": {"name": "zoom"}}]})
    assert sample.stop is StopReason.LENGTH


# --- refusals and empty answers ---------------------------------------------------------------------


def test_a_refusal_is_final_after_one_request_and_its_cost_is_counted(tmp_path, capsys):
    reply = answered({"content": None, "refusal": "I will not say."})
    kept, stats, requests = distilled(lambda body: reply, tmp_path, completion_price=1e6)
    assert not kept and requests == 1
    assert stats["refused"] == 1 and stats["errors"] == {"refused": 1} and stats["cost"] == 9.0


@pytest.mark.parametrize(
    ("message", "finish"),
    [
        ({"content": None, "refusal": "No."}, "stop"),
        ({"content": "", "refusal": "No."}, None),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "stop"),
        ({"content": "I ca"}, "content_filter"),
        ({"content": ""}, "PROHIBITED_CONTENT"),
    ],
)
def test_refusals_of_every_form_are_final(message, finish):
    sample, requests = said(message, finish)
    assert sample.error.startswith("refused: ") and not sample.retryable and requests == 1


def test_a_long_refusal_is_shortened():
    sample, _ = said({"content": None, "refusal": "\x1b[31mnever\n" * 10_000})
    assert len(sample.error) < 400 and sample.error.isprintable()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    "message", [{"content": ""}, {"content": None}, {"content": "  \n"}, {"content": []}]
)
def test_an_empty_answer_is_asked_again_seldom(message, temperature):
    sample, requests = said(message, temperature=temperature)
    assert "the answer is empty" in sample.error and not sample.retryable
    assert requests == (2 if temperature == 0 else 3)


def test_empty_answers_cost_few_requests_and_are_counted(tmp_path):
    replies = [answered({"content": text}) for text in ("", "It is \\boxed{5}")]
    kept, stats, requests = distilled(lambda body: replies.pop(0), tmp_path)
    assert len(kept) == 1 and requests == 2 and stats["retries"] == {"empty": 1}
    kept, stats, requests = distilled(lambda body: answered({"content": ""}), tmp_path / "never")
    assert not kept and requests == 3 and stats["errors"] == {"the answer is empty, 3 times": 1}


def test_another_seed_is_tried_when_one_gives_nothing_twice():
    seeds = []

    def reply(body):
        seeds.append(body["seed"])
        return answered({"content": "" if len(set(seeds)) == 1 else "5"})

    sample, requests = asked(reply)
    assert sample.text == "5" and requests == 3 and seeds[0] == seeds[1] != seeds[2]


# --- replies that are no chat completion ------------------------------------------------------------


def stream(*chunks, done=True):
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join(events) + ("data: [DONE]\n\n" if done else "")


def piece(finish=None, **delta):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def test_a_stream_that_nobody_asked_for_is_read():
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    text = stream(
        piece(role="assistant", content=""), piece(reasoning_content="2 +"), piece(reasoning_content=" 3"),
        piece(content="It is "), piece(content="5"), piece("stop"), usage,
    )  # fmt: skip
    for whole in (text, ": a comment\n\n" + text, text.replace("\n\n", "\r\n\r\n")):
        sample, requests = asked(lambda body, whole=whole: whole)
        assert (sample.text, sample.reasoning, sample.stop) == ("It is 5", "2 + 3", StopReason.EOS)
        assert (sample.prompt_tokens, sample.tokens, requests) == (3, 4, 1)


def test_a_stream_that_ends_early_is_not_finished_and_an_error_in_it_is_one():
    sample, _ = asked(lambda body: stream(piece(content="It is"), done=False))
    assert (sample.text, sample.stop) == ("It is", StopReason.LENGTH)
    late = stream(piece(content="It"), {"error": {"code": 503, "message": "overloaded"}})
    sample, requests = asked(lambda body: late)
    assert "overloaded" in sample.error and sample.retryable and requests == 3


def test_an_error_in_a_reply_of_status_200_counts_as_what_it_says():
    for code in (429, "429", "rate_limit_exceeded", 503, "server_error", None):
        sample, requests = asked(lambda body, code=code: {"error": {"code": code, "message": "later"}})
        assert sample.retryable and "later" in sample.error and requests == 3, code
    inside = {"choices": [{"error": {"code": 502, "message": "upstream"}, "message": {"content": "It"}}]}
    assert asked(lambda body: inside)[0].retryable
    sample, requests = asked(lambda body: {"error": {"code": 400, "message": "odd image"}})
    assert sample.error == "HTTP 400: odd image" and requests == 1
    old = {"object": "error", "message": "the prompt is odd", "code": 400}
    assert asked(lambda body: old)[0].error == "HTTP 400: the prompt is odd"
    for code, what in ((401, "refuses the key"), (402, "no credit"), ("model_not_found", "no model 'm'")):
        with pytest.raises(EndpointError, match=what):
            asked(lambda body, code=code: {"error": {"code": code, "message": "no"}})


def test_a_damaged_character_or_a_byte_order_mark_spoils_no_answer():
    whole = json.dumps(answered({"content": "caf\u00e9 5"}), ensure_ascii=False)

    class Served(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.send_header("Content-Type", self.server.kind)
            self.end_headers()
            self.wfile.write(self.server.content)

        def log_message(self, *_):
            pass

    for kind, content, text in (
        ("application/json", whole.encode("latin-1"), "caf\ufffd 5"),
        ("text/plain", whole.encode("utf-8-sig"), "caf\u00e9 5"),
        ("application/json", whole.encode("utf-8-sig"), "caf\u00e9 5"),
    ):
        with ThreadingHTTPServer(("127.0.0.1", 0), Served) as server:
            server.kind, server.content = kind, content
            threading.Thread(target=server.serve_forever, daemon=True).start()
            endpoint = Endpoint(
                base_url=f"http://127.0.0.1:{server.server_port}/v1", model="m", max_retries=0
            )
            request = Request(id="a", messages=(Message(role="user", parts=("?",)),))
            with EndpointClient(endpoint, Sampling(max_new_tokens=64)) as opened:
                (sample,) = opened.samples([request])
            server.shutdown()
        assert (sample.text, sample.error) == (text, "")


@pytest.mark.parametrize(
    "chunks",
    [
        [{"choices": ["x"]}, {"choices": [{"delta": "x"}]}, {"choices": {"a": 1}}, 5],
        [{"choices": [{"index": 1, "delta": {"content": "6"}, "finish_reason": "stop"}]}],
    ],
)
def test_odd_chunks_of_a_stream_are_passed_over(chunks):
    good = {"choices": [{"index": 0, "delta": {"content": "5"}, "finish_reason": "stop"}]}
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in [*chunks, good, *chunks])
    sample, _ = asked(lambda body: stream)
    assert (sample.text, sample.stop) == ("5", StopReason.EOS)


def test_what_a_server_says_in_a_format_of_its_own_is_shown():
    for reply in (
        {"code": 1302, "msg": "no quota"},
        {"detail": "no quota"},
        {"errors": [{"why": "no quota"}]},
    ):
        with pytest.raises(EndpointError, match="no quota"):
            asked(lambda body, reply=reply: reply, max_retries=0)


def test_a_page_instead_of_a_reply_is_not_shown(tmp_path):
    page = f"<!DOCTYPE html><html><head><title>Sign  in</title></head><body>{'x' * 99_999}</body></html>"
    with pytest.raises(
        EndpointError, match=r"no chat server answers there \(.*a web page, 'Sign in'\)"
    ) as caught:
        asked(lambda body: page)
    assert len(str(caught.value)) < 300 and "/v1" in str(caught.value)
    good = answered({"content": "5"})
    samples, _ = asked(lambda body: (502, page) if "7?" in json.dumps(body) else good, count=9)
    (bad,) = [sample for sample in samples if sample.error]
    assert bad.retryable and bad.error == "HTTP 502: a web page, 'Sign in'"


@pytest.mark.parametrize(
    "reply", [{}, {"choices": []}, {"choices": None}, [], 5, {"choices": [{}]}, "data: {}"]
)
def test_a_server_that_never_gives_a_chat_completion_ends_the_run(reply):
    with pytest.raises(EndpointError, match="no chat server answers there"):
        asked(lambda body: reply)


# --- errors of one request, and of every request ----------------------------------------------------

LONG = "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens."
MODERATED = "The response was filtered due to the prompt triggering the content management policy."


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        (400, {"message": LONG, "code": "context_length_exceeded"}, "too long for the server"),
        (400, {"message": "max_tokens is too large. " + LONG, "param": "max_tokens"}, "too long"),
        (400, {"message": "prompt is too long: 210000 tokens > 200000 maximum"}, "too long"),
        (400, {"message": MODERATED, "code": "content_filter"}, "refused: the provider's moderation"),
        (
            400,
            {"message": "Input data may contain inappropriate content.", "code": "data_inspection_failed"},
            "refus",
        ),
        (403, {"message": "Your input was flagged", "metadata": {"reasons": ["violence"]}}, "refused"),
        (413, {"message": "Payload Too Large"}, "lower images.max_pixels"),
        (422, {"message": "the image is odd"}, "HTTP 422: the image is odd"),
        (400, "could not process the image", "HTTP 400: could not process the image"),
    ],
)
def test_what_is_wrong_with_one_request_fails_it_alone(status, error, told):
    good = answered({"content": "5"})
    bad = (status, {"error": error})
    samples, requests = asked(lambda body: bad if '"7?"' in json.dumps(body) else good, count=30)
    (failed,) = [sample for sample in samples if sample.error]
    assert failed.id == "7" and told in failed.error and not failed.retryable and requests == 30


def test_a_page_of_status_413_says_what_to_do():
    page = (413, "<html><head><title>413 Request Entity Too Large</title></head></html>")
    assert "lower images.max_pixels" in asked(lambda body: page)[0].error


def test_a_server_that_refuses_every_request_ends_the_run_soon():
    refusal = (400, {"error": {"message": "this model takes no images"}})
    with (
        LoopbackServer(reply=lambda body: refusal) as server,
        EndpointClient(
            Endpoint(base_url=server.url, model="m", section="teacher"), Sampling(max_new_tokens=9)
        ) as opened,
    ):
        questions = (
            Request(id=str(n), messages=(Message(role="user", parts=("?",)),)) for n in range(10_000)
        )
        with pytest.raises(
            EndpointError, match=r"(?s)refuses every request.*takes no images.*teacher\.request"
        ):
            list(opened.samples(questions))
        assert len(server.seen) < 400


def test_many_bad_requests_before_the_first_answer_do_not_end_the_run():
    """Refusals are fast and answers slow: the first replies may all be refusals."""

    async def slow():
        await asyncio.sleep(0.3)
        return answered({"content": "5"})

    def reply(body):
        number = int(body["messages"][0]["content"].rstrip("?"))
        return slow() if number % 2 else (400, {"error": {"message": "odd image"}})

    samples, _ = asked(reply, count=40, concurrency=16)
    assert sum(not sample.error for sample in samples) == 20 == sum(bool(sample.error) for sample in samples)


def test_an_answer_that_openai_refuses_to_cut_off_counts_as_cut_off():
    message = "Could not finish the message because max_tokens or model output limit was reached."
    sample, requests = asked(lambda body: (400, {"error": {"message": message}}))
    assert (sample.stop, sample.error, requests) == (StopReason.LENGTH, "", 1)


def test_the_first_answer_is_told_with_its_cost(tmp_path, capsys):
    from rlcs.progress import screen

    rows = [
        Row(problem=Problem(id=str(n), source="s", question=f"{n}?", answer="5"), response=None)
        for n in range(3)
    ]
    with (
        LoopbackServer(reply=lambda body: answered({"content": "\\boxed{5}"})) as server,
        screen("cold start", 3, quiet=True) as view,
    ):
        teacher = Teacher(base_url=server.url, model="m", prompt_price=5e5, completion_price=1e6)
        run(rows, teacher, folder=tmp_path, seed=1, view=view)
    shown = capsys.readouterr().out
    assert shown.count("first answer") == 1
    assert "30 prompt tokens, 9 answer tokens, cost 24; 3 such answers cost 72" in shown
