"""What people get from a real vLLM on the CPU: a server, an exported folder, a measurement, a teacher.

Run by `make vllm-test` with `test_vllm.py`, which says what they need.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from rlcs.cli.main import app
from rlcs.data import puzzles
from rlcs.data.images import data_uri, encoded_image, open_image
from rlcs.data.rows import Row
from rlcs.distill.run import run as distil
from rlcs.errors import EndpointError
from rlcs.publish.export import Export, export
from rlcs.recipe.sampling import Endpoint, EngineSettings
from rlcs.recipe.schema import Teacher
from rlcs.records import Problem
from rlcs.serving.remote import RemoteSession
from rlcs.serving.session import Settings
from rlcs.storage import read_jsonl
from test_benchmarks import vision, write_jsonl
from test_distributed import free_port
from test_vllm import CPU, START_LIMIT_S, program

pytestmark = pytest.mark.skipif(program() is None, reason="no vLLM: `make vllm-test`")

LIMIT = 32
"""Longest answer of these tests, in tokens."""
KEY = "a-long-secret"


@pytest.fixture(autouse=True, scope="module")
def _on_a_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return list(puzzles.load("puzzles", split="test", count=12, seed=3))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "puzzler"
    export(Export(model="builtin", out=folder))
    return folder


@pytest.fixture(scope="module")
def ours(exported: Path, problems: list[Problem]) -> list[str]:
    """The greedy answers of `rlcs generate`, a file of questions at a time."""
    rows, answers = exported.parent / "rows.jsonl", exported.parent / "answers.jsonl"
    with rows.open("w") as out:
        for number, problem in enumerate(problems):
            (rows.parent / f"{number}.png").write_bytes(problem.images[0].data or b"")
            row = {"id": problem.id, "question": problem.question_with_choices, "images": [f"{number}.png"]}
            out.write(json.dumps(row) + "\n")
    words = ["generate", exported, "--input", rows, "--output", answers, "--max-tokens", LIMIT]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    texts = [row["response"] for row in read_jsonl(answers)]
    assert len(set(texts)) > 3, "the answers tell nothing"
    return texts


@pytest.fixture(scope="module")
def server(exported: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`rlcs serve` with vLLM, as a process of its own: its address, and the process."""
    port = free_port()
    words = ["serve", exported, "--engine", "vllm", "--port", port, "--name", "puzzler", "--max-images", 2]
    words += ["--cors-origin", "https://a.example", "--tool-parser", "hermes"]
    vllm = Path(str(program())).parent
    log = exported.parent / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlcs", *map(str, words)],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"RLCS_API_KEY": KEY, "PATH": f"{vllm}:{os.environ['PATH']}"},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_LIMIT_S
        while not is_well(url):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_well(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def asked(problem: Problem, url: str | None = None) -> list[dict]:
    image = {"type": "image_url", "image_url": {"url": url or data_uri(encoded_image(problem.images[0]))}}
    return [{"role": "user", "content": [image, {"type": "text", "text": problem.question_with_choices}]}]


def client_of(url: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=600)


def test_an_exported_folder_answers_alike_in_vllm_transformers_and_rlcs(
    server, exported: Path, problems: list[Problem], ours: list[str]
) -> None:
    client = client_of(server[0])
    theirs = [
        client.chat.completions.create(
            model="puzzler", messages=asked(problem), temperature=0, max_tokens=LIMIT
        )
        for problem in problems
    ]
    assert [reply.choices[0].message.content for reply in theirs] == ours
    model = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(exported)
    plain = []
    for problem in problems:
        turns = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": problem.question_with_choices}],
            }
        ]
        text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        images = [open_image(problem.images[0], limit=10**7)]
        inputs = processor(text=[text], images=images, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
        plain.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert plain == ours


def test_a_vllm_of_rlcs_serve_streams_and_keeps_strangers_out(
    server, problems: list[Problem], ours: list[str]
) -> None:
    url, _ = server
    client = client_of(url)
    assert [model.id for model in client.models.list()] == ["puzzler"]

    def pieces(**more) -> list[str]:
        chunks = client.chat.completions.create(
            model="puzzler", messages=asked(problems[0]), temperature=0, stream=True, **more
        )
        return [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]

    assert "".join(pieces(max_tokens=LIMIT)) == ours[0]
    # Of a long answer: a busy server sends the few tokens of a short one at once.
    assert sum(map(bool, pieces(max_tokens=200, extra_body={"ignore_eos": True}))) > 1
    for key in ("none", KEY[:-1]):
        with pytest.raises(openai.AuthenticationError):
            client_of(url, key).chat.completions.create(model="puzzler", messages=asked(problems[0]))
    three = [{"role": "user", "content": [asked(problems[0])[0]["content"][0]] * 3}]
    with pytest.raises(openai.BadRequestError, match="image"):
        client.chat.completions.create(model="puzzler", messages=three)
    for address in ("http://127.0.0.1:9/a.png", "https://example.org/a.png", "file:///etc/hostname"):
        with pytest.raises(openai.APIStatusError, match=r"allowed|local"):
            # A client of its own, because vLLM hangs up after some refusals.
            client_of(url).chat.completions.create(model="puzzler", messages=asked(problems[0], address))


def test_json_mode_tools_and_pages_of_other_origins(server, problems: list[Problem]) -> None:
    def ask(**settings):
        client = client_of(server[0])
        return client.chat.completions.create(model="puzzler", messages=asked(problems[0]), **settings)

    schema = {"name": "answer", "schema": {"type": "string", "enum": ["yes", "no"]}}
    reply = ask(response_format={"type": "json_schema", "json_schema": schema}, max_tokens=LIMIT)
    assert json.loads(reply.choices[0].message.content) in ("yes", "no")
    properties = {"n": {"type": "string", "enum": ["a"]}}
    count = {"name": "count", "parameters": {"type": "object", "properties": properties, "required": ["n"]}}
    reply = ask(tools=[{"type": "function", "function": count}], tool_choice="required", max_tokens=100)
    assert reply.choices[0].message.tool_calls[0].function.name == "count"
    for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
        headers = {"origin": origin, "access-control-request-method": "POST"}
        reply = httpx.options(f"{server[0]}/v1/chat/completions", headers=headers)
        assert reply.headers.get("access-control-allow-origin") == allowed


def test_the_chat_page_talks_to_it(server, problems: list[Problem], ours: list[str], monkeypatch, tmp_path):
    url, _ = server
    monkeypatch.setenv("TEST_API_KEY", KEY)
    place = Endpoint(base_url=f"{url}/v1", model="", key_env="TEST_API_KEY")
    model = RemoteSession(place)
    assert model.name == "puzzler"
    path = tmp_path / "a.png"
    path.write_bytes(problems[0].images[0].data or b"")
    turns = [{"role": "user", "content": [path, problems[0].question_with_choices]}]
    pieces = list(model.stream(turns, Settings(max_new_tokens=LIMIT)))
    assert "".join(pieces) == ours[0]
    with pytest.raises(EndpointError, match=r"max_tokens|context"):
        model.stream(turns, Settings(max_new_tokens=100_000))


def test_sigterm_ends_it(server) -> None:
    url, process = server
    process.send_signal(signal.SIGTERM)
    process.wait(600)
    assert not is_well(url)


def test_a_measurement_by_vllm_is_the_local_one(tmp_path: Path, problems: list[Problem]) -> None:
    folder, rows = tmp_path / "mini" / "mathvision", []
    (folder / "images").mkdir(parents=True)
    for number, problem in enumerate(problems):
        (folder / "images" / f"{number}.png").write_bytes(problem.images[0].data or b"")
        rows.append(
            vision(
                number, question=f"{problem.question_with_choices}<image1>", options=[], answer=problem.answer
            )
        )
    write_jsonl(folder / "testmini.jsonl", rows)
    shared = ["--benchmarks", "mathvision", "--split", "testmini", "--data", tmp_path / "mini"]
    shared += ["--max-tokens", LIMIT, "--json"]
    vllm = [
        "--engine",
        "vllm_server",
        "--rollout",
        f"executable={program()}",
        "--rollout",
        "memory_share=0.1",
        "--rollout",
        f"start_limit_s={START_LIMIT_S}",
    ]
    for name, words in {"local": [], "vllm": vllm}.items():
        command = ["eval", "m=builtin", *shared, "--out", tmp_path / name, *words]
        done = CliRunner().invoke(app, [str(word) for word in command])
        assert done.exit_code == 0, done.output
    said = {
        name: {
            (row["id"], row["index"]): (row["response"], row["tokens"], row["stop"])
            for row in read_jsonl(tmp_path / name / "m" / "mathvision" / "predictions.jsonl")
        }
        for name in ("local", "vllm")
    }
    assert said["local"] == said["vllm"] and len(said["vllm"]) == len(problems)
    assert len(set(said["vllm"].values())) > 3
    left = {path.name for path in (tmp_path / "vllm" / "rollout").iterdir()}
    assert left == {"vllm-0.log"}, "weights were written"


def test_a_teacher_by_vllm_is_the_local_one(tmp_path: Path, problems: list[Problem]) -> None:
    said = {}
    for engine in ("local", "vllm_colocated"):
        teacher = Teacher(
            kind="local",
            model="builtin",
            rollout=EngineSettings(engine=engine, memory_share=0.1, executable=program() or "vllm"),
            max_tokens=LIMIT,
            temperature=0,
            keep="all",
        )
        rows = [Row(problem=problem, response=None) for problem in problems]
        distil(rows, teacher, folder=tmp_path / engine, seed=1)
        samples = read_jsonl(tmp_path / engine / "samples.jsonl")
        said[engine] = {row["id"]: (row["response"], row["tokens"]) for row in samples}
    assert said["local"] == said["vllm_colocated"] and len(said["local"]) == len(problems)
    assert len(set(said["local"].values())) > 3
