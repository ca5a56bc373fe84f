"""Every command of README, CONTRIBUTING and docs/ runs to its end, in a folder with what the pages name.

Commands run in this process, page by page and in their order, on the built-in model with a recipe of seconds.
What is put in the place of a page's names and sizes, and what runs elsewhere, stands in the tables below.
"""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from conftest import draw
from hub_server import HubServer
from loopback_server import LoopbackServer
from rlcs.cli.main import app
from rlcs.evals.benchmarks import list_benchmarks
from rlcs.recipe.loading import list_recipes
from rlcs.serving import chat_page, web
from test_benchmarks import VERSE, VISTA, vision, we, write_image, write_jsonl
from test_distributed import free_port
from test_docs import FENCE, PAGES, ROOT, after_rlcs, commands

SUBSTITUTES = {
    r"https?://[^\s/\]]+/v1": "SERVER",  # a server that answers every question at once
    r"\b(?<!model=)Qwen/[\w.-]+(?! --base-url)": "builtin",  # no download
    r"/shared/": "shared/",
    r"(?<=grpo.teacher.model=)teacher\b": "runs/other",
    r"(?<=@)80\b|(?<=--step )80\b": "2",  # a run of two steps has these checkpoints
    r"(?<=@)40\b": "1",
    r"(?<=--port )\d+": "PORT",  # any that is free
    r"\bFOLDER\b": "official",
    r"(?<=grpo.steps=)\d+(?!.*rule=probe)": "2",
    r"(?<=grpo.steps=)\d+(?=.*rule=probe)": "8",  # trials need steps that their losers may take
    r"(?<=sft.handover.round_steps=)\d+": "1",
    r"(?<=sft.epochs=)[\d.]+": "1",
    r"(?<=validation.problems=)\d+": "4",
}
"""Patterns in a command, and what stands there when it runs."""
URL = next(iter(SUBSTITUTES.items()))

SHORT = {
    "rollout.engine": "local",  # vLLM is not installed here
    "sft.epochs": "1",
    "sft.batch_size": "4",
    "grpo.steps": "2",
    "grpo.prompts_per_step": "4",
    "grpo.group_size": "2",
    "grpo.optimizer_steps": "1",
    "grpo.max_new_tokens": "8",
    "grpo.save_every": "1",
    "grpo.keep_checkpoints": "2",
    "grpo.keep_steps": "[]",
    "eval.max_new_tokens": "8",
    "teacher.max_tokens": "16",
    "model.name": "builtin",
}
"""What makes a run a matter of seconds: set for every command that trains where it does not set them."""
PUZZLES = (
    "data.cold_start=builtin:puzzles?count=4&seed=1",
    "data.rl=builtin:puzzles?count=8&seed=2",
    "data.test=builtin:puzzles?split=test&count=4&seed=3",
)
"""The data of shipped recipes, where a command names none."""
OPTIONS = {
    "eval": "--data official --limit 2 --max-tokens 8",
    "generate": "--max-tokens 8",
    "serve": "--port PORT",
    "chat": "--port PORT",
    "report": "--port PORT",
    "data overlap": "--data official",
    "coldstart": "--seeds 1",
}
"""Options that are added to a command, but for those that it has itself."""
UNDER_TORCHRUN = ("parallel.compute_dtype=same", "parallel.reduce_dtype=same")
"""Without torchrun there is one process, which works in the number format of its weights."""

ELSEWHERE = {
    r"vllm|rollout\.(engine|urls)|multi-node|8xgpu": "needs vLLM: tests/test_vllm*.py start a real one",
    r"doctor \S+ --replay": "needs a run that collapsed: tests/test_replay.py",
    r"doctor --gpu": "needs a GPU: tests/test_doctor_gpu.py",
    r"lora\.four_bit": "needs bitsandbytes: tests/test_lora.py",
    r"parallel\.cpu_offload": "needs torchrun: tests/test_fsdp.py",
}
"""Patterns of commands that do not run here, and where what they do is tested."""
EXIT_CODES = {"doctor": (0, 1)}
"""Exit codes that pages state, but for 0: `doctor` ends with 1 when it finds something."""

