"""The fields of requests: by the recipe, by providers' quirks, and by what a real server refuses."""

import logging
from dataclasses import replace

import pytest

from loopback_server import LoopbackServer
from rlcs.data.rows import Row
from rlcs.distill.run import run
from rlcs.engines.openai_client import EndpointClient
from rlcs.engines.providers import Fields
from rlcs.engines.replies import fault
from rlcs.errors import EndpointError, RecipeError, RunFolderError
from rlcs.generation.judge import open_judge
from rlcs.recipe.loading import dump, load_recipe, read_section
from rlcs.recipe.sampling import Endpoint, RequestFields
from rlcs.recipe.schema import Teacher
from rlcs.records import Message, Problem, Request, Sampling

SAMPLING = Sampling(max_new_tokens=64, temperature=0.7, top_p=0.9)
ALL = {"max_tokens", "temperature", "top_p", "seed", "n"}
GOOD = {"choices": [{"message": {"content": "It is \\boxed{5}"}, "finish_reason": "stop"}]}


def fields(url="http://localhost:8000/v1", model="m", **request):
    server = Endpoint(base_url=url, model=model, request=RequestFields(**request))
    return Fields(server).body(SAMPLING, 7)


def refusing(**refused):
    """A server that refuses fields with these messages, in their order."""

    def reply(body):
        for name, message in refused.items():
            if name in body:
                return 400, {"error": {"message": message, "type": "invalid_request_error"}}
        return GOOD

    return LoopbackServer(reply=reply)


def asked(server, count=1, sampling=SAMPLING, **request):
    requests = [Request(id=str(n), messages=(Message(role="user", parts=("?",)),)) for n in range(count)]
    endpoint = Endpoint(base_url=server.url, model="m", section="teacher", request=RequestFields(**request))
    with EndpointClient(endpoint, sampling) as opened:
        return list(opened.samples(requests))


# --- the recipe's section ---------------------------------------------------------------------------


def test_every_key_of_the_section_changes_what_is_sent(monkeypatch):
    monkeypatch.setenv("SECOND_API_KEY", " abc-def-ghi\n")
    assert fields() == {"max_tokens": 64, "temperature": 0.7, "top_p": 0.9, "seed": 7, "n": 1}
    with LoopbackServer() as server:
        asked(
            server,
            max_tokens="max_completion_tokens",
            omit=("temperature", "top_p", "seed", "n"),
            extra={"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
            headers={"X-Key": "env:SECOND_API_KEY", "X-Title": "mine"},
        )
        (body,) = server.seen
        (head,) = server.headers
    assert {name: value for name, value in body.items() if name not in ("model", "messages")} == {
        "max_completion_tokens": 64,
        "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert "x-key: abc-def-ghi\r\n" in head.lower() and "x-title: mine" in head.lower()


def test_a_teacher_and_a_judge_send_what_the_recipe_says(tmp_path):
    words = [
        "teacher.model=m", "teacher.request.max_tokens=max_completion_tokens",
        "teacher.request.omit=[temperature, top_p, seed, n]", "teacher.request.extra.top_k=20",
        "grpo.reward.judge.model=m", "grpo.reward.judge.weight=1",
        "grpo.reward.judge.request.omit=[temperature]", "grpo.reward.judge.request.extra={top_k: 1}",
    ]  # fmt: skip
    with LoopbackServer() as server:
        words += [f"teacher.base_url={server.url}", f"grpo.reward.judge.base_url={server.url}"]
        recipe = load_recipe("quickstart", words).recipe
        (tmp_path / "again.yaml").write_text(dump(recipe))
        assert load_recipe(str(tmp_path / "again.yaml")).recipe == recipe
        problem = Problem(id="a", source="s", question="?", answer="4")
        run([Row(problem=problem, response=None)], recipe.teacher, folder=tmp_path / "a", seed=1)
        with open_judge(recipe.grpo.reward.judge, tmp_path / "b") as judge:
            judge.grade([(problem, "4")])
    taught, judged = server.seen
    assert set(taught) == {"model", "messages", "max_completion_tokens", "top_k"} and taught["top_k"] == 20
    assert set(judged) == {"model", "messages", "max_tokens", "top_p", "n", "top_k"} and judged["top_k"] == 1


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("extra={model: other}", "cannot set model: it is the key `model`"),
        ("extra={messages: []}", "cannot set messages"),
        ("extra={n: 4}", "cannot set n: every answer is a request of its own"),
        ("extra={stream: true}", "cannot set stream"),
        ("extra={temperature: 0.1}", "cannot set temperature: it is a key of its own"),
        ("extra=5", r"a mapping \{text: any value\}"),
        ("omit=[messages]", "one of max_tokens, temperature"),
        ("headers={Authorization: Bearer abc}", "Authorization looks like a secret"),
        ("headers={x-api-key: abc}", "x-api-key looks like a secret"),
        ("headers={'a b': x}", "characters that HTTP does not allow"),
        ("quirks=some", "one of auto, none"),
    ],
)
def test_what_cannot_be_sent_is_refused_in_the_recipe(word, told):
    with pytest.raises(RecipeError, match=told) as caught:
        load_recipe("quickstart", [f"teacher.request.{word}"])
    assert "abc" not in str(caught.value)
    with pytest.raises(RecipeError):
        read_section(RequestFields, [word], where="--request")


