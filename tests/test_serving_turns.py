"""The messages of a request: all that clients send is read or named exactly, over a real server."""

import json

import httpx
import openai
import pytest

from bench.hostile import picture, serving
from rlcs.serving.protocol import ApiError
from rlcs.serving.turns import read_turns
from test_serving_image_sources import TEXT

URL = f"data:image/png;base64,{TEXT}"
IMAGE = {"type": "image_url", "image_url": {"url": URL}}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


PART = "messages.0.content.1"
WRONG = [
    ([{"role": "user", "content": None}], "messages.0.content", "null"),
    ([{"role": "user"}], "messages.0.content", "left out"),
    ([{"role": "user", "content": 5}], "messages.0.content", "not a number"),
    ([{"role": "user", "content": []}], "messages.0.content", "empty list"),
    ([{"role": "user", "content": {"type": "text", "text": "x"}}], "messages.0.content", "an object"),
    ([{"content": "x"}], "messages.0.role", "missing"),
    ([{"role": "robot", "content": "x"}], "messages.0.role", "'robot' is no role"),
    ([{"role": ["user"], "content": "x"}], "messages.0.role", "no role"),
    (["x"], "messages.0", "not a text"),
    ([{"role": "user", "content": "x"}, None], "messages.1", "null"),
    (user("x", 5), PART, "not a number"),
    (user("x", None), PART, "null"),
    (user("x", ["y"]), PART, "not a list"),
    (user("x", {}), f"{PART}.type", "missing"),
    (user("x", {"text": "y"}), f"{PART}.type", "missing"),
    (user("x", {"type": None}), f"{PART}.type", "missing"),
    (user("x", {"type": 5}), f"{PART}.type", "'5' is not supported"),
    (user("x", {"type": ["text"]}), f"{PART}.type", "not supported"),
    (user("x", {"type": "input_audio"}), f"{PART}.type", "'input_audio' is not supported"),
    (user("x", {"type": "image", "source": {}}), f"{PART}.type", "image_url"),
    (user("x", {"type": "y" * 500}), f"{PART}.type", "not supported"),
    (user("x", {"type": "text"}), f"{PART}.text", "null, or left out"),
    (user("x", {"type": "text", "text": 5}), f"{PART}.text", "a number"),
    (user("x", {"type": "input_text", "text": ["y"]}), f"{PART}.text", "a list"),
    (user("x", {"type": "image_url"}), f"{PART}.image_url", "left out"),
    (user("x", {"type": "image_url", "url": URL}), f"{PART}.image_url", "left out"),
    (user("x", {"type": "image_url", "image_url": [URL]}), f"{PART}.image_url", "a list"),
    (user("x", {"type": "image_url", "image_url": {}}), f"{PART}.image_url.url", "left out"),
    (user("x", {"type": "image_url", "image_url": {"url": 5}}), f"{PART}.image_url.url", "a number"),
    (user("x", {"type": "input_image", "file_id": "f"}), f"{PART}.image_url", "left out"),
    (user("x", {"type": "image_url", "image_url": "data:image/png;base64,!"}), f"{PART}.image_url", "base64"),
    ([{"role": "tool", "tool_call_id": "1", "content": "x"}], "messages.0.role", "vLLM"),
    ([{"role": "function", "name": "f", "content": "x"}], "messages.0.role", "vLLM"),
    (
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
        "messages.0.tool_calls",
        "vLLM",
    ),
    ([{"role": "assistant", "content": None}], "messages.0.content", "null"),
    ([{"role": "assistant", "content": ["x", IMAGE]}], f"{PART}.image_url", "not of assistant"),
    ([{"role": "system", "content": ["x", IMAGE]}], f"{PART}.image_url", "not of system"),
]


@pytest.mark.parametrize(("messages", "param", "says"), WRONG)
def test_what_is_wrong_is_named_exactly_and_briefly(messages, param, says):
    with pytest.raises(ApiError) as caught:
        read_turns(messages, max_images=8)
    error = caught.value.to_json()["error"]
    assert error["param"] == param and error["message"].startswith(f"{param}: ") and says in error["message"]
    assert caught.value.status == 400 and len(error["message"]) < 200


@pytest.fixture(scope="module")
def server(random_model_folder):
    with serving(random_model_folder) as server:
        yield server


def send(server, body, kind="application/json"):
    url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    content = body if isinstance(body, str) else json.dumps({"max_tokens": 6, "temperature": 0, **body})
    return httpx.post(url, content=content, headers={"Content-Type": kind}, timeout=60)


def text_of(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def test_parts_come_in_many_spellings(server):
    plain = text_of(send(server, {"messages": user(IMAGE, {"type": "text", "text": "What?"})}))
    for parts in (
        [{"type": "image_url", "image_url": URL}, "What?"],
        [{"type": "input_image", "image_url": URL}, {"type": "input_text", "text": "What?"}],
        [{**IMAGE, "image_url": {"url": URL + "\n", "detail": "high"}}, {"type": "text", "text": "What?"}],
        [{"type": "image_url", "image_url": f" DATA:IMAGE/PNG;Charset=utf-8;Base64,{TEXT}"}, "What?"],
    ):
        assert text_of(send(server, {"messages": user(*parts)})) == plain


def test_an_answer_can_be_sent_back_as_the_client_keeps_it(server):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    first = client.chat.completions.create(model="m", messages=user("One?"), max_tokens=6, temperature=0)
    answer = first.choices[0].message
    turns = [*user("One?"), answer, *user("Two?")]
    kept = client.chat.completions.create(model="m", messages=turns, max_tokens=6, temperature=0)
    bare = [*user("One?"), {"role": "assistant", "content": answer.content}, *user("Two?")]
    parts = [
        *user("One?"),
        {"role": "assistant", "content": [{"type": "output_text", "text": answer.content}]},
        *user("Two?"),
    ]
    for same in (bare, parts):
        again = client.chat.completions.create(model="m", messages=same, max_tokens=6, temperature=0)
        assert again.choices[0].message.content == kept.choices[0].message.content
    assert kept.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_developer_is_a_system_prompt(server):
    def prompted(role):
        head = [{"role": role, "content": "Be brief.", "name": "me"}]
        return send(server, {"messages": [*head, *user("One?")]}).json()

    assert prompted("developer")["usage"] == prompted("system")["usage"]


def test_of_several_images_the_broken_one_is_named(server):
    import base64

    whole = picture(28, 28)
    broken = base64.b64encode(whole.replace(b"IDAT", b"IDAT\0\0", 1)).decode()
    for url in (
        "data:image/png;base64,aGVsbG8=",
        f"data:image/png;base64,{broken}",
        "data:image/png;base64,",
    ):
        parts = [IMAGE, "x", {"type": "image_url", "image_url": {"url": url}}]
        error = send(server, {"messages": user(*parts)}).json()["error"]
        assert error["param"] == "messages.0.content.2.image_url", error
        assert error["code"] == "invalid_image_url"


def test_the_format_of_a_request_is_told_in_any_case(server):
    body = {"messages": user("One?")}
    for kind in (
        "Application/JSON; charset=UTF-8",
        "application/json;charset=utf-8",
        "APPLICATION/json ; charset=utf-8",
    ):
        assert text_of(send(server, body, kind))
    assert send(server, body, "text/plain").status_code == 415
    error = send(server, '{"messages": [').json()["error"]
    assert error["message"].startswith("the request is no JSON") and error["type"] == "invalid_request_error"
    assert "object" in send(server, "[1]").json()["error"]["message"]