TRAINING = ("run", "sft", "grpo", "ablate", "coldstart", "quickstart", "distill")
ENVIRONMENT = {
    "KEY": "secret",
    "OPENAI_API_KEY": "secret",
    "EXAMPLE_API_KEY": "secret",
    "PROJECT_API_KEY": "mine",
    "WANDB_MODE": "offline",
    "HF_TOKEN": "hf_test",
    "COLUMNS": "200",
}
"""Variables that pages name, and those that keep trackers and the hub's client on this machine."""


def reply(numbers: Iterator[int], body: Mapping[str, Any]) -> object:
    """The server's list of models, or an answer that teachers, judges and MathVerse's scorer can read.

    Every third answer to a question of dots is wrong, so that problems have pass rates.
    """
    if not body:
        return {"object": "list", "data": [{"id": name} for name in ("base", "trained")]}
    answer = f"red, red, blue. That makes \\boxed{{{2 if next(numbers) % 3 else 1}}}\nyes"
    if "Write 1 if they agree" in str(body["messages"]):
        answer = "1"
    message = {"role": "assistant", "content": answer}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 10, "completion_tokens": 9, "total_tokens": 19}
    head = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
    return {**head, "choices": [choice], "usage": usage}


# ------------------------------------------------------------------------ what the reader has on the disk


def write_own_data(folder: Path) -> None:
    """What a stranger brings: pictures of coloured dots that rlcs never drew, and questions about them."""
    (folder / "img").mkdir()
    rng = random.Random(7)
    number = 0
    for name, size in (("cold_start", 4), ("train", 8), ("test", 4), ("problems", 16)):
        rows = []
        for _ in range(size):
            number += 1
            colours = [rng.choice(["red", "blue"]) for _ in range(3)]
            image = Image.new("RGB", (56, 56), "white")
            for place, colour in enumerate(colours):
                ImageDraw.Draw(image).ellipse((2 + 18 * place, number, 16 + 18 * place, number + 14), colour)
            image.save(folder / "img" / f"{number}.png")
            reds = colours.count("red") if name != "problems" else 2
            row = {"id": str(number), "question": "How many dots are red?", "answer": str(reds)}
            row["images"] = [f"img/{number}.png"]  # type: ignore[assignment]
            if name == "cold_start":
                row["response"] = f"{', '.join(colours)}. That makes \\boxed{{{reds}}}"
            rows.append(row)
        write_jsonl(folder / f"{name}.jsonl", rows)
    talks = [
        {
            "conversations": [
                {"from": "human", "value": f"<image>{row['question']}"},
                {"from": "gpt", "value": f"So \\boxed{{{row['answer']}}}"},
            ],
            "images": row["images"],
        }
        for row in rows
    ]
    (folder / "sharegpt.json").write_text(json.dumps(talks), encoding="utf-8")


def write_benchmarks(folder: Path) -> None:
    """Two questions or so of every benchmark, in its official layout."""
    for split in ("test", "testmini"):
        write_jsonl(folder / "mathvision" / f"{split}.jsonl", [vision(i) for i in range(2)])
    for i in range(2):
        write_image(folder / "mathvision" / "images" / f"{i}.png", seed=i)
    write_jsonl(folder / "mathvista" / "testmini.jsonl", [VISTA])
    write_image(folder / "mathvista" / "images" / "1.png")
    write_jsonl(folder / "mathverse" / "testmini.jsonl", [VERSE])
    write_image(folder / "mathverse" / "images" / "images_version_1-4" / "image_1.png")
    write_jsonl(folder / "wemath" / "testmini.jsonl", [we("2steps_7", "2steps_1")])
    write_image(folder / "wemath" / "images" / "2steps" / "image" / "2steps_1.png")
    row = {"images": ["images/1.png"], "problem": "<image>Find x.", "answer": "2"}
    write_jsonl(folder / "geometry3k" / "test.jsonl", [row])
    write_image(folder / "geometry3k" / "images" / "1.png")


