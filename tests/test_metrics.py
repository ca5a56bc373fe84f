"""The metrics file survives crashes and full disks, the screen says what it should, sinks never raise."""

import io
import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlcs.evals.intervals import wilson
from rlcs.progress import median_rate, screen
from rlcs.records import StepReport, to_row
from rlcs.train.metrics import MetricsLog


def report(step: int, *, steps: int = 100, skipped: str = "", **values: float) -> StepReport:
    values = values or {"loss": 0.5, "reward": 0.25, "accuracy": 0.375}
    return StepReport(
        stage="grpo", step=step, steps=steps, values=values, seconds={"update": 1.0}, skipped=skipped
    )


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads")


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Worked values of Newcombe 1998, Statistics in Medicine 17, table I (method 3).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_published_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(10, 10)[1] == 1.0 and wilson(0, 10)[0] == 0.0
    assert wilson(500, 1000, z=2.58)[0] < wilson(500, 1000)[0]
    with pytest.raises(ValueError, match="11 correct of 10"):
        wilson(11, 10)


def test_median_rate_shrugs_off_one_slow_step() -> None:
    assert median_rate([0.5, 0.5, 60.0, 0.5]) == 2.0
    assert median_rate([9.0] * 50 + [0.25] * 20) == 4.0
    assert median_rate([]) == 0.0 and median_rate([0.0]) == 0.0


def test_answers_that_come_together_after_a_wait_have_their_mean_rate(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("rlcs.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    out = io.StringIO()
    with screen("eval", 20, quiet=True, stream=out) as shown:
        now[0] = 30.0
        for done in range(1, 11):
            shown.advance(done)
    assert out.getvalue().splitlines()[-1] == "eval 10/20  3.0 s each, 0:30 left"


def test_rows_are_on_disk_as_soon_as_they_are_appended(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new" / "metrics.jsonl")
    for step in (1, 2):
        log.append(report(step))
        assert steps_in(tmp_path / "new" / "metrics.jsonl")[-1] == step
    row = json.loads((tmp_path / "new" / "metrics.jsonl").read_text().splitlines()[0])
    assert row == to_row(report(1))


def test_resume_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = MetricsLog(path)
    for step in range(1, 9):
        whole.append(report(step))
    unbroken = path.read_bytes()
    path.write_bytes(unbroken[:-20])  # step 8 is torn
    log = MetricsLog(path)
    log.resume_from(5)
    assert steps_in(path) == [1, 2, 3, 4, 5]
    for step in (6, 7, 8):
        log.append(report(step))
    assert path.read_bytes() == unbroken


def test_a_torn_line_goes_without_resume_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append(report(1))
    with path.open("a") as file:
        file.write('{"stage": "grpo", "st' + 1000 * "x")  # longer than the row that replaces it
    MetricsLog(path).append(report(2))
    assert steps_in(path) == [1, 2]


def test_resume_from_nothing_and_from_zero(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.resume_from(3)
    assert not path.exists()
    log.append(report(1))
    log.resume_from(0)
    assert path.read_bytes() == b""
    path.write_bytes(b"not json\n[1]\n")
    log.resume_from(7)
    assert path.read_bytes() == b"not json\n[1]\n"  # what is not ours is not thrown away


def test_full_disk_warns_once_and_catches_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(report(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, hard))
    try:
        log.append(report(2))
        log.append(report(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "the run goes on" in caplog.text
    log.append(report(4))
    assert steps_in(path) == [1, 2, 3, 4]


def test_a_shortened_file_is_not_filled_with_zeros(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(report(1))
    path.write_bytes(b"")
    log.append(report(2))
    assert steps_in(path) == [2]


def test_json_screen_prints_steps_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with screen("GRPO", 3, json=True) as shown:
        shown.say("hello")
        for step in (1, 2, 3):
            shown.step(report(step, steps=3))
        shown.advance(4, accuracy=0.5)
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows[:3] == [to_row(report(step, steps=3)) for step in (1, 2, 3)]
    assert rows[3] == {"stage": "GRPO", "done": 4, "total": 3, "accuracy": 0.5}
    assert err == "hello\n"


def test_plain_screen_prints_about_ten_lines() -> None:
    out = io.StringIO()
    with screen("GRPO", 100, stream=out) as shown:
        for step in range(1, 101):
            shown.step(report(step))
    lines = out.getvalue().splitlines()
    assert 10 <= len(lines) <= 12
    assert lines[0].startswith("GRPO 1/100  loss 0.500  reward 0.250  accuracy 37.5%")
    assert lines[-1].startswith("GRPO 100/100") and lines[-1].endswith("0:00 left")


def test_plain_screen_after_resume_and_with_a_skipped_step() -> None:
    out = io.StringIO()
    with screen("GRPO", 100, stream=out) as shown:
        shown.step(report(95))
        shown.step(report(100, skipped="non-finite gradient"))
    assert out.getvalue().splitlines()[0].startswith("GRPO 95/100")
    assert "skipped: non-finite gradient" in out.getvalue()


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    with screen("SFT [/bold]", 2, stream=out) as shown:
        shown.say("[red]kept[/red]")
        shown.step(report(1, steps=2))
        shown.advance(2, reward=1.0)
    text = out.getvalue()
    assert "SFT [/bold]" in text and "[red]kept[/red]" in text and "2/2" in text and "reward 1.000" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back


@pytest.mark.parametrize(("quiet", "term"), [(True, "xterm"), (False, "dumb")])
def test_quiet_and_dumb_terminals_get_plain_lines(
    monkeypatch: pytest.MonkeyPatch, quiet: bool, term: str
) -> None:
    monkeypatch.setenv("TERM", term)
    out = Terminal()
    with screen("SFT", 1, quiet=quiet, stream=out) as shown:
        shown.step(report(1, steps=1))
    assert "\x1b" not in out.getvalue() and out.getvalue().startswith("SFT 1/1")


@pytest.mark.parametrize("json_mode", [True, False])
def test_a_broken_screen_warns_once_and_the_run_goes_on(
    json_mode: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with screen("SFT", 3, json=json_mode, stream=Broken()) as shown:
        for step in (1, 2, 3):
            shown.step(report(step, steps=3))
    assert len(caplog.records) == 1 and "nobody reads" in caplog.text


def test_errors_pass_through_the_screen() -> None:
    with pytest.raises(KeyError), screen("SFT", 3, stream=io.StringIO()):
        raise KeyError("the stage's own")


def test_a_closed_pipe_leaves_exit_code_zero() -> None:
    code = (
        "from rlcs.progress import screen\n"
        "with screen('x', 20000) as s:\n"
        "    for i in range(20000): s.say('y' * 50)\n"
        "    s.advance(20000)\n"
        "print('the summary')\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"the run goes on") == 1
