"""Step reports to TensorBoard, trackio and Weights & Biases.

An error in a tracker is logged once, and the run goes on without the tracker. A step is sent once, even
when a resumed run repeats it.
"""

import hashlib
import logging
import secrets
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rlcs.errors import RecipeError
from rlcs.recipe.execution import Trackers as Settings
from rlcs.records import StepReport
from rlcs.storage import read_json, read_jsonl, write_json

_LOG = logging.getLogger(__name__)
_MOST_FAILURES = 3  # in a row; after that a service is given up, since each failure may cost a time-out


def require_installed(settings: Settings) -> None:
    """Raise RecipeError, with the name to install, for a tracker whose package is missing."""
    for name, value in settings.model_dump().items():
        if value and find_spec(name) is None:
            raise RecipeError(
                f"{name} is not installed",
                where=f"trackers.{name}",
                fix=f"pip install {name}, or leave the key out",
            )


class _Tracker(Protocol):
    """One service, opened for one stage; `identity` is the same in all attempts. Every method may raise."""

    def __init__(self, project: str, folder: Path, stage: str, identity: str) -> None: ...

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def try_trackers(settings: Settings, folder: Path) -> None:
    """Send one value to each tracker, as the stage of a folder that may be removed afterwards.

    A service that keeps runs shows one that is called preflight. Raises RecipeError for a tracker that fails.
    """
    for name, project in settings.model_dump().items():
        if not project:
            continue
        identity = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with redirect_stdout(sys.stderr):  # standard output may be read as JSON
                tracker = _KINDS[name](str(project), folder, "preflight", identity)
                tracker.log({"preflight": 1.0}, 1)
                tracker.close()
        except Exception as error:  # a tracker's code and network may fail in any way
            raise RecipeError(
                f"{name} cannot be written: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                where=f"trackers.{name}",
                fix=_FIXES.get(name, "correct the cause") + ", or leave the key out",
            ) from error


class _TensorBoard:
    """Event files beside the stage's metrics; each attempt adds one."""

    def __init__(self, project: str, folder: Path, stage: str, identity: str) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Weights & Biases; a run folder is a group, a stage a run in it."""

    def __init__(self, project: str, folder: Path, stage: str, identity: str) -> None:
        import wandb

        group, name = _names(folder, stage, identity)
        self._run = wandb.init(
            project=project, group=group, name=name, id=identity, resume="allow", dir=str(folder)
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """trackio, with functions like those of Weights & Biases."""

    def __init__(self, project: str, folder: Path, stage: str, identity: str) -> None:
        import trackio

        group, name = _names(folder, stage, identity)
        self._run = trackio.init(project, name=name, group=group, resume="allow", embed=False)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        import trackio

        trackio.finish()  # not the run's `finish`: trackio would finish that run again at exit


def _names(folder: Path, stage: str, identity: str) -> tuple[str, str]:
    """The group (a run folder) and the name of a stage's run."""
    group = folder.resolve().parent.name
    return group, f"{group}-{stage}-{identity[:6]}"


_KINDS: dict[str, type[_Tracker]] = {"tensorboard": _TensorBoard, "trackio": _Trackio, "wandb": _Wandb}


_FIXES = {
    "wandb": "`wandb login`, or WANDB_MODE=offline in the environment",
    "trackio": "see whether TRACKIO_DIR can be written",
}


class Trackers:
    """The trackers of one stage, opened with its first step; no method raises."""

    def __init__(self, settings: Settings, folder: Path, *, stage: str) -> None:
        """Opens nothing yet; `folder` is the stage's."""
        self._wanted = {name: str(value) for name, value in settings.model_dump().items() if value}
        self._folder = folder
        self._stage = stage
        self._open: dict[str, _Tracker] = {}
        self._failures: dict[str, int] = {}
        self._warned: set[str] = set()
        self._sent = 0
        self._identity = secrets.token_hex(8)

    def skip_what_was_sent(self) -> None:
        """Read which steps were sent before; to be called before a resumed stage cuts its metrics file."""
        if self._wanted:
            self._try("all", self._read_mark)

    def _read_mark(self) -> None:
        """Read or create the identity that all attempts share, and find the last step that was sent."""
        mark, metrics = self._folder / "trackers.json", self._folder / "metrics.jsonl"
        known: dict[str, Any] = read_json(mark) if mark.exists() else {"id": secrets.token_hex(8), "sent": 0}
        rows = read_jsonl(metrics) if metrics.exists() else []
        self._identity, self._sent = known["id"], max(known["sent"], *(row["step"] for row in rows), 0)
        write_json(mark, {"id": self._identity, "sent": self._sent})

    def append(self, report: StepReport) -> None:
        """Send one step, unless an earlier attempt sent it."""
        if report.step <= self._sent:
            return
        seconds = {f"seconds/{name}": value for name, value in report.seconds.items()}
        self.send({**report.values, **seconds}, report.step)

    def send(self, values: Mapping[str, float], step: int) -> None:
        """Send values of a step, whether or not an earlier attempt sent some."""
        named = {f"{self._stage}/{name}": value for name, value in values.items()}
        for name in list(self._wanted):
            self._try(name, partial(self._send, name, named, step))

    def close(self) -> None:
        """Close the trackers at the end of the stage."""
        for name, tracker in self._open.items():
            self._try(name, tracker.close)
        self._open.clear()

    def _send(self, name: str, values: Mapping[str, float], step: int) -> None:
        if name not in self._open:
            kind = _KINDS[name]
            self._open[name] = kind(self._wanted[name], self._folder, self._stage, self._identity)
        self._open[name].log(values, step)

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # standard output may be read as JSON
                work()
            self._failures.pop(name, None)
        except Exception as error:  # a tracker's code and network may fail in any way
            self._failures[name] = self._failures.get(name, 0) + 1
            if name not in self._warned:
                self._warned.add(name)
                _LOG.warning("tracker %s failed (%s); the run goes on without it", name, error)
            if self._failures[name] >= _MOST_FAILURES:
                self._wanted.pop(name, None)