MINE = {
    "extends": "quickstart",
    "name": "mine",
    "data": {
        "cold_start": "cold_start.jsonl",
        "rl": "train.jsonl",
        "test": "test.jsonl",
        "max_bad_share": 0,
    },
}
"""The recipe of a reader with data, which pages name mine.yaml."""
RUNS = ("mine", "quickstart", "first", "second", "paper-7b", "judged", "other")
"""Finished runs that pages name."""


def merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with the keys of a fragment put in."""
    both = {**base}
    for key, value in more.items():
        inside = both.get(key)
        both[key] = merged(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return both


def write_recipes(folder: Path, text: str, server: str) -> None:
    """mine.yaml with the YAML blocks of the page, and the function that the page defines."""
    recipe = dict(MINE)
    for language, code in FENCE.findall(text):
        block = yaml.safe_load(re.sub(*URL, code).replace("SERVER", server)) if language == "yaml" else {}
        if set(block) & {"grpo", "sft", "lora"}:
            recipe = merged(recipe, block)
    for name in ("mine.yaml", "recipe.yaml"):
        (folder / name).write_text(yaml.safe_dump(recipe), encoding="utf-8")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that pages name, finished runs too."""
    folder = tmp_path_factory.mktemp("reader")
    write_own_data(folder)
    shutil.copy(folder / "cold_start.jsonl", folder / "sft.jsonl")
    write_benchmarks(folder / "official")
    for name in ("shapes", "before", "after", "photo", "apples"):
        (folder / f"{name}.png").write_bytes(draw(56, 84, seed=len(name)).data)
    questions = [{"id": str(i), "question": "How many?", "images": [f"img/{i}.png"]} for i in range(1, 4)]
    write_jsonl(folder / "questions.jsonl", questions)
    rows = [{"response": "so \\boxed{B}", "choices": ["10", "12"]}, {"response": "so \\boxed{7}"}]
    fields = {"answer": "B", "question_for_eval": "How many?", "problem_version": "Text Dominant"}
    answers = [{"id": str(i), "question": "How many?", **fields, **row} for i, row in enumerate(rows)]
    write_jsonl(folder / "answers.jsonl", answers)
    asked = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    published = [{"id": row["id"], "response": "so \\boxed{1}"} for row in asked]
    write_jsonl(folder / "Gemini-Pro-CoT.jsonl", published)
    vista = {"1": {**VISTA, "response": "It is 1.2 cm.", "extraction": "1.2"}}
    (folder / "output_bard.json").write_text(json.dumps(vista), encoding="utf-8")
    rates = {"device": "NVIDIA H100 80GB HBM3", "update_share": 0.42, "forward_share": 0.5}
    (folder / "gpu.json").write_text(json.dumps({"rates": rates}), encoding="utf-8")
    write_recipes(folder, "", "")
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, [*ready("rlcs run mine.yaml --out runs/mine", ""), "--quiet"])
    assert done.exit_code == 0, done.output + str(done.exception)
    for name in RUNS[1:]:
        shutil.copytree(folder / "runs" / "mine", folder / "runs" / name)
    return folder


# ------------------------------------------------------------------------ a page's command becomes ours


def verb_of(words: list[str]) -> str:
    return " ".join(words[:2]) if words[0] in ("data", "recipes") else words[0]


def with_missing(words: list[str], options: str) -> list[str]:
    """A command with those options added that it lacks."""
    pairs = iter(shlex.split(options))
    return words + [each for name, value in zip(pairs, pairs, strict=True) if name not in words
                    for each in (name, value)]  # fmt: skip


def ready(line: str, server: str) -> list[str]:
    """The words that rlcs gets when the command of a page runs here."""
    line = os.path.expandvars(line.split(" | ")[0].partition(" > ")[0])
    for pattern, value in SUBSTITUTES.items():
        line = re.sub(pattern, value, line)
    words = after_rlcs(shlex.split(line.replace("SERVER", server), comments=True))
    verb = verb_of(words)
    if verb in OPTIONS and (verb != "report" or "--live" in words):
        words = with_missing(words, OPTIONS[verb])
    if verb in TRAINING:
        words += shortened(words) + list(UNDER_TORCHRUN if "torchrun" in line else ())
    return [str(free_port()) if word == "PORT" else word for word in words]