def test_other_fields_are_other_answers(tmp_path):
    row = Row(problem=Problem(id="a", source="s", question="?", answer="4"), response=None)
    with LoopbackServer() as server:
        teacher = Teacher(base_url=server.url, model="m")
        run([row], teacher, folder=tmp_path, seed=1)
        other = teacher.model_copy(update={"request": RequestFields(extra={"top_k": 1})})
        with pytest.raises(RunFolderError, match="extra was"):
            run([row], other, folder=tmp_path, seed=1)


# --- the table --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "model", "missing", "added"),
    [
        ("http://localhost:8000/v1", "gpt-5-of-mine", "", ""),
        ("https://api.openai.com/v1", "gpt-4o", "max_tokens", "max_completion_tokens"),
        ("https://api.openai.com/v1", "o4-mini", "max_tokens temperature top_p", "max_completion_tokens"),
        (
            "https://api.openai.com/v1",
            "gpt-5.2-mini",
            "max_tokens temperature top_p",
            "max_completion_tokens",
        ),
        ("https://api.openai.com/v1", "gpt-5-chat-latest", "max_tokens", "max_completion_tokens"),
        (
            "https://mine.openai.azure.com/openai/v1",
            "o3",
            "max_tokens temperature top_p",
            "max_completion_tokens",
        ),
        ("https://notopenai.com/v1", "o3", "", ""),
        ("https://api.anthropic.com/v1", "claude-sonnet-4-20250514", "top_p seed", ""),
        ("https://api.anthropic.com/v1", "claude-opus-4-7", "top_p seed temperature", ""),
        ("https://api.anthropic.com/v1", "claude-opus-4-1-20250805", "top_p seed", ""),
        ("https://api.anthropic.com/v1", "claude-sonnet-5-5", "top_p seed temperature", ""),
        ("https://generativelanguage.googleapis.com/v1beta/openai", "gemini-3-pro", "seed n", ""),
        ("https://api.mistral.ai/v1", "pixtral-large", "seed n", "random_seed"),
        ("https://api.moonshot.ai/v1", "kimi-k2.6", "temperature top_p", ""),
        ("https://api.moonshot.cn/v1", "moonshot-v1-8k", "", ""),
    ],
)
def test_known_servers_get_what_they_take(url, model, missing, added):
    assert set(fields(url, model)) == ALL - set(missing.split()) | set(added.split())
    assert set(fields(url, model, quirks="none")) == ALL
    assert "max_tokens" in fields(url, model, max_tokens="max_tokens"), "the recipe comes first"


# --- what servers refuse ----------------------------------------------------------------------------

OPENAI = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. "
    "Use 'max_completion_tokens' instead."
)
ONLY = (
    "Unsupported value: 'temperature' does not support 0.7 with this model. "
    "Only the default (1) value is supported."
)
EXTRA = "Extra inputs are not permitted"


def test_a_refused_max_tokens_is_sent_under_its_new_name_from_then_on(caplog):
    with refusing(max_tokens=OPENAI) as server, caplog.at_level(logging.WARNING, logger="rlcs"):
        samples = asked(server, count=60)
    assert len(samples) == 60 and not any(sample.error for sample in samples)
    assert sum("max_tokens" in body for body in server.seen) <= 32, "those that were under way at first"
    assert all(body["max_completion_tokens"] == 64 for body in server.seen if "max_tokens" not in body)
    (record,) = caplog.records
    assert "max_completion_tokens is sent instead (teacher.request)" in record.getMessage()


