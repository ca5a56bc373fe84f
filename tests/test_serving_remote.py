"""A model in another program: a real server behind the chat page, and programs that are called like vLLM."""

import itertools
import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rlcs
from conftest import draw
from rlcs.cli.main import app
from rlcs.cli.serve import chosen_vllm
from rlcs.errors import EndpointError, ModelError, UserError
from rlcs.recipe.sampling import Endpoint
from rlcs.serving.chat_page import open_models
from rlcs.serving.defaults import read_defaults
from rlcs.serving.image_sources import ImageHosts
from rlcs.serving.remote import RemoteSession, serving
from rlcs.serving.session import Settings, split_answer
from test_server import metrics
from test_server import serving as served

SHORT = Settings(max_new_tokens=24)


@pytest.fixture(scope="module")
def server(random_model_folder):
    with served(random_model_folder, env={"RLCS_API_KEY": "secret"}) as pair:
        yield pair


def url_of(server) -> str:
    return f"http://127.0.0.1:{server[0]}/v1"


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(draw(56, 84).data)
    return path


def turns(picture, system=None):
    head = [{"role": "system", "content": [system]}] if system else []
    return [
        *head,
        {"role": "user", "content": [picture, "One?"]},
        {"role": "assistant", "content": ["One."]},
        {"role": "user", "content": ["And now?"]},
    ]


