"""A plug-in of pytest: writes docs/reliability.md from the tests of faults that ran.

A test declares `@pytest.mark.fault(area, injected, outcome)`; each of its cases counts once, or as often as
it says with `record_property("times", N)`. `pytest -m fault --every-kill --write-faults-table` writes it
when the run ends, also with what failed; by hand nothing is written there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
AREAS = {
    "kills": "Kills",
    "locks": "Two processes at once",
    "storage": "Storage",
    "data": "Data",
    "images": "Images",
    "teacher": "Teachers and judges",
    "engines": "Servers of rollouts, and trackers",
    "numbers": "Numbers",
    "user code": "Reward functions",
    "server": "The server",
    "secrets": "Secrets",
    "limits": "Limits of input",
}
"""The areas, in the order of the page, with their titles."""
HEAD = """# Reliability

What is done to rlcs on purpose, and what becomes of it. The tests themselves write this page, at the end of
`make test-faults`: each row is a test that ran, and a fault that is found later becomes a row.
"""

Fault = tuple[str, str, str]
"""Area, what is injected, and the outcome that the test requires."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case of a test that ran: its fault, how often it was injected, and if the outcome was right."""

    fault: Fault
    times: int
    passed: bool


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--write-faults-table", action="store_true", help="write docs/reliability.md")
    group.addoption("--every-kill", action="store_true", help="kill at every file event, not at a few")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("write_faults_table") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Collector(PAGE))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let reports carry the marks: of several processes, only one writes the page."""
    for item in items:
        for mark in item.iter_markers("fault"):
            area, injected, outcome = mark.args
            if area not in AREAS:
                raise pytest.UsageError(f"{item.nodeid}: no area of faults is called {area!r}")
            item.user_properties.append(("fault", [area, injected, outcome]))


class Collector:
    """Collects the cases of a run, and writes the page at its end."""

    def __init__(self, page: Path) -> None:
        self._page = page
        self._cases: list[Case] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            properties = list(report.user_properties)
            times = max([value for name, value in properties if name == "times"], default=1)
            for name, value in properties:
                if name == "fault" and not report.skipped:
                    case = Case(fault=tuple(value), times=int(str(times)), passed=report.passed)
                    self._cases.append(case)

    def pytest_sessionfinish(self) -> None:
        self._page.write_text(page_of(self._cases), encoding="utf-8")


def page_of(cases: Sequence[Case]) -> str:
    """The page in Markdown."""
    rows = {fault: [case for case in cases if case.fault == fault] for fault in {c.fault for c in cases}}
    kinds = {area: sorted(fault for fault in rows if fault[0] == area) for area in AREAS}
    lines = [HEAD, *_line("", "kinds of faults", "times injected", "outcome as required")]
    lines += ["| --- | --: | --: | --: |"]
    for area, title in AREAS.items():
        of_area = [case for case in cases if case.fault[0] == area]
        if of_area:
            lines += _line(title, f"{len(kinds[area]):,}", f"{_times(of_area):,}", _share(of_area))
    lines += _line("**all**", f"{len(rows):,}", f"{_times(cases):,}", _share(cases))
    for area, title in AREAS.items():
        if kinds[area]:
            lines += ["", f"## {title}", "", *_line("what is injected", "what must happen", "times", "held")]
            lines += ["| --- | --- | --: | --: |"]
        for fault in kinds[area]:
            lines += _line(*fault[1:], f"{_times(rows[fault]):,}", _share(rows[fault]))
    return "\n".join(lines) + "\n"


def rows_of(page: str) -> list[Fault]:
    """The faults that a page has rows for."""
    titles = {title: area for area, title in AREAS.items()}
    found, area = [], ""
    for line in page.splitlines():
        if line.startswith("## "):
            area = titles[line.removeprefix("## ")]
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if area and line.startswith("| ") and cells[0] != "what is injected" and "---" not in line:
            found.append((area, cells[0], cells[1]))
    return found


def _line(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def _times(cases: Iterable[Case]) -> int:
    return sum(case.times for case in cases)


def _share(cases: Sequence[Case]) -> str:
    """The share of injections, by cases, with the right outcome: a failed case fails with all of its own."""
    passed, total = _times(case for case in cases if case.passed), _times(cases)
    return "all" if passed == total else f"**{passed:,} of {total:,}**"
