"""The report while the run works: a small server for this machine alone, which only reads.

The browser asks every few seconds whether anything changed, and swaps the parts that did.
"""

import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from rlcs.errors import RunFolderError, UserError
from rlcs.report import page, rollouts
from rlcs.report.load_run import read_object, read_runs, text
from rlcs.report.rollouts import Wanted

_WATCHED = (
    "*.json",
    "logs/*.log",
    "*/metrics.jsonl",
    "*/*.json",
    "eval/problems.jsonl",
    "eval/*/*.json*",
)
_COUNT = 12
_WORK_SHARE = 20
"""Drawing takes at most a twentieth of one core, so that watching does not slow the training."""


class LiveReport(ThreadingHTTPServer):
    """The pages of one run folder, on 127.0.0.1 alone."""

    daemon_threads = True

    def __init__(self, run: Path, port: int) -> None:
        """Take the port (0: any). Raises UserError when it is taken, RunFolderError without a folder."""
        if not run.is_dir():
            raise RunFolderError("no such folder", where=str(run), fix="give the folder of a run")
        self.run = run
        self._lock = threading.Lock()
        self._page = ""
        self._stamp = ""
        self._rest_until = 0.0
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen on port {port}: {error}", where="--port", fix="choose another, or 0 for any"
            ) from error

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """One line, no traceback: a browser that goes away is no news, anything else is."""
        error = sys.exception()
        if not isinstance(error, OSError):
            sys.stderr.write(f"rlcs: a page failed: {type(error).__name__}: {error}\n")

    def stamp(self) -> str:
        """Changes when the page would."""
        with self._lock:
            if time.monotonic() >= self._rest_until:
                return self._marked()
            return self._stamp

    def _marked(self) -> str:
        folders = [self.run, *self.run.glob("seed-*")]
        found = set()
        for path in (path for folder in folders for mark in _WATCHED for path in folder.glob(mark)):
            try:
                facts = path.stat()
            except OSError:
                continue  # gone since it was listed
            found.add((str(path), facts.st_size, facts.st_mtime_ns))
        self._stamp = str(hash(tuple(sorted(found))))
        return self._stamp

    def report(self) -> str:
        """The page as it is now, or as it was a moment ago when drawing it took long."""
        with self._lock:
            if not self._page or time.monotonic() >= self._rest_until:
                started, stamp = time.monotonic(), self._marked()
                runs = read_runs(self.run)
                summary = read_object(self.run / "summary.json") or runs[0].summary
                self._page = page.render(self.run, runs, summary, stamp=stamp)
                ended = time.monotonic()
                self._rest_until = ended + _WORK_SHARE * (ended - started)
            return self._page

    def rollouts(self, query: str) -> str:
        """One page of rollouts as the query asks for."""
        asked = dict(parse_qsl(query))
        seeds = sorted(path.name for path in self.run.glob("seed-*") if path.is_dir())
        seed = asked.get("seed", "") if asked.get("seed") in seeds else next(iter(seeds), "")
        run = self.run / seed
        choices = rollouts.stages_of(run)
        stage = asked.get("stage", "") if asked.get("stage") in choices else next(iter(choices), "sft_grpo")
        step, skip = _whole(asked.get("step")), _whole(asked.get("skip")) or 0
        wanted = Wanted(
            seed=seed,
            stage=stage,
            step=step,
            problem=asked.get("problem", ""),
            verdict=asked.get("verdict", "") if asked.get("verdict") in rollouts.VERDICTS else "",
            least=_real(asked.get("least")),
            most=_real(asked.get("most")),
            skip=skip,
        )
        found = rollouts.find(run, wanted, count=_COUNT)
        turns: list[tuple[str, dict[str, object]]] = []
        if skip:
            turns.append(("← back", {"skip": max(0, skip - _COUNT)}))
        if found.more:
            turns.append(("more →", {"skip": skip + _COUNT}))
        if step in found.steps:
            at = found.steps.index(step)
            turns += [(f"← step {s}", {"step": s, "skip": 0}) for s in found.steps[max(0, at - 1) : at]]
            turns += [(f"step {s} →", {"step": s, "skip": 0}) for s in found.steps[at + 1 : at + 2]]
        links = [(label, urlencode(asked | {"stage": stage} | change)) for label, change in turns]
        name = text(read_object(self.run / "summary.json"), "name") or self.run.resolve().name
        return rollouts.render(
            name, [(run, stage, found)], wanted=wanted, links=links, seeds=seeds, choices=choices
        )


def _whole(value: str | None) -> int | None:
    return int(value) if value and value.isascii() and value.isdigit() and len(value) < 12 else None


def _real(value: str | None) -> float | None:
    try:
        found = float(value or "nan")
    except ValueError:
        return None
    return found if math.isfinite(found) else None


class _Handler(BaseHTTPRequestHandler):
    server: LiveReport
    timeout = 10  # seconds: a reader that stops reading does not keep a thread for ever

    def do_GET(self) -> None:
        """Answer one request; other methods are refused by the library."""
        status, kind, body = self._page()
        data = body.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def _page(self) -> tuple[int, str, str]:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in ("127.0.0.1", "localhost"):  # another site's name that points here reads nothing
            return 403, "plain", "this page is for 127.0.0.1 and localhost"
        address = urlsplit(self.path)
        if address.path == "/":
            return 200, "html", self.server.report()
        if address.path == "/rollouts":
            return 200, "html", self.server.rollouts(address.query)
        if address.path == "/stamp":
            return 200, "plain", self.server.stamp()
        if address.path == "/live.js":
            return 200, "javascript", (files("rlcs.report") / "live.js").read_text(encoding="utf-8")
        return 404, "plain", "there is no such page"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a page that asks every few seconds would fill the terminal."""