def shortened(words: list[str]) -> list[str]:
    """Overrides of SHORT, and small data where the recipe is a shipped one and the command names none."""
    given = {word.partition("=")[0] for word in words}
    shipped = words[0] == "quickstart" or (words[1] in list_recipes() and words[0] != "distill")
    data = PUZZLES if shipped else []
    if words[0] == "coldstart" or any(key.startswith("validation.") for key in given):
        data = [*data, "validation.problems=4"]
    wanted = [*data, *(f"{key}={value}" for key, value in SHORT.items())]
    if "sft.handover.rule=probe" in words:  # trials need steps that their losers may take
        wanted += ["grpo.steps=8", "sft.handover.most_share=0.5"]
    keys = [word for word in words[2:] if "=" in word]
    if words[0] == "run" and keys and all(key.startswith("grpo.") and "arms" not in key for key in keys):
        wanted.append("study.arms=[base, grpo]")  # which is what the command is about
    return [each for each in wanted if each.partition("=")[0] not in given]


# ------------------------------------------------------------------------ servers: ask once, then stop


def fetch(url: str, body: object = None, key: str | None = None) -> bytes:
    """What is answered at an address, as soon as anything is."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    for _ in range(600):
        with (
            contextlib.suppress(ConnectionError, urllib.error.URLError),
            urllib.request.urlopen(request, timeout=60) as answer,
        ):
            return bytes(answer.read())
        time.sleep(0.05)
    raise AssertionError(f"nothing answers at {url}")


@contextlib.contextmanager
def asked_once(words: list[str]) -> Iterator[list[Any]]:
    """Ask the server that a command starts once, from another thread, then stop it."""
    answers: list[Any] = []
    port = words[words.index("--port") + 1] if "--port" in words else "0"
    make, launch = web.make_server, chat_page.launch

    def ask(stop: Any) -> None:
        base = f"http://127.0.0.1:{port}"
        try:
            if words[0] == "serve":
                key = words[words.index("--api-key") + 1] if "--api-key" in words else None
                message = {"role": "user", "content": "How many?"}
                body = {"model": words[1], "messages": [message], "max_tokens": 4}
                answers.append(fetch(f"{base}/v1/chat/completions", body, key))
            else:
                answers.append(fetch(base))
        except Exception as error:  # it is the test's to report, not this thread's
            answers.append(error)
        finally:
            stop()

    def started(app: Any) -> Any:
        server = make(app)
        stop = partial(setattr, server, "should_exit", True)
        threading.Thread(target=ask, args=(stop,), daemon=True).start()
        return server

    def launched(page: Any, *, host: str, port: int, wait: bool) -> None:
        launch(page, host=host, port=port, wait=False)
        ask(page.close)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "make_server", started)
        patch.setattr(chat_page, "launch", launched)
        yield answers


# ------------------------------------------------------------------------ the pages


WITH_COMMANDS = [page for page in PAGES if commands(page)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on this machine, in the place of the real one."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def begin(page: Path, prepared: Path, folder: Path, server: str) -> None:
    """The folder in which the reader of a page stands: the tutorial's has data alone."""
    tutorial = page.name == "tutorial.md"
    leave = shutil.ignore_patterns("runs", "*.yaml") if tutorial else None
    shutil.copytree(prepared, folder, ignore=leave)
    text = page.read_text(encoding="utf-8")
    if not tutorial:
        write_recipes(folder, text, server)
    for language, code in FENCE.findall(text):
        name = re.match(r"# (\w+\.py)\n", code)
        if language == "python" and name:
            (folder / name[1]).write_text(code, encoding="utf-8")


