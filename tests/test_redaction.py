"""No secret is in any file or message, in any form; nothing is sent that nobody asked for."""

import base64
import html
import itertools
import json
import logging
import os
import subprocess
import sys
import time
from functools import partial
from urllib.parse import quote, quote_plus

import pytest

import warm
from conftest import SMALL_STUDY
from loopback_server import LoopbackServer, last_text
from rlcs.engines.vllm.process import Process
from rlcs.engines.vllm.server import Launch
from rlcs.errors import UserError
from rlcs.recipe.sampling import Rollouts
from rlcs.redaction import RedactingFormatter, is_key, redacted, shown
from rlcs.serving.remote import serving
from rlcs.storage import append_jsonl, atomic_write, read_jsonl, write_json
from test_benchmarks import vision_folder

KEY = "sk-pl/ant+ed=\"9&7'<x>-0123456789"


def forms(key):
    """The key as formats write it, each by itself and behind other bytes."""
    data = key.encode()
    return {
        "plain": key,
        "URL": quote(key),
        "whole URL": quote(key, safe=""),
        "form": quote_plus(key),
        "JSON": json.dumps(key)[1:-1],
        "JSON in JSON": json.dumps(json.dumps(key))[3:-3],
        "JSON of PHP": json.dumps(key)[1:-1].replace("/", "\\/"),
        "JSON of Go": json.dumps(key)[1:-1].replace("&", "\\u0026").replace("<", "\\u003c"),
        "escaped": "".join(f"\\u{ord(char):04x}" for char in key),
        "percents": "".join(f"%{ord(char):02X}" for char in key),
        "HTML": html.escape(key),
        "entities": "".join(f"&#{ord(char)};" for char in key),
        "repr": repr(key)[1:-1],
        "hexadecimal": data.hex(),
        "base64": base64.b64encode(data).decode(),
        "Bearer in base64": base64.b64encode(b"Bearer " + data).decode(),
        "pair in base64": base64.b64encode(b"me:" + data + b"...").decode(),
        "base64 of URLs": base64.urlsafe_b64encode(b"a:" + data).decode(),
    }  # fmt: skip


def leaks(text):
    """The forms of which a long part is in the text."""
    return [name for name, form in forms(KEY).items() if form[8:24] in text or form[-20:-4] in text]


@pytest.mark.fault("secrets", "a key in the form of another format", "***")
@pytest.mark.parametrize("form", forms(KEY))
def test_a_key_is_hidden_in_every_form(form, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", KEY)
    text = forms(KEY)[form]
    assert leaks(text) and not leaks(redacted(f"a {text} b"))
    assert redacted(f"a {text} b").startswith("a ") and redacted(f"a {text} b").endswith(" b")


def test_what_is_no_secret_stays(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "EMPTY")
    monkeypatch.setenv("HOME_PAGE", "https://example.org/page")
    assert redacted("EMPTY https://example.org/page") == "EMPTY https://example.org/page"
    assert is_key("OPENAI_API_KEY") and not is_key("HOME") and not is_key("GITHUB_TOKEN")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("http://me:pa55word@x/v1", "http://***@x/v1"),
        ("https://pa55word@x:99999/v1?a=1&api_key=pa55word&b=2#c", "https://***@x:99999/v1?a=1&api_key=***&b=2#c"),
        ("see http://x/v1?access_token=pa55word.", "see http://x/v1?access_token=***"),
        ("mail a@b.org, http://x/@home", "mail a@b.org, http://x/@home"),
    ],
)  # fmt: skip
def test_secrets_in_addresses_are_not_shown(text, seen):
    assert shown(text) == seen
    assert "pa55word" not in str(UserError(text, where=text, fix=text))


