"""A table is scanned without holding its rows, by several processes as by one."""

import base64
import gc
import io
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import typer
from PIL import Image

from rlcs.cli.data import data_check
from rlcs.data import scan as scan_module
from rlcs.data.files import JsonLines
from rlcs.data.rows import Row
from rlcs.data.scan_workers import ScanWorkers
from rlcs.data.sources import Table
from rlcs.data.tally import CheckTask, PromptLimit
from rlcs.pipeline.source_check import check_source
from rlcs.recipe.schema import Data, Recipe
from rlcs.records import ImageRef

CHUNK = 20


def row(name, answer="5", question="How many?", **more):
    return {"id": name, "question": question, "answer": answer, **more}


def chat(name, text):
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "7"}]
    return {"id": name, "messages": turns}


def plain(first, count):
    """Rows that depend on no others, with gold answers of several kinds."""
    golds = ("5", "B", r"\frac{1}{3}", "1,000", "x^2 + 1", r"\boxed{8}", "#### 9")
    return [row(f"r{i}", golds[i % len(golds)]) for i in range(first, first + count)]


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "blue").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def numbered(index, image):
    """A row as VLMEvalKit writes it: its image, or the index of an earlier row with that image."""
    return {"index": index, "question": "Which?", "A": "1", "B": "2", "answer": "A", "image": image}


ROWS = [
    numbered(7001, picture()),
    *plain(0, 3 * CHUNK),
    "{torn",
    "",
    row("r5", "a row whose id stands in an earlier chunk"),
    row("late", r"\foo{\bar}^^"),
    *plain(100, 2 * CHUNK),
    row("late", "6"),
    row("", "6"),
    row("torn", r"\boxed{5"),
    row("option", "F", choices=["1", "2"]),
    row("equal", "A", choices=["1", "1", "2"]),
    row("long", "word", question="why " * 4000),
    chat("twice", "What?"),
    *plain(200, 2 * CHUNK),
    chat("twice", "And what?"),
    {**chat("own", "?"), "system": "Be brief."},
    row("differ", "6", solution="7"),
    row("seen", "8", A="8", B="9", index=3),
    row("option-2", "F", choices=["1", "2"]),
    row("equal-2", "A", choices=["3", "3"]),
    *plain(300, 2 * CHUNK),
    numbered(7002, "7001"),
]


@pytest.fixture
def source(tmp_path):
    lines = (each if isinstance(each, str) else json.dumps(each) for each in ROWS)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.fixture
def small(monkeypatch):
    """Chunks of some rows, so that few rows are many chunks."""
    monkeypatch.setattr(scan_module, "_CHUNK_ROWS", CHUNK)
    monkeypatch.setattr(scan_module, "_MIN_CHUNKS", 2)
    return lambda cores: monkeypatch.setattr(scan_module, "usable_cores", lambda: cores)


def task_of(path):
    table = Table(source=str(path), rows=JsonLines(path), columns=None, folders=(path.parent,), roots=())
    limit = PromptLimit(tokens=1000, pixels=1000)
    return CheckTask(table=table, settings=Data(), role="rl", decode_limit=10**6, prompt_limit=limit)


def test_several_processes_find_what_one_finds(source, small, monkeypatch):
    def check():
        return check_source(str(source), "rl", Recipe(), for_run=False)

    small(1)
    alone = check()
    held = check_source(str(source), "rl", Recipe(), for_run=False, keep="rows")
    small(2)
    taken = []
    take = scan_module.Scanner.take
    monkeypatch.setattr(
        scan_module.Scanner, "take", lambda self, found: taken.append(take(self, found)) or taken[-1]
    )
    assert check() == alone
    assert taken.count(True) >= 5, "what other processes found is used"
    assert taken.count(False) >= 3, "chunks that depend on earlier rows are read again"
    reasons = {bad.where.rpartition(":")[2]: bad.reason for bad in alone.bad}
    assert reasons["64"].startswith("duplicate id 'r5', first at ") and reasons["64"].endswith("rows.jsonl:7")
    assert not any("7001" in reason for reason in reasons.values()), "images of earlier rows are found"
    assert "rows with two equal options: 2, e.g. A and B of row equal" in alone.notes
    assert any("the id of another row comes again" in note for note in alone.notes)
    assert (held.usable, held.bad, held.notes) == (alone.usable, alone.bad, alone.notes)
    assert [(name, kind.rows, kind.id) for name, kind in held.kinds.items()] == [
        (name, kind.rows, kind.id) for name, kind in alone.kinds.items()
    ]


