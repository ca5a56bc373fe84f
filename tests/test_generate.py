"""`rlcs generate` as people call it: one question, a file of them, a stop and a second start."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import rlcs
import warm
from conftest import draw
from rlcs.cli.main import app
from rlcs.data.images import encoded_image
from rlcs.data.puzzles.shapes import Shapes
from rlcs.errors import RlcsError, UserError
from rlcs.model.source import BUILTIN
from rlcs.records import Problem, Request
from rlcs.serving.bulk import SessionSampler
from rlcs.serving.session import Settings
from rlcs.signals import StopFlag
from rlcs.storage import read_jsonl


def run(*words):
    """Exit code and standard output of a verb, in this process; errors for people count as `main` does."""
    result = CliRunner().invoke(app, ["generate", *map(str, words)])
    if isinstance(result.exception, RlcsError):
        return result.exception.exit_code, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


@pytest.fixture
def pictures(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(draw(56, 84, seed=number).data)
    return tmp_path


def test_one_question_about_two_images(random_model_folder, pictures):
    images = [pictures / "0.png", pictures / "1.png"]
    words = (random_model_folder, "Compare.", "--image", images[0], "--image", images[1], "--max-tokens", 9)
    answer = rlcs.load(str(random_model_folder)).ask(images, "Compare.", max_new_tokens=9)
    assert run(*words) == (0, answer.text + "\n")
    code, text = run(*words, "--json")
    said = json.loads(text)
    assert (code, said["text"], said["tokens"], said["stop"]) == (0, answer.text, 9, "length")
    assert run(*words, "--temperature", 1, "--seed", 1)[1] != run(*words, "--temperature", 1, "--seed", 2)[1]


def test_the_built_in_models_answer_by_their_names(pictures):
    problem = rlcs.load_problems("builtin:shapes?count=1&seed=1&levels=1")[0]
    (pictures / "scene.png").write_bytes(encoded_image(problem.images[0]))
    for name in BUILTIN:
        code, text = run(name, "Describe the image.", "--image", pictures / "scene.png", "--max-tokens", 64)
        assert code == 0 and text.strip() == Shapes().caption(problem.metadata["scene"]), name


def test_what_cannot_be_meant_is_refused(random_model_folder, pictures):
    for words in (
        ("builtin",),
        ("builtin", "a", "--input", "b.jsonl", "--output", "c.jsonl"),
        ("builtin", "--input", "b.jsonl"),
        ("builtin", "--input", "b.jsonl", "--output", "c.jsonl", "--image", pictures / "0.png"),
        (random_model_folder, "a", "--image", pictures / "none.png"),
        (pictures, "a"),
    ):
        code, text = run(*words)
        assert code == 2 and "->" in text


def rows_file(folder, count):
    """A file of questions; every tenth cannot be asked."""
    rows = [{"id": f"r{i}", "question": f"Question {i}?", "images": [f"{i % 3}.png"]} for i in range(count)]
    for i, change in enumerate(({"images": ["no.png"]}, {"question": 5}, {"question": "w " * 9000})):
        rows[10 * i] |= change
    rows[1] |= {"answer": "7", "choices": ["6", "7"]}
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "torn {\n")
    return path


def test_a_file_of_questions(random_model_folder, pictures):
    source, out = rows_file(pictures, 31), pictures / "out.jsonl"
    words = (random_model_folder, "--input", source, "--output", out, "--max-tokens", 6, "--batch", 5)
    code, text = run(*words, "--json")
    counts = json.loads(text.splitlines()[-1])
    assert (code, counts["answered"], counts["before"], counts["left_out"]) == (0, 28, 0, 4)
    rows = read_jsonl(out)
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(31) if i % 10 or i == 30]
    assert rows[0]["answer"] == "7" and rows[0]["choices"] == ["6", "7"] and "answer" not in rows[1]
    model = rlcs.load(str(random_model_folder))
    for row in rows[1:4]:
        image = pictures / f"{int(row['id'][1:]) % 3}.png"
        assert row["response"] == model.ask(image, row["question"], max_new_tokens=6).text

    out.write_text("".join(out.read_text().splitlines(keepends=True)[:10]) + '{"id": "to')  # a crash
    assert json.loads(run(*words, "--json")[1].splitlines()[-1])["before"] == 10
    assert [{**row, "seconds": 0} for row in read_jsonl(out)] == [{**row, "seconds": 0} for row in rows]

    code, text = run(*words, "--temperature", 0.5)
    assert code == 2 and "another file" in text
    rows = source.read_text().splitlines(keepends=True)
    source.write_text("".join(rows).replace("Question 7?", "Another?"))
    code, text = run(*words)
    assert code == 2 and "the answer to 'r7' is to another question" in text
    source.write_text("".join(rows))
    pictures.joinpath("1.png").write_bytes(pictures.joinpath("2.png").read_bytes())
    code, text = run(*words)
    assert code == 2 and "the answer to 'r1' is to another question" in text
    graded = CliRunner().invoke(app, ["grade", str(out), "--out", str(pictures / "graded.jsonl")])
    assert "unscored" in graded.stdout


def test_a_loaded_model_samples_in_order_and_ends_early_when_stopped(random_model_folder):
    session = rlcs.load(str(random_model_folder))
    sampler = SessionSampler(session=session, settings=Settings(max_new_tokens=5), ahead=3)
    words = ["a", "w " * 9000, "b", "c", "d"]
    problems = [Problem(id=str(n), source="mine", question=text, answer="") for n, text in enumerate(words)]
    samples = list(sampler.samples(map(Request.of, problems)))
    assert [sample.id for sample in samples if not sample.error] == ["0", "2", "3", "4"]
    (failed,) = (sample for sample in samples if sample.error)
    assert failed.id == "1" and "limit" in failed.error and not failed.retryable
    assert samples[-1].text == session.ask(None, "d", max_new_tokens=5).text
    stop, drawn = StopFlag(), []
    requests = (drawn.append(problem.id) or Request.of(problem) for problem in problems[2:] * 9)
    for _ in sampler.samples(requests, stop=stop):
        stop.is_set = True
    assert len(drawn) == 3 and session.engine.waiting == 0


@pytest.mark.parametrize("number", ["inf", "nan"])
def test_a_temperature_is_a_number(number):
    code, _ = run("builtin", "Why?", "--temperature", number)
    assert code == 2
    evaluated = CliRunner().invoke(app, ["eval", "builtin", "--temperature", number])
    assert evaluated.exit_code == 2 and "'--temperature'" in evaluated.stderr
    with pytest.raises(UserError, match="sampling settings"):
        Settings(temperature=float(number))


def test_ctrl_c_keeps_what_was_answered(random_model_folder, pictures):
    source, out = rows_file(pictures, 400), pictures / "out.jsonl"
    words = ["generate", random_model_folder, "--input", source, "--output", out, "--max-tokens", 40]
    command = [sys.executable, "-m", "rlcs", *map(str, words), "--batch", "4"]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    process = warm.Popen(command, **pipes, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 100
    while not out.exists() or out.stat().st_size < 3000:
        assert time.monotonic() < end and process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "continues" in said and "Traceback" not in said
    assert 0 < len(read_jsonl(out)) < 397
