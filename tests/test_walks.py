"""Whole walks through the command line, as people take them: from their files to a model that answers.

A student's charts in four layouts, a researcher's evaluation with a judge, README's commands on own data.
"""

import base64
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageOps
from typer.testing import CliRunner

import rlcs
import warm
from bench.hostile import serving
from conftest import SMALL_STUDY
from loopback_server import LoopbackServer
from rlcs.cli.main import app
from test_benchmarks import OFFICIAL, vision, we, write_image, write_jsonl
from test_docs import FENCE, ROOT

LAYOUTS = {
    "rows": "charts.jsonl",
    "parquet": "charts.parquet",
    "sharegpt": "sharegpt.json",
    "messages": "messages.jsonl",
}
CHARTS = 24
QUESTION = "How many bars are in the chart?"
TURNED, PHOTO, HEIC = 3, 5, 7
"""Charts whose file is turned by EXIF, is a photo of 24 megapixels, and is HEIC where a library writes it."""

SHORT = [
    *(each for each in SMALL_STUDY if not each.startswith("data.")),
    "images.max_pixels=50176",
    "sft.epochs=1",
    "grpo.steps=2",
    "grpo.max_new_tokens=8",
    "grpo.save_every=1",
    "grpo.keep_checkpoints=2",
    "eval.max_new_tokens=8",
    "eval.max_rows=8",
]


def command(*words: object) -> str:
    """What a command prints that must succeed; it runs in this process."""
    result = CliRunner().invoke(app, [str(each) for each in words])
    assert result.exit_code == 0, f"{words}: {result.output}{result.exception!r}"
    return result.output


# --- the student ----------------------------------------------------------------------------------