def test_a_served_model_says_what_it_says_here(server, picture, random_model_folder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    here, there = (
        rlcs.load(str(random_model_folder)),
        RemoteSession(Endpoint(base_url=url_of(server), model="")),
    )
    assert there.name == "m"
    for system in (None, "Be brief."):
        pieces = list(there.stream(turns(picture, system), SHORT))
        assert "".join(pieces) == here.stream(turns(picture, system), SHORT).answer.text
        assert len(pieces) > 5, "it streams"
    drawn = [
        "".join(there.stream(turns(picture), Settings(max_new_tokens=24, temperature=1, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_who_hangs_up_is_no_longer_answered(server, picture, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    stream = RemoteSession(Endpoint(base_url=url_of(server), model="m")).stream(
        turns(picture), Settings(max_new_tokens=3000)
    )
    next(stream)
    stream.close()
    end = time.monotonic() + 20
    ended = {'rlcs_requests_total{code="499"}': 1, "rlcs_engine_running": 0}
    while not ended.items() <= (seen := metrics(server)).items() and time.monotonic() < end:
        time.sleep(0.1)
    assert ended.items() <= seen.items()


def test_what_is_wrong_is_said(server, picture, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OTHER_API_KEY", "wrong")
    for changes, told in (
        ({"model": "x"}, "no model is called 'x'.*it has m"),
        ({"key_env": "OTHER_API_KEY"}, "OTHER_API_KEY, which holds a key that is refused"),
        ({"key_env": "NO_SUCH_API_KEY"}, "NO_SUCH_API_KEY, which is not set"),
        ({"base_url": url_of(server).removesuffix("/v1")}, "mostly ends in /v1"),
        ({"base_url": "http://127.0.0.1:9/v1"}, "does not answer.*start it"),
        ({"base_url": "localhost:8000"}, "not the URL of a server.*http://localhost"),
    ):
        with pytest.raises(EndpointError, match=f"(?s){told}"):
            RemoteSession(Endpoint.model_validate({"base_url": url_of(server), "model": "", **changes}))
    model = RemoteSession(Endpoint(base_url=url_of(server), model=""))
    with pytest.raises(EndpointError, match="max_tokens is at most"):
        model.stream(turns(picture), Settings(max_new_tokens=10**6))


@contextmanager
def canned(deltas, *, end="data: [DONE]\n\n"):
    """A server that streams these deltas and then says `end`, or hangs up without a word (None)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            self.send_response(200)
            body = json.dumps({"object": "list", "data": [{"id": "r", "object": "model"}]}).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            chunks = [json.dumps({"id": "x", "choices": [{"index": 0, "delta": each}]}) for each in deltas]
            events = [f"data: {chunk}\n\n" for chunk in [*chunks, json.dumps({"id": "x", "choices": []})]]
            for event in [*events, *([] if end is None else [end, ""])]:
                self.wfile.write(f"{len(event.encode()):x}\r\n{event}\r\n".encode())
            self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield RemoteSession(Endpoint(base_url=f"http://127.0.0.1:{server.server_port}/v1", model=""))
        server.shutdown()


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_that_a_server_keeps_apart_is_reasoning_here(name):
    deltas = [
        {"role": "assistant"},
        {name: "I count "},
        {name: "3."},
        {"content": "It is "},
        {"content": "3"},
    ]
    deltas.append({"content": " \\boxed{3}"})
    with canned(deltas) as model:
        text = "".join(model.stream([{"role": "user", "content": "How many?"}], SHORT))
    assert text == "<think>I count 3.</think>\nIt is 3 \\boxed{3}"
    assert split_answer(text) == ("I count 3.", "3")


@pytest.mark.fault("engines", "an answer that breaks off", "no answer")
@pytest.mark.parametrize(
    "end", [None, 'data: {"error": {"message": "out of memory"}}\n\n', "data: {oops\n\n"]
)
def test_an_answer_that_breaks_off_is_no_answer(end):
    with canned([{"content": "It "}], end=end) as model:
        stream = model.stream([{"role": "user", "content": "How many?"}], SHORT)
        assert next(stream) == "It "
        with pytest.raises(EndpointError, match="not to the end"):
            next(stream)


@pytest.fixture
def program(tmp_path) -> Path:
    """A program that is called like vLLM: our own server with the key that vLLM would get."""
    path = tmp_path / "bin" / "vllm"
    path.parent.mkdir()
    path.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "from pathlib import Path\n"
        "words = dict(zip(sys.argv[3::1], sys.argv[4::1]))\n"
        f"Path({str(tmp_path)!r}, words['--port']).write_text(' '.join(sys.argv))\n"
        "if 'broken' in sys.argv[2]:\n"
        "    sys.exit('ValueError: no such architecture')\n"
        "ours = ['--port', words['--port'], '--name', words['--served-model-name'], '--engine', 'local']\n"
        "key = ['--api-key', os.environ['VLLM_API_KEY']]\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'rlcs', 'serve', sys.argv[2], *ours, *key])\n"
    )
    path.chmod(0o755)
    return path


def test_chat_starts_a_vllm_for_each_model_and_ends_it(program, picture, random_model_folder, tmp_path):
    name = str(random_model_folder)
    found = open_models(["builtin", name], program=str(program), url=None, key_env="NO_SUCH_API_KEY")
    with found as (one, two):
        assert (one.name, two.name) == ("builtin", name)
        text = "".join(two.stream(turns(picture), SHORT))
        assert text == rlcs.load(name).stream(turns(picture), SHORT).answer.text
        told = [path.read_text() for path in tmp_path.glob("[0-9]*")]
        assert len(told) == 2 and all("--gpu-memory-utilization 0.45" in words for words in told)
    for model in (one, two):
        with pytest.raises(EndpointError, match="does not answer"):
            model.stream(turns(picture), SHORT)


@pytest.mark.fault("engines", "a vLLM for chat that ends at once", "a sentence with its last errors")
def test_a_vllm_that_ends_at_once_says_why(program):
    with (
        pytest.raises(ModelError, match=r"no such architecture(.|\n)*--engine local"),
        open_models(["owner/broken"], program=str(program), url=None, key_env=""),
    ):
        pass


def test_models_and_servers_side_by_side(server, random_model_folder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    mine, url = str(random_model_folder), url_of(server)
    for names, place, expected in (
        ([], url, ["m"]),
        (["m", "m"], url, ["m", "m"]),
        ([mine, url], None, [mine, "m"]),
        ([], None, ["builtin"]),
    ):
        with open_models(names, program=None, url=place, key_env="OPENAI_API_KEY") as found:
            assert [model.name for model in found] == expected
    done = CliRunner().invoke(app, ["chat", "--url", url, "--engine", "local"])
    assert isinstance(done.exception, UserError) and "engine of its own" in str(done.exception)


def test_vllm_is_found_beside_our_python_and_on_the_path(program, monkeypatch):
    monkeypatch.setenv("PATH", str(program.parent))
    assert chosen_vllm("auto") == str(program) and chosen_vllm("local") is None
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr(sys, "executable", str(program.parent / "python"))
    assert chosen_vllm("vllm") == str(program)
    program.unlink()
    assert chosen_vllm("auto") is None
    with pytest.raises(UserError, match="not installed"):
        chosen_vllm("vllm")


def test_vllm_computes_as_we_load():
    launch = serving("vllm", "builtin", name="x", key="k")
    words = launch.command(Path("/models/x"), 81)
    pairs = dict(itertools.pairwise(words))
    expected = {"--dtype": "float32", "--max-model-len": "-1", "--generation-config": "vllm"}
    assert expected.items() <= pairs.items() and "--enforce-eager" in words
    assert "k" not in words and launch.environment(0)["VLLM_API_KEY"] == "k"
    assert pairs["--allowed-media-domains"] == "nowhere.invalid" and pairs["--allowed-origins"] == "[]"
    assert launch.environment(0)["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert "--enable-auto-tool-choice" not in words


def test_vllm_samples_as_the_folder_says_where_a_request_does_not():
    for config, override in (({"do_sample": False}, {"temperature": 0}), ({"temperature": 0.7}, None)):
        launch = replace(serving("vllm", "builtin", name="x", key="k"), defaults=read_defaults(config))
        pairs = dict(itertools.pairwise(launch.command(Path("/models/x"), 81)))
        assert pairs["--generation-config"] == "auto"
        assert json.loads(pairs.get("--override-generation-config", "null")) == override


@pytest.mark.parametrize("name", ["*", "*.example.com", "example.com:8080"])
def test_hosts_that_vllm_does_not_know_are_refused(name):
    with pytest.raises(UserError, match="whole names"):
        replace(serving("vllm", "builtin", name="x", key="k"), image_hosts=ImageHosts(names=(name,)))


def test_a_server_that_refuses_fields_is_asked_without_them(picture):
    """As hosted models that think do: other names, and no temperature."""
    from loopback_server import LoopbackServer

    def reply(body):
        if body is None or "messages" not in body:
            return {"data": [{"id": "m", "object": "model"}]}
        for name in ("max_tokens", "temperature"):
            if name in body:
                return 400, {"error": {"message": f"Unsupported parameter: '{name}'", "param": name}}
        chunk = {"choices": [{"delta": {"content": "It is 5."}, "finish_reason": None}]}
        return f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"

    with LoopbackServer(reply=reply) as server:
        model = RemoteSession(Endpoint(base_url=server.url, model=""))
        assert "".join(model.stream(turns(picture), SHORT)) == "It is 5."
        assert "max_completion_tokens" in server.seen[-1] and len(server.seen) == 4
        assert "".join(model.stream(turns(picture), SHORT)) == "It is 5." and len(server.seen) == 5