def test_good_lines_are_copied_without_holding_rows(source, small, monkeypatch):
    small(2)
    monkeypatch.chdir(source.parent)
    monkeypatch.setattr("rlcs.data.good_rows.write_rows", None)
    with pytest.raises(typer.Exit):
        data_check(source.name, write=Path("good.jsonl"))
    good = Path("good.jsonl").read_text().splitlines()
    held = check_source(source.name, "rl", Recipe(), for_run=False, keep="rows")
    assert len(good) == held.usable and [json.loads(line).get("id") for line in good] == [
        json.loads(source.read_text().split("\n")[int(each.where.rpartition(":")[2]) - 1]).get("id")
        for each in held.good
    ]


@pytest.mark.parametrize("words", [{}, {"role": "cold_start"}])
def test_a_long_check_says_how_far_it_is(source, small, monkeypatch, capsys, words):
    small(2)
    monkeypatch.setattr(scan_module, "WATCHED", 50)
    monkeypatch.setattr("rlcs.progress.ROWS_SAID_S", 0.0)
    with pytest.raises(typer.Exit):
        data_check(str(source), json=True, **words)
    out, errors = capsys.readouterr()
    json.loads(out)
    assert "rows.jsonl: 150 rows checked, " in errors and "/s\n" in errors


def test_no_row_is_held(source, small):
    small(1)
    before = sum(isinstance(each, Row) for each in gc.get_objects())
    scanner = scan_module.scan(task_of(source))
    assert scanner.sink.tally.rows > 150
    assert sum(isinstance(each, Row) for each in gc.get_objects()) - before <= 1, "the one in doubt"


def test_no_embedded_image_is_held(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(f"r{i}", images=[picture()])) + "\n" for i in range(3)))
    scanner = scan_module.scan(task_of(path))
    assert scanner.sink.tally.rows == 3 and not scanner.bad
    held = [each for each in gc.get_objects() if isinstance(each, ImageRef) and each.data is not None]
    assert not any(each.data == base64.b64decode(picture()) for each in held)


def test_few_rows_start_no_process(source, small, monkeypatch):
    small(2)
    monkeypatch.setattr(scan_module, "_MIN_CHUNKS", 1000)
    monkeypatch.setattr(scan_module, "ScanWorkers", None)
    assert scan_module.scan(task_of(source)).sink.tally.rows > 150


def test_a_process_that_dies_costs_only_time(source, small, monkeypatch):
    small(2)
    whole = scan_module.scan(task_of(source))
    scanned = ScanWorkers._scan

    def killed(self, chunk):
        found = scanned(self, chunk)
        for worker in self._workers:
            if worker._process:
                worker._process.kill()
        return found

    monkeypatch.setattr(ScanWorkers, "_scan", killed)
    again = scan_module.scan(task_of(source))
    assert (again.bad, again.notes, again.sink.tally.kinds) == (
        whole.bad,
        whole.notes,
        whole.sink.tally.kinds,
    )


def test_processes_that_cannot_start_cost_only_time(source, small, monkeypatch):
    small(2)
    whole = scan_module.scan(task_of(source))
    monkeypatch.setattr("rlcs.data.scan_workers._PROGRAM", ("-c", "raise SystemExit(1)"))
    assert scan_module.scan(task_of(source)).bad == whole.bad


def test_an_interrupt_ends_the_processes(source):
    lines = list(JsonLines(source).lines())
    with pytest.raises(KeyboardInterrupt), ScanWorkers(task_of(source), 2) as workers:
        for number, _ in enumerate(workers.scanned([lines[:5]] * 50)):
            processes = [worker._process for worker in workers._workers]
            if number == 3:
                raise KeyboardInterrupt
    assert all(process is None or process.poll() is not None for process in processes)
    assert all(worker._process is None for worker in workers._workers)


def test_ctrl_c_is_one_line_and_leaves_no_process(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps(row(f"r{i}", f"x^{i} + {i}")) + "\n" for i in range(60_000))
    command = [sys.executable, "-m", "rlcs", "data", "check", str(path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        ),  # a job in the background ignores it
    )
    if not (children := _children(process, 1)):
        pytest.skip("one core: there are no other processes")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def _children(process, least):
    """The ids of the processes that a process has started, once there are some."""
    import psutil

    while process.poll() is None:
        if len(found := psutil.Process(process.pid).children()) >= least:
            return [child.pid for child in found]
        time.sleep(0.05)
    return []


def test_a_process_ends_with_the_one_that_started_it(source):
    workers = ScanWorkers(task_of(source), 1)
    lines = list(JsonLines(source).lines())
    assert next(workers.scanned([lines[:5]]))[1].sink.tally.rows == 5
    process = workers._workers[0]._process
    process.stdin.close()
    assert process.wait(30) == 0
    workers.__exit__()