def test_files_logs_and_errors_leave_keys_out(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", KEY)
    monkeypatch.setenv("OTHER_API_KEY", "question")  # a placeholder that is a name in files
    write_json(tmp_path / "a.json", {"text": KEY, "question": 1})
    append_jsonl(tmp_path / "b.jsonl", [{"text": KEY, "question": 2}])
    atomic_write(tmp_path / "c.html", html.escape(KEY))
    record = logging.LogRecord("rlcs", logging.INFO, "", 0, "key %s", (KEY,), None)
    texts = [path.read_text() for path in tmp_path.iterdir()] + [RedactingFormatter().format(record)]
    assert not leaks("\n".join([*texts, str(UserError(KEY, where=KEY, fix=KEY))]))
    assert read_jsonl(tmp_path / "b.jsonl") == [{"text": "***", "question": 2}]


JUDGED = itertools.chain(["an answer"], itertools.cycle(["four", "three", "five"]))
"""How the server replies to a judge's requests, which do not begin with the name of a question."""


def quoting(body):
    """Answers and errors that quote the key in all its forms, in headers too."""
    asked = next(JUDGED) if body["model"] == "j" else last_text(body)[:20]
    said = " ".join([asked, *forms(KEY).values()])
    text = json.dumps({"choices": [{"message": {"content": f"{said} \\boxed{{4}}"}, "finish_reason": said}]})
    status = "200 OK"
    if "three" in said:
        status, text = "400 Bad", json.dumps({"error": {"message": said, "code": said, "param": said}})
    if "four" in said:
        status, text = "500 Oops", f"<html><title>{said}</title></html>"
    if "five" in said:
        text = json.dumps({"error": said})
    if "six" in said:
        text = json.dumps({said: said})
    head = f"HTTP/1.1 {status}\r\nX-Key: {KEY}\r\nSet-Cookie: key={quote(KEY)}\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode()


@pytest.mark.fault(
    "secrets", "a teacher, a model and a judge that quote the key in all they send", "in no file or message"
)
def test_a_run_writes_and_prints_no_key(tmp_path):
    names = ("one", "two", "three", "four", "five", "six", "seven")
    lines = [json.dumps({"question": f"{name}?", "answer": "4"}) for name in names]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    vision_folder(tmp_path / "mini" / "mathvision", 3)
    environment = {**os.environ, "PLANTED_API_KEY": KEY, "RLCS_API_KEY": KEY}
    with LoopbackServer(reply=quoting) as server:
        teacher = [f"teacher.base_url={server.url}", "teacher.model=m", "teacher.key_env=PLANTED_API_KEY"]
        data = [f"data.problems={tmp_path}/rows.jsonl", "teacher.max_retries=0", "study.preflight=off"]
        distilled = [
            "distill",
            "quickstart",
            "--out",
            str(tmp_path / "run"),
            *teacher,
            *data,
            "teacher.keep=all",
        ]
        judge = ["--judge-url", server.url, "--judge-model", "j", "--judge-key-env", "PLANTED_API_KEY"]
        measured = ["eval", "m", "--base-url", server.url, "--key-env", "PLANTED_API_KEY", *judge]
        measured += ["--benchmarks", "mathvision", "--data", str(tmp_path / "mini"), "--split", "testmini"]
        commands = [distilled, *([*measured, "--out", str(tmp_path / name)] for name in ("eval", "refused"))]
        for words in commands:
            program = [sys.executable, "-m", "rlcs", *words]
            done = warm.run(program, capture_output=True, text=True, env=environment, cwd=tmp_path)
            assert "Traceback" not in done.stderr, done.stderr
            assert not leaks(done.stdout) and not leaks(done.stderr), done.stderr
        judged = [body for body in server.seen if body["model"] == "j"]
        assert len(judged) >= 2, "of a judge there are errors, too"
        assert len(server.seen) >= 10 and f"Bearer {KEY}" in server.headers[0]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"samples.jsonl", "predictions.jsonl"}
    assert not [(path, found) for path in written if (found := leaks(path.read_text(errors="replace")))]


