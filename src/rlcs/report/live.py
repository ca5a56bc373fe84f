"""Serves the report of a run in progress to a browser on this machine; it only reads.

Every few seconds the browser checks for changes, and replaces the changed parts.
"""

import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rlcs.errors import RunFolderError
from rlcs.report import page, rollouts
from rlcs.report.load_run import read_object, read_runs, text
from rlcs.report.rollouts import Wanted

_WATCHED = (
    "*.json",
    "logs/*.log",
    "*/metrics.jsonl",
    "*/validation.jsonl",
    "*/*.json",
    "eval/problems.jsonl",
    "eval/*/*.json*",
)
_COUNT = 12
_WORK_SHARE = 20
"""After drawing for t seconds a page is not drawn again for 20 t, so that training is not slowed down."""
_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


class LiveReport:
    """Draws the pages of one run folder in its current state."""

    def __init__(self, run: Path) -> None:
        """Raises RunFolderError if there is no folder `run`."""
        if not run.is_dir():
            raise RunFolderError("no such folder", where=str(run), fix="give the folder of a run")
        self.run = run
        self._lock = threading.Lock()
        self._page = ""
        self._stamp = ""
        self._rest_until = 0.0

    def stamp(self) -> str:
        """A text that changes when the page would change."""
        with self._lock:
            if time.monotonic() >= self._rest_until:
                self._stamp = self._state_of_files()
            return self._stamp

    def _state_of_files(self) -> str:
        states = set()
        for folder in (self.run, *self.run.glob("seed-*")):
            for path in (path for pattern in _WATCHED for path in folder.glob(pattern)):
                try:
                    facts = path.stat()
                except OSError:
                    continue  # removed since it was listed
                states.add((str(path), facts.st_size, facts.st_mtime_ns))
        return str(hash(tuple(sorted(states))))

    def report(self) -> str:
        """The current page, or a recent one when drawing takes long."""
        with self._lock:
            if not self._page or time.monotonic() >= self._rest_until:
                started, self._stamp = time.monotonic(), self._state_of_files()
                runs = read_runs(self.run)
                summary = read_object(self.run / "summary.json") or runs[0].summary
                self._page = page.render(self.run, runs, summary, stamp=self._stamp)
                ended = time.monotonic()
                self._rest_until = ended + _WORK_SHARE * (ended - started)
            return self._page

    def rollouts(self, query: Mapping[str, str]) -> str:
        """One page of the rollouts that a query selects; invalid values are ignored."""
        seeds = sorted(path.name for path in self.run.glob("seed-*") if path.is_dir())
        seed = _one_of(seeds, query.get("seed")) or ""
        run = self.run / seed
        choices = rollouts.stages_of(run)
        stage = _one_of(choices, query.get("stage")) or "sft_grpo"
        verdict = query.get("verdict", "")
        step, skip = _whole(query.get("step")), _whole(query.get("skip")) or 0
        wanted = Wanted(
            seed=seed,
            stage=stage,
            step=step,
            problem=query.get("problem", ""),
            verdict=verdict if verdict in rollouts.VERDICTS else "",
            least=_real(query.get("least")),
            most=_real(query.get("most")),
            skip=skip,
        )
        found = rollouts.find(run, wanted, count=_COUNT)
        turns: list[tuple[str, dict[str, object]]] = []
        if skip:
            turns.append(("← back", {"skip": max(0, skip - _COUNT)}))
        if found.more:
            turns.append(("more →", {"skip": skip + _COUNT}))
        if step in found.steps:
            index = found.steps.index(step)
            turns += [(f"← step {s}", {"step": s, "skip": 0}) for s in found.steps[max(0, index - 1) : index]]
            turns += [(f"step {s} →", {"step": s, "skip": 0}) for s in found.steps[index + 1 : index + 2]]
        links = [(label, urlencode({**query, "stage": stage, **change})) for label, change in turns]
        name = text(read_object(self.run / "summary.json"), "name") or self.run.resolve().name
        return rollouts.render(
            name, [(run, stage, found)], wanted=wanted, links=links, seeds=seeds, choices=choices
        )


def make_app(live: LiveReport) -> Starlette:
    """The pages as an ASGI application; requests by another host name are refused."""
    script = (files("rlcs.report") / "live.js").read_text(encoding="utf-8")
    return Starlette(
        routes=[
            Route("/", _page("html", lambda request: live.report())),
            Route("/rollouts", _page("html", lambda request: live.rollouts(request.query_params))),
            Route("/stamp", _page("plain", lambda request: live.stamp())),
            Route("/live.js", _page("javascript", lambda request: script)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
    )


def _page(kind: str, draw: Callable[[Request], str]) -> Callable[[Request], Response]:
    """Respond with the text of `draw`; an error is one line in the terminal, without a traceback."""

    def answer(request: Request) -> Response:
        try:
            body = draw(request).encode("utf-8", "replace")
        except Exception as error:
            sys.stderr.write(f"rlcs: a page failed: {type(error).__name__}: {error}\n")
            return Response("the page could not be drawn", 500, _HEADERS, "text/plain")
        return Response(body, 200, _HEADERS, f"text/{kind}; charset=utf-8")

    return answer


def _one_of(choices: list[str], value: str | None) -> str | None:
    return value if value in choices else next(iter(choices), None)


def _whole(value: str | None) -> int | None:
    return int(value) if value and value.isascii() and value.isdigit() and len(value) < 12 else None


def _real(value: str | None) -> float | None:
    try:
        real = float(value or "nan")
    except ValueError:
        return None
    return real if math.isfinite(real) else None