def draw_chart(path: Path, bars: int, *, size: tuple[int, int] = (640, 480), turned: bool = False) -> None:
    """Save a bar chart; if it is `turned`, as a camera does: pixels on their side, and EXIF that says so."""
    image = Image.new("RGB", size, "white")
    width, height = size
    for k in range(bars):
        left = width * (2 * k + 1) // 14
        ImageDraw.Draw(image).rectangle((left, height // (k + 2), left + width // 12, height - 5), "navy")
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
        image = image.transpose(Image.Transpose.ROTATE_90)
    image.save(path, exif=exif)


def chart_rows(folder: Path) -> list[dict[str, str]]:
    (folder / "img").mkdir()
    rng = random.Random(5)
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
        heic = "heic"
    except ImportError:
        heic = "png"
    rows = []
    for i in range(CHARTS):
        bars = rng.randint(2, 6)
        path = folder / "img" / f"{i}.{heic if i == HEIC else 'jpg' if i % 2 else 'png'}"
        size = (6000, 4000) if i == PHOTO else (640, 480)
        draw_chart(path, bars, size=size, turned=i == TURNED)
        response = f"One bar after the other: {bars}. So the answer is \\boxed{{{bars}}}."
        rows.append({"id": f"c{i}", "image": f"img/{path.name}", "answer": str(bars), "response": response})
    return rows


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of charts, and the same rows about them in four files."""
    folder = tmp_path_factory.mktemp("student")
    rows = chart_rows(folder)

    def ours(row: dict[str, str], image: object) -> dict[str, object]:
        return {**row, "question": QUESTION, "image": None, "images": [image]}

    write_jsonl(folder / "charts.jsonl", [ours(row, row["image"]) for row in rows])
    embedded = [ours(row, {"bytes": (folder / row["image"]).read_bytes(), "path": None}) for row in rows]
    pq.write_table(pa.Table.from_pylist(embedded), folder / "charts.parquet")
    talks = [
        {
            "id": row["id"],
            "conversations": [
                {"from": "human", "value": f"<image>{QUESTION}"},
                {"from": "gpt", "value": row["response"]},
            ],
            "images": [row["image"]],
        }
        for row in rows
    ]
    (folder / "sharegpt.json").write_text(json.dumps(talks, indent=1), encoding="utf-8")
    chats = [
        {
            "id": row["id"],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": row["image"]}},
                        {"type": "text", "text": QUESTION},
                    ],
                },
                {"role": "assistant", "content": row["response"]},
            ],
        }
        for row in rows
    ]
    write_jsonl(folder / "messages.jsonl", chats)
    return folder


@pytest.fixture(scope="module")
def trained(student: Path, random_model_folder: Path) -> dict[str, Path]:
    """A run of each layout: cold start, RL, measurement, report."""
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(student)
        for name, file in LAYOUTS.items():
            runs[name] = student / "runs" / name
            words = ["--data", file, "--out", runs[name], f"model.name={random_model_folder}", *SHORT]
            assert "report   " in command("run", "quickstart", *words)
    return runs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_checked_and_holds_the_same_problems(layout, student, monkeypatch):
    monkeypatch.chdir(student)
    said = json.loads(command("data", "check", LAYOUTS[layout], "--role", "cold_start", "--json"))
    assert (said["usable"], said["bad"]) == (CHARTS, [])
    problems = rlcs.load_problems(LAYOUTS[layout])
    # Own rows have no slot for the image, which then comes first.
    assert {p.question.removeprefix("<image>") for p in problems} == {QUESTION}
    ours = rlcs.load_problems("charts.jsonl")
    assert [(p.id, p.answer, [image.sha256 for image in p.images]) for p in problems] == [
        (p.id, p.answer, [image.sha256 for image in p.images]) for p in ours
    ]
    assert {p.answer for p in problems} <= set("23456")
    sizes = [(image.width, image.height) for p in problems for image in p.images]
    assert sizes.count((640, 480)) == CHARTS - 1 and (6000, 4000) in sizes  # turned upright


def facts(run: Path) -> dict[str, Any]:
    """What must not depend on the layout: every figure of the training but the clock's, and the weights."""
    rows: dict[str, Any] = {"weights": (run / "sft_grpo" / "final" / "model.safetensors").read_bytes()}
    for stage in ("sft", "sft_grpo"):
        lines = (run / stage / "metrics.jsonl").read_text().splitlines()
        rows[stage] = [
            {k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_s")}
            for line in lines
        ]
    answers = (run / "eval" / "sft_grpo" / "predictions.jsonl").read_text().splitlines()
    rows["answers"] = sorted((json.loads(line)["id"], json.loads(line)["response"]) for line in answers)
    return rows


def test_the_four_layouts_train_the_same_model(trained):
    expected = facts(trained["rows"])
    assert len(expected["sft"]) >= 3 and len(expected["sft_grpo"]) == 2 and expected["answers"]
    for name, run in trained.items():
        assert facts(run) == expected, name


def test_the_trained_model_is_exported_served_and_asked(trained, student, monkeypatch):
    monkeypatch.chdir(student)
    command("export", trained["sharegpt"], "--out", "model")
    photo = f"img/{PHOTO}.jpg"
    said = command("generate", "model", "--image", photo, QUESTION, "--max-tokens", 8, "--temperature", 0)
    url = "data:image/jpeg;base64," + base64.b64encode((student / photo).read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    with serving(student / "model") as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
        name = client.models.list().data[0].id
        assert client.models.retrieve(name).id == name
        reply = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=8
        )
    answer = reply.choices[0].message.content or ""
    assert answer.strip() and answer.strip() in said


@pytest.mark.parametrize("model", ["runs/messages", "runs/messages/sft", "runs/messages@1"])
def test_run_folders_and_their_checkpoints_answer_like_models(model, trained, student, monkeypatch):
    monkeypatch.chdir(student)
    image = student / "img" / f"{TURNED}.jpg"
    answer = rlcs.load(model).ask(str(image), QUESTION, max_new_tokens=4)
    assert answer.tokens > 0
    upright = ImageOps.exif_transpose(Image.open(image))
    assert upright.size == (640, 480)


# --- the researcher -------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The benchmarks' official files where they are, else made ones in their layout."""
    if OFFICIAL.is_dir():
        return OFFICIAL
    write_jsonl(tmp_path / "mathvision" / "testmini.jsonl", [vision(i) for i in range(4)])
    for i in range(4):
        write_image(tmp_path / "mathvision" / "images" / f"{i}.png", seed=i)
    write_jsonl(tmp_path / "wemath" / "testmini.jsonl", [we("2steps_1", "2steps_1")])
    write_image(tmp_path / "wemath" / "images" / "2steps" / "image" / "2steps_1.png")
    return tmp_path


def test_a_judged_evaluation_survives_a_kill_and_ends_with_the_table(official, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    out = tmp_path / "eval"
    words = ["eval", "builtin", "--benchmarks", "mathvision,wemath", "--split", "testmini", "--limit", "4"]
    words += ["--data", str(official), "--out", str(out), "--max-tokens", "24", "--batch", "1"]
    with LoopbackServer(answer=lambda body: "B") as judge:
        words += ["--judge-model", "stub", "--judge-url", judge.url]
        first = out / "builtin" / "mathvision" / "predictions.jsonl"
        process = warm.Popen(
            [sys.executable, "-m", "rlcs", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        until = time.monotonic() + 120
        while not (first.is_file() and first.read_bytes().count(b"\n")) and time.monotonic() < until:
            assert process.poll() is None, (process.stderr or sys.stdin).read()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        kept = [json.loads(line)["response"] for line in first.read_text().splitlines()]
        command(*words)
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    assert len({(row["id"], row["index"]) for row in rows}) == len(rows) == 4
    assert [row["response"] for row in rows[: len(kept)]] == kept, "what was answered before the kill"
    table = (out / "comparison.md").read_text(encoding="utf-8")
    assert all(
        f"| builtin {' ' * 22} | {rule}" in table or rule in table for rule in ("rlcs+judge", "official")
    )
    assert "the paper, 3B" in table and "4 of 304" in table


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="no official benchmark files")
@pytest.mark.parametrize(
    ("rule", "answers", "golds", "right"),
    [
        ("mathvision", "mathvision/published/Gemini-Pro-CoT.jsonl", "mathvision/test.jsonl", 436),
        ("mathvista", "mathvista/output_bard.json", None, 348),
    ],
)
def test_published_outputs_have_their_published_totals(rule, answers, golds, right, tmp_path):
    """The files as the benchmarks' authors publish them: 14.34% of MATH-Vision, 34.8% of MathVista."""
    words = ["grade", OFFICIAL / answers, "--rule", rule, "--out", tmp_path / "graded.jsonl", "--json"]
    said = json.loads(command(*words, *(["--golds", OFFICIAL / golds] if golds else [])))
    assert (said["right"], said["unscored"]) == (right, 0)


# --- the promise of README ------------------------------------------------------------------------


def own_data_commands() -> list[str]:
    """The lines of the first block of commands in README's part on one's own data."""
    part = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own data")[2]
    return next(code for language, code in FENCE.findall(part) if not language).strip().splitlines()


def test_four_commands_lead_from_a_clone_to_a_model_of_one_s_own(student, random_model_folder, monkeypatch):
    lines = own_data_commands()
    assert len(lines) <= 4
    assert lines[0].startswith("git clone") and "pip install" in lines[1]
    monkeypatch.chdir(student)
    for line in lines[2:]:
        words = shlex.split(line)
        assert words[0] == "rlcs"
        if words[1] == "run":
            # The recipe of the page, with its adapters, on a model that a processor can train, without vLLM.
            words += [f"model.name={random_model_folder}", "model.dtype=float32", "grpo.keep_steps=[]"]
            words += ["rollout.engine=local"]
            words += SHORT
        command(*words[1:])
    out = re.search(r"--out (\S+)", lines[-1])
    assert out is not None
    assert rlcs.load(out[1]).ask("img/0.png", QUESTION, max_new_tokens=4).tokens > 0
    summary = json.loads((student / out[1] / "summary.json").read_text())
    assert set(summary["arms"]) == {"base", "sft", "sft_grpo"} and summary["arms"]["base"]["n"] > 0