def test_all_fields_may_be_refused_one_after_the_other(tmp_path):
    refused = {
        "max_tokens": OPENAI, "temperature": ONLY, "top_p": "`top_p` is deprecated for this model.",
        "seed": 'Invalid JSON payload received. Unknown name "seed": Cannot find field.',
        "n": "[{'type': 'extra_forbidden', 'loc': ['body', 'n'], 'msg': 'Extra inputs are not permitted'}]",
    }  # fmt: skip
    with refusing(**refused) as server:
        teacher = Teacher(base_url=server.url, model="m", max_samples=4, enough_kept=0)
        problem = Problem(id="a", source="s", question="?", answer="5")
        kept = run([Row(problem=problem, response=None)], teacher, folder=tmp_path, seed=1)
    assert len(kept) == 1 and set(server.seen[-1]) == {"model", "messages", "max_completion_tokens"}


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        ({"message": OPENAI, "param": "max_tokens", "code": "unsupported_parameter"}, "max_tokens"),
        ({"message": "invalid temperature: only 1 is allowed for this model"}, "temperature"),
        ({"message": "temperature and top_p cannot both be specified for this model."}, "top_p"),
        ({"message": "litellm: m does not support parameters: ['seed']"}, "seed"),
        ({"message": "Unrecognized request argument supplied: seed"}, "seed"),
        ({"message": "Unrecognized request argument supplied: n"}, "n"),
        ({"message": "n > 1 is not supported"}, "n"),
        ({"message": "The 'seed' parameter is not enabled for this api version."}, "seed"),
        ({"message": "seed must be a 16-bit integer"}, "seed"),
        ({"message": "参数 temperature 不支持"}, "temperature"),
        ({"message": {"detail": [{"loc": ["body", "n"], "msg": EXTRA}]}}, "n"),
        ({"message": 'Unknown name "n": Cannot find field.', "status": "INVALID_ARGUMENT"}, "n"),
        ({"message": "the number of images must be at most 1"}, None),
        ({"message": "Invalid image: unsupported format, n = 3"}, None),
    ],
)
def test_the_refused_field_is_found_in_the_words_of_many_servers(error, blamed):
    for body in ({"error": error}, [{"error": error}], error):
        learner = Fields(Endpoint(base_url="http://x/v1", model="m"))
        before = learner.body(SAMPLING, 7)
        sentence = learner.learn(fault(400, body), before)
        gone = set(before) - set(learner.body(SAMPLING, 7))
        assert gone == (set() if blamed is None else {blamed}) and bool(sentence) == bool(gone)


def test_the_refused_field_is_found_in_the_errors_of_fastapi():
    learner = Fields(Endpoint(base_url="http://x/v1", model="m"))
    body = {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": EXTRA}]}
    assert "refuses seed" in learner.learn(fault(422, body), learner.body(SAMPLING, 7))


@pytest.mark.parametrize(
    ("refused", "request_fields", "told"),
    [
        (
            {"top_k": "Unknown parameter: 'top_k'"},
            {"extra": {"top_k": 5}},
            "take top_k out of teacher.request.extra",
        ),
        (
            {"temperature": "temperature: must be between 0 and 0.5"},
            {},
            r"teacher\.request\.omit=\[temperature\]",
        ),
        ({"max_tokens": "max_tokens is too large: 64. At most 32."}, {}, "another limit of tokens"),
        ({"max_tokens": OPENAI}, {"quirks": "none"}, r"teacher\.request\.max_tokens=max_completion_tokens"),
        ({"max_tokens": OPENAI}, {"max_tokens": "max_tokens"}, r"request\.max_tokens=max_completion_tokens"),
        ({"seed": "'seed' is not supported"}, {"quirks": "none"}, r"teacher\.request\.omit=\[seed\]"),
        ({"max_tokens": OPENAI, "max_completion_tokens": "unknown field"}, {}, "refuses every request"),
    ],
)
def test_what_only_the_user_can_decide_ends_the_run_with_the_key_to_set(refused, request_fields, told):
    with refusing(**refused) as server:
        with pytest.raises(EndpointError, match=told):
            asked(server, count=500, **request_fields)
        assert len(server.seen) < 250, "half of the requests were not even sent"


def test_top_p_of_one_may_be_left_out_whatever_the_complaint():
    with refusing(top_p="top_p must be above 0 and below 1") as server:
        assert not asked(server, sampling=replace(SAMPLING, top_p=1.0))[0].error
        with pytest.raises(EndpointError, match="give top_p another value"):
            asked(server)