def placed(words: list[str], number: int, made: dict[str, str]) -> list[str]:
    """A command that writes to a place of its own, which nothing holds but what went before on the page."""
    if words[0] in TRAINING:
        words = [*with_missing(words, f"--out runs/alternative-{number}"), "--quiet"]
        out = words[words.index("--out") + 1]
        if made.get(out) == words[0]:  # the same verb again is an alternative; another one goes on
            words[words.index("--out") + 1] = f"{out}-{number}"
        elif out not in made:
            shutil.rmtree(out, ignore_errors=True)
        if "--dry-run" not in words:  # which writes nothing
            made.setdefault(out, words[0])
    if words[0] == "eval":
        words = with_missing(words, f"--out evals-{number}")
    if "--output" in words:
        Path(words[words.index("--output") + 1]).unlink(missing_ok=True)
    return words


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackServer]:
    """The server of teachers, judges and models; with the variables that pages name."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with LoopbackServer(reply=partial(reply, count())) as started:
        yield started


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_every_command_of_the_page_runs(page, prepared, tmp_path, monkeypatch, hub, server):
    folder = tmp_path / "here"
    begin(page, prepared, folder, server.url)
    monkeypatch.chdir(folder)
    made: dict[str, str] = {}
    for number, line in enumerate(commands(page)):
        if any(re.search(pattern, line) for pattern in ELSEWHERE):
            continue
        words = placed(ready(line, server.url), number, made)
        with asked_once(words) as answered:
            done = CliRunner().invoke(app, words)
        error = done.exception if not isinstance(done.exception, SystemExit) else None
        report = f"{page.name}: {line}\nrun as: rlcs {shlex.join(words)}\n{done.output[-3000:]}\n{error!r}"
        assert error is None and done.exit_code in EXIT_CODES.get(words[0], (0,)), report
        serves = words[0] in ("serve", "chat") or "--live" in words
        assert [type(answer) for answer in answered] == [bytes] * serves, f"{report}\n{answered}"
    if page.name == "publish.md":
        assert "model.safetensors" in hub.files, "what is published is sent"
    if page.name == "tutorial.md":
        summary = json.loads((folder / "runs" / "mine" / "summary.json").read_text(encoding="utf-8"))
        assert summary["arms"]["sft_grpo"]["n"] == 4
        assert (folder / "my-model" / "model.safetensors").is_file()


def python_blocks(page: Path) -> list[str]:
    """The Python of a page; a part of a mapping becomes one."""
    text = page.read_text(encoding="utf-8")
    blocks = [dedent(code) for language, code in FENCE.findall(text) if language == "python"]
    return [f"PART = {{{code}}}" if code.startswith('"') and '":' in code[:20] else code for code in blocks]


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if python_blocks(p) and p.stem != "add-a-model-family"],
    ids=lambda page: page.stem,
)
def test_the_python_of_the_page_runs(page, prepared, monkeypatch, server):
    """The blocks of a page one after the other; the example of examples/ runs in tests/test_examples.py.

    Those on adding a family are lines of a file of the package (tests/test_families.py).
    """
    monkeypatch.chdir(prepared)
    monkeypatch.setattr("builtins.print", lambda *_, **__: None)
    names: dict[str, Any] = {"KEY": "secret", "__name__": "page"}
    for code in python_blocks(page):
        code = re.sub(*URL, code).replace("SERVER", server.url)
        exec(compile(code, page.name, "exec"), names)  # noqa: S102 - our own pages
    if page.name == "add-a-benchmark.md":
        row = {"id": 1, "question": "How many?", "options": ["3", "4"], "answer": "A"}
        image = {"bytes": draw(30, 30).data}
        question = names["read"]({**row, "image": image, "place": "bar", "colours": ["red"]})
        assert question.choices == ("3", "4") and names["BENCHMARK"].splits
    if page.name == "own-reward.md":
        assert names["score"]({"answer": "7"}, "\\boxed{7}") == (1.1, True)


def test_what_runs_elsewhere_is_in_the_pages():
    lines = [line for page in PAGES for line in commands(page)]
    for pattern, reason in ELSEWHERE.items():
        assert any(re.search(pattern, line) for line in lines), f"{pattern}: no page has it any more"
        assert all(list(ROOT.glob(name)) for name in re.findall(r"tests/[\w*]+\.py", reason)), reason
    left = [line for line in lines if any(re.search(pattern, line) for pattern in ELSEWHERE)]
    assert len(left) < len(lines) / 5, left


def test_every_benchmark_is_prepared(prepared):
    assert {path.name for path in (prepared / "official").iterdir()} == set(list_benchmarks())
