"""Shows the progress of a stage: a progress bar, plain lines, or JSON.

A failure of a screen (a closed pipe) is logged once and never stops the run.
"""

import logging
import os
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from json import dumps
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from rlcs.records import StepReport, to_row
from rlcs.redaction import shown

if TYPE_CHECKING:
    from rich.progress import Progress

_LOG = logging.getLogger(__name__)
ROWS_SAID_S = 10.0
"""Seconds between two sentences of `RowProgress`."""


def median_rate(seconds: Sequence[float], *, window: int = 20) -> float:
    """Units a second from the median of the last `window` durations; 0 without durations.

    The median, not the mean: one step that also saved a checkpoint should not move the ETA.
    """
    recent = seconds[-window:]
    middle = statistics.median(recent) if recent else 0.0
    return 1 / middle if middle > 0 else 0.0


class SinkGuard:
    """Runs the work of an output (a screen, a tracker): logs the first failure, raises none."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._has_logged = False

    def run(self, work: Callable[[], None]) -> Exception | None:
        """Do `work`; return what it raised, if anything."""
        try:
            work()
        except Exception as error:
            if not self._has_logged:
                self._has_logged = True
                _LOG.warning("%s failed (%s); the run goes on without it", self._what, error)
            return error
        return None


class Screen(Protocol):
    """Shows the progress of a stage; a context manager whose methods never raise."""

    def __enter__(self) -> Self:
        """Begin."""
        ...

    def __exit__(self, *_: object) -> None:
        """End, also after an error."""
        ...

    def step(self, report: StepReport) -> None:
        """Show a finished training step."""
        ...

    def advance(self, done: int, **values: float) -> None:
        """Show that `done` items of the total are done (stages without training steps)."""
        ...

    def say(self, text: str, row: Mapping[str, object] | None = None) -> None:
        """Show a sentence; a JSON screen prints the `row` in its place, if there is one."""
        ...


def screen(
    stage: str, total: int, *, quiet: bool = False, json: bool = False, stream: TextIO | None = None
) -> Screen:
    """Make the screen of one stage of `total` steps or items, on `stream` (standard output).

    A progress bar on a terminal; plain lines, one for about each tenth, with `quiet` or where the
    stream is not a terminal; with `json` one JSON object a step and nothing else.
    """
    out = sys.stdout if stream is None else stream
    if json:
        return _JsonScreen(stage, total, out)
    dumb = os.environ.get("TERM", "") in ("dumb", "unknown")
    if quiet or dumb or not out.isatty():
        return _PlainScreen(stage, total, out)
    return _BarScreen(stage, total, out)


class RowProgress:
    """Says how far the work on the rows of large sources is, every ROWS_SAID_S seconds."""

    def __init__(self, view: Screen, what: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`what` is done with the rows: `rows read`."""
        self._view, self._what, self._clock = view, what, clock
        self._source, self._first, self._began, self._said = "", 0, 0.0, 0.0

    def __call__(self, source: str, rows: int) -> None:
        """Take note that so many rows of a source are done."""
        now = self._clock()
        if source != self._source:
            self._source, self._first, self._began, self._said = source, rows, now, now
        elif now - self._said >= ROWS_SAID_S:
            self._said = now
            rate = (rows - self._first) / (now - self._began)
            self._view.say(f"{source}: {rows:,} {self._what}, {rate:,.0f}/s")


@dataclass(frozen=True, kw_only=True)
class Output:
    """How a run prints its progress: a bar, plain lines (`quiet`), or `json` rows."""

    quiet: bool = False
    json: bool = False

    def screen(self, stage: str, total: int) -> Screen:
        """The display of one stage's progress."""
        return screen(stage, total, quiet=self.quiet, json=self.json)


