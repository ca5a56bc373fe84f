"""The live page: real HTTP on loopback, real rollouts, and a real Chromium that keeps its place."""

import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import make_problem
from rlcs.cli.main import app
from rlcs.data.problem_store import ProblemStore
from rlcs.errors import RunFolderError, UserError
from rlcs.records import to_row
from rlcs.report import rollouts
from rlcs.report.live import LiveReport, make_app
from rlcs.report.load_run import read_run
from rlcs.report.rollouts import Wanted, find, write_sample
from rlcs.report.stages import ending, progress
from rlcs.serving.web import listen, make_server
from test_report import Page, grpo_row, make_run, rollout, rows_of, write_rows


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in the middle of RL: 40 of 80 steps, three steps of rollouts with their problems."""
    folder = make_run(tmp_path / "run", problems=12)
    shutil.rmtree(folder / "eval")
    shutil.rmtree(folder / "grpo")
    (folder / "summary.json").unlink()
    (folder / "recipe.yaml").write_text("name: demo\nstudy:\n  arms:\n  - base\n  - sft_grpo\nreport: {}\n")
    for stage in ("cold_start", "sft"):
        (folder / stage / "done.json").write_text("{}")
    metrics = folder / "sft_grpo" / "metrics.jsonl"
    write_rows(metrics, rows_of(metrics)[:40])
    (folder / "sft_grpo" / "rollouts" / "step-000080.jsonl").unlink()
    rng = random.Random(0)
    for step in (1, 20, 40):
        rows = [rollout(f"train-{step}-{g}", i, rng) for g in range(3) for i in range(4)]
        rows[0] |= {"correct": None, "reward": None, "why": "the grader ran out of time", "stop": "length"}
        write_rows(folder / "sft_grpo" / "rollouts" / f"step-{step:06d}.jsonl", rows)
        ProblemStore(folder / "sft_grpo" / "rollouts").add(
            make_problem(f"train-{step}-{g}") for g in range(3)
        )
    return folder


@dataclass
class Server:
    """A live page that is being served."""

    live: LiveReport
    address: tuple[str, int]

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}/"


@pytest.fixture
def server(run: Path) -> Iterator[Server]:
    live = LiveReport(run)
    with listen("127.0.0.1", 0) as sock:
        uvicorn = make_server(make_app(live))
        thread = threading.Thread(target=uvicorn.run, kwargs={"sockets": [sock]})
        thread.start()
        yield Server(live, sock.getsockname())
        uvicorn.should_exit = True
        thread.join()


def get(server: Server, path: str = "") -> str:
    with urllib.request.urlopen(server.url + path, timeout=30) as answer:
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        return answer.read().decode()


def test_an_unfinished_run_shows_how_far_it_is(server):
    page = Page(get(server))
    stages = ("Cold start", "✓ done", "40 of 80", "waiting", "Measuring: Base")
    for words in (*stages, "RL after SFT: reward 0."):
        assert words in page.text, words
    assert re.search(r"RL after SFT: step 40 of 80, about 2 min \d\d s left", page.text), (
        "the stage heads the page"
    )
    assert page.text.index("Reward") < page.text.index("Stages", page.text.index("Recipe"))
    assert "Measuring: SFT only" not in page.text, "the recipe names no such arm"


def test_the_stamp_changes_with_the_run_and_the_page_follows(server, run):
    before = get(server, "stamp")
    assert get(server, "stamp") == before
    write_rows(run / "sft_grpo" / "metrics.jsonl", [*rows_of(run / "sft_grpo" / "metrics.jsonl"),
               {**rows_of(run / "sft_grpo" / "metrics.jsonl")[-1], "step": 41}])  # fmt: skip
    assert get(server, "stamp") != before
    assert "41 of 80" in get(server)


def test_drawing_rests_so_that_watching_stays_cheap(server, run):
    get(server)
    (run / "sft_grpo" / "done.json").write_text("{}")
    stale = get(server)
    assert "40 of 80" in stale, "right after a page was drawn the same one is given"
    assert get(server, "stamp") in stale, "and its stamp, so that the browser asks again later"
    server.live._rest_until = 0.0
    assert "40 of 80" not in get(server)


def test_a_stopped_run_says_by_what(server, run):
    (run / "logs").mkdir()
    (run / "logs" / "attempt-1.log").write_text("x ERROR rlcs: ended by Stopped: as asked\n")
    assert "Stopped: Stopped: as asked" in get(server)
    (run / "logs" / "attempt-10.log").write_text("x INFO rlcs: sft\n")
    assert ending(read_run(run)) == "", "a newer attempt has not ended"


def test_rollouts_have_image_question_reward_and_reason(server):
    page = Page(get(server, "rollouts"))
    assert "Step 40" in page.text and "How many?" in page.text and "Gold answer: 4" in page.text
    assert [v for t, n, v in page.attributes if (t, n) == ("img", "src") and v.startswith("data:image/")]
    for name, value in (("Answer read as", "number: 2"), ("Gold read as", "quantity: 4 in cm")):
        assert re.search(rf"{name}\s*{value}", page.text), f"{name} {value}"
    assert re.search(r"Rule\s*another number", page.text)
    assert "the grader ran out of time" in page.text and "cut at the limit" in page.text
    assert "script" not in page.tags


@pytest.mark.parametrize(
    ("query", "inside", "outside"),
    [
        ("step=20", "train-20-1", "train-40-1"),
        ("problem=TRAIN-1-2", "train-1-2", "train-1-1"),
        ("verdict=unscored", "not scored", "✗ wrong"),
        ("verdict=wrong", "✗ wrong", "✓ right"),
        ("verdict=cut", "cut at the limit", "✗ wrong"),
        ("least=0.5", "✓ right", "✗ wrong"),
        ("most=0", "✗ wrong", "✓ right"),
        ("least=2", "Nothing matches", "train-40"),
        ("stage=../../etc&step=x&least=nan&skip=-1&seed=..", "train-40-1", "Nothing matches"),
    ],
)
def test_rollouts_are_filtered(server, query, inside, outside):
    text = Page(get(server, f"rollouts?{query}")).text.partition("Show")[2]
    assert inside in text and outside not in text


def test_pages_and_steps_are_linked(run):
    first = find(run, Wanted(stage="sft_grpo"), count=4)
    assert len(first.groups) == 4 and first.more and first.read == 2
    second = find(run, Wanted(stage="sft_grpo", skip=4), count=5)
    assert not second.more
    assert len({(g.step, g.id) for g in (*first.groups, *second.groups)}) == 9


def test_other_hosts_methods_and_paths_get_nothing(server):
    for headers, path, status in (
        ({"Host": "evil.example:80"}, "", 400),
        ({"Host": "127.0.0.1.evil.example"}, "rollouts", 400),
        ({}, "recipe.yaml", 404),
        ({}, "../recipe.yaml", 404),
        ({}, "%2e%2e/recipe.yaml", 404),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(server.url + path, headers=headers), timeout=10)
        assert refused.value.code == status
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(server.url, data=b"x", timeout=10)
    assert refused.value.code == 405
    assert server.address[0] == "127.0.0.1"


def test_a_taken_port_and_a_missing_folder_are_told(server, run, tmp_path):
    taken = CliRunner().invoke(app, ["report", str(run), "--live", "--port", str(server.address[1])])
    assert isinstance(taken.exception, UserError) and "cannot listen: " in str(taken.exception)
    assert f"127.0.0.1:{server.address[1]}" in str(taken.exception) and "--port" in str(taken.exception)
    with pytest.raises(RunFolderError, match="no such folder"):
        LiveReport(tmp_path / "nowhere")


def test_a_reader_that_goes_away_is_no_news(server, capfd):
    for _ in range(5):
        with socket.create_connection(server.address) as reader:
            reader.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n")
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert "Stages" in get(server)
    assert "Traceback" not in capfd.readouterr().err


def test_a_page_that_fails_is_one_line_and_the_others_go_on(server, capfd, monkeypatch):
    monkeypatch.setattr(rollouts, "find", lambda *words, **more: 1 / 0)
    with pytest.raises(urllib.error.HTTPError) as failed:
        get(server, "rollouts")
    assert failed.value.code == 500
    assert capfd.readouterr().err == "rlcs: a page failed: ZeroDivisionError: division by zero\n"
    assert "Stages" in get(server)


def test_the_command_serves_until_it_is_interrupted(run):
    words = [sys.executable, "-W", "ignore", "-m", "rlcs", "report", str(run), "--live", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().split()[0]
        with urllib.request.urlopen(url + "stamp", timeout=30) as answer:
            assert answer.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == ""


def test_an_empty_folder_is_a_page_too(tmp_path):
    live = LiveReport(tmp_path)
    assert "Nothing measured yet" in live.report()
    assert "No rollouts yet" in live.rollouts({})


def test_the_static_page_of_rollouts_is_small_and_whole(run):
    write_sample(run, [read_run(run)], "demo")
    page = Page((run / "report" / "rollouts.html").read_text())
    for step in (1, 20, 40):
        assert f"Step {step}" in page.text
    assert {"script", "form", "link"} & set(page.tags) == set()
    rng = random.Random(1)
    for step in range(41, 140):
        rows = [rollout(f"p{g}", i, rng) | {"response": "x" * 20_000} for g in range(30) for i in range(8)]
        write_rows(run / "sft_grpo" / "rollouts" / f"step-{step:06d}.jsonl", rows)
    write_sample(run, [read_run(run)], "demo")
    assert (run / "report" / "rollouts.html").stat().st_size < 4_000_000
    assert rollouts.sample(run, "sft_grpo").groups[-1].step == 139


def test_problems_are_kept_once_also_after_a_restart(tmp_path):
    problems = [make_problem("a"), make_problem("b", sizes=((900, 700),)), make_problem("c", sizes=())]
    book = ProblemStore(tmp_path)
    book.add(problems[:2])
    book.add(problems[:2])
    ProblemStore(tmp_path).add(problems)
    rows = rows_of(tmp_path / "problems.jsonl")
    assert [row["id"] for row in rows] == ["a", "b", "c"] and rows[2]["images"] == []
    small, large = (tmp_path / row["images"][0]["path"] for row in rows[:2])
    assert small.read_bytes() == problems[0].images[0].data, "a small file is kept as it is"
    assert large.suffix == ".webp" and large.stat().st_size < len(problems[1].images[0].data) / 2


def test_progress_counts_answers_and_seconds(run):
    found = {row.key: row for row in progress(read_run(run))}
    assert [row.state for row in found.values()] == ["waiting", "done", "done", "begun", "waiting"]
    assert found["sft_grpo"].share == 0.5 and 100 < found["sft_grpo"].left_s < 200  # 40 steps of 3.5 seconds
    rows = [rollout(str(i), 0, random.Random(i)) for i in range(2)]
    write_rows(run / "eval" / "base" / "predictions.jsonl", rows)
    write_rows(run / "eval" / "problems.jsonl", [to_row(make_problem(str(i), sizes=())) for i in range(8)])
    base = next(row for row in progress(read_run(run)) if row.key == "eval_base")
    assert (base.state, base.done, base.total, base.share) == ("begun", 2, 8, 0.25)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_keeps_its_place_while_numbers_change(server, run):
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 700})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        quick = (files("rlcs.report") / "live.js").read_text().replace("SECONDS = 5", "SECONDS = 0.2")
        script = {"body": quick, "content_type": "text/javascript"}
        page.route("**/live.js", lambda route: route.fulfill(**script))
        page.goto(server.url)
        page.locator("#pulse", has_text="live").wait_for()
        page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
        first_screen = (
            "[...document.querySelectorAll('figure')].findIndex(f => f.getBoundingClientRect().top > 700)"
        )
        assert page.evaluate(first_screen) >= 2, "reward and accuracy begin on the first screen of a phone"
        page.evaluate("document.querySelector('#rollouts details:not([open])').open = true")
        opened = page.evaluate("document.querySelectorAll('#rollouts details[open]').length")
        page.evaluate("document.querySelector('nav .scroll').scrollLeft = 40")
        page.evaluate("document.getElementById('rollouts').scrollIntoView()")
        before = page.evaluate("document.getElementById('rollouts').getBoundingClientRect().top")
        page.evaluate("getSelection().selectAllChildren(document.querySelector('#training .below'))")
        selected = page.evaluate("String(getSelection())")
        label = page.locator("#training svg").first.get_attribute("aria-label")
        server.live._rest_until = 0.0
        metrics = run / "sft_grpo" / "metrics.jsonl"
        more = [grpo_row("sft_grpo", step, 80, random.Random(step), 0.4) for step in range(41, 61)]
        write_rows(metrics, [*rows_of(metrics), *more])
        (run / "eval" / "base").mkdir(parents=True)
        scores = {"accuracy": 0.5, "n": 12}
        (run / "eval" / "base" / "scores.json").write_text(json.dumps(scores))
        page.locator("#now", has_text="60 of 80").wait_for(timeout=60_000)
        assert "50.0%" in page.inner_text("#results"), "a part that is new appears in its place"
        order = page.evaluate("[...document.querySelectorAll('main > section')].map(part => part.id)")
        assert order.index("training") < order.index("now") < order.index("results") < order.index("rollouts")
        after = page.evaluate("document.getElementById('rollouts').getBoundingClientRect().top")
        assert abs(after - before) < 2
        assert page.evaluate("document.querySelectorAll('#rollouts details[open]').length") == opened
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("document.querySelector('nav .scroll').scrollLeft") == 40
        assert page.evaluate("String(getSelection())") == selected != "", "what is selected is not replaced"
        page.evaluate("getSelection().removeAllRanges()")
        page.locator(f"#training svg[aria-label={json.dumps(label)}]").wait_for(state="detached")
        assert errors == []
        browser.close()
