"""The page of faults: every row stands for a test, and a run of pytest writes it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import faults_table
from faults_table import PAGE, Case, page_of, rows_of

TESTS = Path(__file__).parent
DEAD = ("kills", "a kill", "goes on")
FULL = ("storage", "a full disk", "a sentence")


def declared() -> set[tuple[str, ...]]:
    """The faults that tests declare, read from their source."""
    found = set()
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                found.add(tuple(ast.literal_eval(argument) for argument in node.args))
    return found


def test_every_row_of_the_page_stands_for_a_test():
    assert rows_of(PAGE.read_text(encoding="utf-8")), "`make test-faults` writes the page"
    assert not {*rows_of(PAGE.read_text(encoding="utf-8"))} - declared(), "run `make test-faults`"


def test_declared_faults_are_three_texts_without_bars():
    for fault in declared():
        assert len(fault) == 3 and fault[0] in faults_table.AREAS, fault
        assert all(text.strip() == text and "|" not in text for text in fault), fault


def test_the_page_counts_by_area_and_says_what_failed():
    cases = [
        Case(fault=DEAD, times=7, passed=True),
        Case(fault=DEAD, times=2, passed=True),
        Case(fault=FULL, times=1, passed=True),
        Case(fault=FULL, times=1, passed=False),
    ]
    page = page_of(cases)
    for row in (
        "| Kills | 1 | 9 | all |",
        "| Storage | 1 | 2 | **1 of 2** |",
        "| **all** | 2 | 11 | **10 of 11** |",
        "| a kill | goes on | 9 | all |",
        "| a full disk | a sentence | 2 | **1 of 2** |",
    ):
        assert row in page.splitlines()
    assert rows_of(page) == [DEAD, FULL]


SOME_TESTS = """
import pytest
@pytest.mark.fault("kills", "a kill", "goes on")
def test_kills(record_property):
    record_property("times", 7)
@pytest.mark.fault("storage", "a full disk", "a sentence")
@pytest.mark.parametrize("n", [1, 2])
def test_disk(n):
    assert n == 1
@pytest.mark.fault("storage", "not run", "not counted")
@pytest.mark.skip
def test_skipped():
    pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "two workers"])
def test_a_run_writes_the_page(tmp_path, workers):
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "import faults_table, pathlib\n"
        "faults_table.PAGE = pathlib.Path(__file__).with_name('page.md')\n"
        "pytest_plugins = ['faults_table']\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers]
    command += ["--write-faults-table", "--rootdir", str(tmp_path), "-c", "/dev/null", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert "1 failed, 2 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    page = (tmp_path / "page.md").read_text()
    assert rows_of(page) == [DEAD, FULL]
    assert "| **all** | 2 | 9 | **8 of 9** |" in page