@pytest.mark.fault("secrets", "a vLLM that writes its whole environment into its log", "no key is there")
def test_programs_with_logs_of_their_own_get_no_keys(tmp_path, monkeypatch):
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\nenv; exit 1\n")
    program.chmod(0o755)
    for name in ("SOME_API_KEY", "MINE", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("RLCS_KEYS", "MINE")
    monkeypatch.setenv("HF_TOKEN", "hf-0123456789")
    settings = Rollouts(engine="vllm_server", executable=str(program))
    training = Launch(settings=settings, dtype="float32", max_tokens=8, max_rows=1)
    for launch in (training, serving(str(program), "builtin", key="own-0123456789")):
        log = tmp_path / "vllm.log"
        process = Process(partial(launch.command, tmp_path), launch.environment(0), log)
        while process.runs:
            time.sleep(0.05)
        assert "hf-0123456789" in log.read_text() and not leaks(log.read_text())


_FORBIDDEN = """
import importlib, os, pkgutil, sys
def forbid(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        raise SystemExit(f"{event} {arguments} at import")
sys.addaudithook(forbid)
import rlcs
for module in pkgutil.walk_packages(rlcs.__path__, "rlcs."):
    if not module.name.endswith("__main__") and "vllm_plugin" not in module.name:
        importlib.import_module(module.name)
print(len([name for name in sys.modules if name.startswith("rlcs.")]))
"""


@pytest.mark.fault("secrets", "every module imported where sockets are forbidden", "no connection is made")
def test_importing_connects_to_nothing():
    done = subprocess.run([sys.executable, "-c", _FORBIDDEN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 200


def test_libraries_send_no_statistics_unless_asked():
    code = "import os; from rlcs.cli import main; main.app = lambda **_: print(dict(os.environ)); main.main()"
    settings = ("HF_HUB_DISABLE_TELEMETRY", "GRADIO_ANALYTICS_ENABLED", "DO_NOT_TRACK")
    others = {name: value for name, value in os.environ.items() if name not in settings}
    for given, wanted in (("", "1"), ("0", "0")):
        environment = {**others, **({"HF_HUB_DISABLE_TELEMETRY": given} if given else {})}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert f"'HF_HUB_DISABLE_TELEMETRY': '{wanted}'" in done.stdout, done.stderr
        assert "'GRADIO_ANALYTICS_ENABLED': 'False'" in done.stdout and "'DO_NOT_TRACK': '1'" in done.stdout


_WATCH = """
import os, sys
LOCAL = (None, "", "localhost", "::1", "0.0.0.0", "::")
def watch(event, arguments):
    place = None
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        place = arguments[1][0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        place = arguments[0]
    place = place.decode() if isinstance(place, bytes) else place
    if place not in LOCAL and not place.startswith("127."):
        with open(os.environ["SEEN_CONNECTIONS"], "a") as file:
            file.write(f"{event} {place} {sys.argv}\\n")
sys.addaudithook(watch)
"""
_OUTSIDE = "import socket; s = socket.socket(); s.setblocking(False); s.connect_ex(('192.0.2.1', 9))"


@pytest.mark.fault(
    "secrets", "whole commands and their processes, watched", "connections to this machine alone"
)
def test_commands_speak_to_nobody(tmp_path, pytestconfig):
    (tmp_path / "sitecustomize.py").write_text(_WATCH)
    seen = tmp_path / "seen"
    environment = {**os.environ, "SEEN_CONNECTIONS": str(seen)}
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    subprocess.run([sys.executable, "-c", _OUTSIDE], env=environment, check=False)
    assert "192.0.2.1" in seen.read_text(), "the watch works"
    seen.unlink()
    words = ["distill", "quickstart", "data.cold_start=builtin:puzzles?count=4&seed=1"]
    if pytestconfig.getoption("every_kill"):
        short = ["grpo.steps=1", "grpo.max_new_tokens=8", "eval.max_new_tokens=4"]
        words = ["run", "quickstart", *SMALL_STUDY, *short]
    command = [sys.executable, "-m", "rlcs", *words, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not seen.exists(), seen.read_text()