class _Stage(ABC):
    """Counts, rates and failures, the same for every screen; subclasses draw."""

    def __init__(self, stage: str, total: int, out: TextIO) -> None:
        self._stage = stage
        self._total = total
        self._out = out
        self._done = 0
        self._durations: list[float] = []  # seconds a training step
        self._items = 0  # done in this process, outside of training steps
        self._opened = self._last = time.monotonic()
        self._guard = SinkGuard(f"screen of {stage}")
        self._has_failed = False

    def __enter__(self) -> Self:
        self._try(self._open)
        return self

    def __exit__(self, *_: object) -> None:
        self._try(self._close)

    def step(self, report: StepReport) -> None:
        """Show a finished training step."""
        # A resumed stage starts at a later step; the steps before took no time in this process.
        before, self._done = (self._done or report.step - 1), report.step
        self._count(report.step - before)
        figures = f"skipped: {report.skipped}" if report.skipped else _figures(report.values)
        self._try(lambda: self._draw(figures, to_row(report)))

    def advance(self, done: int, **values: float) -> None:
        """Show that `done` items of the total are done."""
        before, self._done = (self._done or max(0, done - 1)), done
        self._items += done - before
        row = {"stage": self._stage, "done": done, "total": self._total, **values}
        self._try(lambda: self._draw(_figures(values), row))

    def say(self, text: str, row: Mapping[str, object] | None = None) -> None:
        """Show a sentence; a JSON screen prints the `row` in its place, if there is one."""
        self._try(lambda: self._print(shown(text)) if row is None else self._report(shown(text), row))

    def _count(self, items: int) -> None:
        now = time.monotonic()
        if items > 0:
            self._durations.append((now - self._last) / items)
        self._last = now

    def _speed(self) -> str:
        # Answers of a batch come at once, after a long wait: only their mean says anything.
        mean = self._items / max(1e-9, time.monotonic() - self._opened)
        rate = mean if self._items else median_rate(self._durations)
        if not rate:
            return ""
        left = _clock((self._total - self._done) / rate)
        return f"{rate:.1f}/s, {left} left" if rate >= 1 else f"{1 / rate:.1f} s each, {left} left"

    def _try(self, work: Callable[[], None]) -> None:
        error = None if self._has_failed else self._guard.run(work)
        if error is not None:
            self._has_failed = True
            if isinstance(error, BrokenPipeError) and self._out is sys.stdout:
                # Whatever else the run prints must not fail on the same pipe, now or at exit.
                self._guard.run(_mute_stdout)

    def _open(self) -> None:
        self._opened = self._last = time.monotonic()

    def _close(self) -> None:
        self._out.flush()

    @abstractmethod
    def _draw(self, figures: str, row: Mapping[str, object]) -> None: ...

    def _print(self, text: str) -> None:
        _line(self._out, text)

    def _report(self, text: str, row: Mapping[str, object]) -> None:
        self._print(text)


def _line(out: TextIO, text: str) -> None:
    out.write(f"{text}\n")
    out.flush()


def _mute_stdout() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


class _JsonScreen(_Stage):
    """One JSON object a step; sentences go to standard error."""

    def _draw(self, figures: str, row: Mapping[str, object]) -> None:
        _line(self._out, dumps(row))

    def _print(self, text: str) -> None:
        _line(sys.stderr, text)

    def _report(self, text: str, row: Mapping[str, object]) -> None:
        _line(self._out, dumps({"stage": self._stage, **row}))


class _PlainScreen(_Stage):
    """Lines for a pipe or a log file: the first step, each tenth, and the last."""

    _shown = -1

    def _draw(self, figures: str, row: Mapping[str, object]) -> None:
        tenth = 10 * self._done // max(1, self._total)
        if tenth > self._shown or self._done == self._total:
            self._shown = tenth
            parts = (f"{self._stage} {self._done}/{self._total}", figures, self._speed())
            self._print("  ".join(p for p in parts if p))


class _BarScreen(_Stage):
    """One Rich progress bar, drawn between steps only, so that no thread competes with the training."""

    _bar: "Progress"

    def _open(self) -> None:
        super()._open()
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TextColumn("{task.fields[speed]}", style="dim", markup=False),
            console=Console(file=self._out),
            auto_refresh=False,
        )
        self._bar.add_task(self._stage, total=self._total, figures="", speed="")
        self._bar.start()
        self._drawn = 0.0

    def _close(self) -> None:
        self._bar.refresh()
        self._bar.stop()

    def _draw(self, figures: str, row: Mapping[str, object]) -> None:
        task = self._bar.task_ids[0]
        self._bar.update(task, completed=self._done, figures=figures, speed=self._speed())
        if self._last - self._drawn > 0.1:  # at most ten times a second
            self._drawn = self._last
            self._bar.refresh()

    def _print(self, text: str) -> None:
        self._bar.console.print(text, markup=False, emoji=False, highlight=False)


def _figures(values: Mapping[str, float]) -> str:
    """The few values that fit on a line, in one order for every stage."""
    parts = [f"{name} {values[name]:.3f}" for name in ("loss", "reward") if name in values]
    if "accuracy" in values:
        parts.append(f"accuracy {values['accuracy']:.1%}")
    if values.get("not_scored"):
        parts.append(f"{values['not_scored']:,.0f} not scored")
    if "pass_rate" in values:
        parts.append(f"right {values['pass_rate']:.1%}  kept {values['kept']:,.0f}")
        parts += [f"{values['tokens_per_s']:,.0f} tokens/s"] if values.get("tokens_per_s") else []
    if "cost" in values:
        parts.append(f"cost {values['cost']:,.2f}")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
