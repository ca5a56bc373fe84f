"""Short commands with all their stages, run in a warm process, and what they leave, compared byte for byte.

What differs between any two runs is left out: seconds, commands, logs and the pages of the report.
"""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kill_runner
import pytest
from kill_runner import Job, Outcome

from test_benchmarks import vision_folder
from test_distributed import free_port

COMMON = [
    "data.cold_start=builtin:puzzles?count=4&seed=1",
    "data.rl=builtin:puzzles?count=4&seed=2",
    "data.test=builtin:puzzles?split=test&count=2&seed=3",
    "study.preflight=off",
    "rollout.checks=0",
    "eval.max_new_tokens=4",
    "sft.epochs=1",
    "sft.batch_size=2",
    "sft.save_every=1",
    "grpo.steps=2",
    "grpo.prompts_per_step=2",
    "grpo.group_size=4",
    "grpo.save_every=1",
    "grpo.keep_checkpoints=1",
    "grpo.optimizer_steps=1",
    "grpo.max_new_tokens=48",
]
SERVED = [
    "rollout.engine=vllm_server",
    "rollout.executable={vllm}",
    "grpo.steps=3",
    "grpo.max_new_tokens=24",
    "grpo.pack_tokens=300",
    "eval.max_new_tokens=24",
]
STORIES = {
    "distill": ["distill", "quickstart", COMMON[0], "--quiet"],
    "sft": ["sft", "quickstart", *COMMON, "--quiet"],
    "grpo": ["grpo", "quickstart", *COMMON, "--quiet"],
    "run": ["run", "quickstart", *COMMON, "--quiet"],
    "overlap": ["grpo", "quickstart", *COMMON, *SERVED, "grpo.overlap=on_policy", "--quiet"],
    "one step off": ["grpo", "quickstart", *COMMON, *SERVED, "grpo.overlap=one_step_off", "--quiet"],
    "eval": ["eval", "builtin", "--benchmarks", "mathvision", "--data", "{mini}", "--split", "testmini",
             "--max-tokens", "4"],
}  # fmt: skip
"""Commands by name; `{mini}` is a folder with a benchmark, `{vllm}` a program that plays vLLM."""
IMAGE = 518  # the id of an image's tokens in the built-in model
FAKE_VLLM = Path(__file__).parent.parent / "fake_vllm.py"
VARIES = {"seconds", "spent_s", "command", "tokens_per_s", "python", "staleness"}
"""Values that differ between any two runs, by their names in JSON.

`python` is the state of Python's own random numbers, from which no run draws: each process begins another.
`staleness` is that of answers by older weights (`one_step_off`): none are the first ones of a new start.
"""
STOPPED = 130
Events = Sequence[Sequence[str]]
"""The events of each rank."""
WHOLE_CHECKPOINT = re.compile(r"/checkpoints/step-\d{6}(/[^.]+\.(json|safetensors))?$")


class Runner:
    """The warm process, which runs jobs one after the other."""

    def __init__(self, places: Path) -> None:
        vision_folder(places / "mini" / "mathvision", 3)
        program = places / "vllm"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE_VLLM} "$@"\n')
        program.chmod(0o755)
        (places / "behaviour.json").write_text(json.dumps({"varied": True, "placeholder": IMAGE}))
        self._places = {"mini": places / "mini", "vllm": program}
        self._environ = {"FAKE_VLLM": str(places / "behaviour.json")}
        command = [sys.executable, "-W", "ignore", kill_runner.__file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout.readline() == "warm\n"

    def run(self, story: str, folder: Path, **how: Any) -> Outcome:
        """Run a story in a folder; it prints into the file `log`, by default beside the folder."""
        words = [word.format(**self._places) if "{" in word else word for word in STORIES[story]]
        how["environ"] = {**self._environ, **how.get("environ", {})}
        given = {"words": [*words, "--out", str(folder)], "folder": str(folder), "log": f"{folder}.log"}
        self._process.stdin.write(json.dumps(asdict(Job(**{**given, **how}))) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("places"))
    yield runner
    runner.close()


class Undisturbed:
    """What the stories leave when nothing happens to them, and which events each rank has.

    The events are file events, or the calls of a method.
    """

    def __init__(self, runner: Runner, folder: Path) -> None:
        self._runner, self._folder = runner, folder
        self._found: dict[tuple[str, int, str | None], tuple[dict[str, object], Events]] = {}

    def of(self, story: str, ranks: int = 1, point: str | None = None) -> tuple[dict[str, object], Events]:
        key = (story, ranks, point)
        if key not in self._found:
            folder = self._folder / f"{story}-{ranks}-{len(self._found)}"
            outcome = self._runner.run(story, folder, ranks=ranks, point=point, port=free_port())
            assert set(outcome.statuses) == {0}, Path(f"{folder}.log").read_text()
            self._found[key] = contents(folder), outcome.events
            shutil.rmtree(folder)
        return self._found[key]


@pytest.fixture(scope="module")
def undisturbed(runner, tmp_path_factory) -> Undisturbed:
    return Undisturbed(runner, tmp_path_factory.mktemp("undisturbed"))


def contents(folder: Path) -> dict[str, object]:
    """Every file of a folder by its name, without what differs between any two runs."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "a folder"
        elif path.suffix == ".html":
            found[name] = "a page"
        elif not name.startswith("logs/"):
            found[name] = content(name, path.read_bytes())
    return found


def content(name: str, data: bytes) -> object:
    """The content of a file; of JSON what does not vary, unless it is damaged."""
    with suppress(ValueError):
        if name.endswith(".json"):
            return steady(name, json.loads(data))
        if name.endswith(".jsonl"):
            return [steady(name, json.loads(line)) for line in data.decode().splitlines()]
    return data


def steady(name: str, value: Any) -> Any:
    """A value of JSON without what varies; a manifest without the checksum of a file with seconds."""
    if isinstance(value, dict):
        left_out = VARIES | ({"state.json"} if name.endswith("manifest.json") else set())
        return {key: steady(name, each) for key, each in value.items() if key not in left_out}
    return [steady(name, each) for each in value] if isinstance(value, list) else value


def differences(expected: dict[str, object], folder: Path) -> list[str]:
    """How a folder differs from an undisturbed one: files that are left over, missing or other.

    Where a run is stopped it saves a checkpoint, which may take the place of another in the end.
    """
    found = contents(folder)
    stopped = any("stopped as asked" in log.read_text() for log in folder.glob("logs/attempt-*.log"))
    return [
        f"{name} is {'left over' if name not in expected else 'missing' if name not in found else 'other'}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name) and not (stopped and WHOLE_CHECKPOINT.search(name))
    ]


def spread(count: int, few: int) -> list[int]:
    """A few of so many events, numbered from 1, spread evenly from the first on."""
    return [1 + index * count // few for index in range(few)]


def struck(runner: Runner, folder: Path, story: str, expected: dict[str, object], **how: Any) -> list[str]:
    """Run a story to which something happens, then the same command again; what is wrong afterwards."""
    ranks = how.get("ranks", 1)
    first = runner.run(story, folder, **how, port=free_port())
    wrong = [event for events in first.events for event in events if event.startswith("LEFT")]
    numbers = {number for _, number in how["signals"]}
    allowed = {0, STOPPED, *(-number for number in numbers)} | ({1} if ranks > 1 else set())
    wrong += [f"ended with {status}" for status in first.statuses if status not in allowed]
    last = runner.run(story, folder, ranks=ranks, port=free_port())
    if set(last.statuses) != {0}:
        wrong.append(
            f"the same command ended with {last.statuses}: {Path(f'{folder}.log').read_text()[-900:]}"
        )
    else:
        wrong += differences(expected, folder)
    if not wrong:
        shutil.rmtree(folder)
    return wrong


SIGNALS = {
    "SIGKILL": [(0, signal.SIGKILL)],
    "SIGTERM": [(0, signal.SIGTERM)],
    "SIGINT": [(0, signal.SIGINT)],
    "SIGINT twice": [(0, signal.SIGINT), (3, signal.SIGINT)],
    "SIGTERM, and SIGKILL after a short grace": [(0, signal.SIGTERM), (6, signal.SIGKILL)],
}
"""Signals, and how many events after the first each comes."""


def strike(runner, undisturbed, tmp_path, story, signals, few, **how) -> int:
    """Strike a story at a few of its events (None: at all), and return how often.

    Raises AssertionError with all that went wrong.
    """
    about = {key: how[key] for key in ("ranks", "point") if key in how}
    expected, events = undisturbed.of(story, **about)
    own = events[how.get("rank", 0)]
    assert own, f"{story} has no events"
    points = spread(len(own), min(len(own), few or len(own)))
    failed = {}
    for point in points:
        at = [(point + later, int(number)) for later, number in signals]
        wrong = struck(runner, tmp_path / f"{story}-{point}", story, expected, signals=at, **how)
        if wrong:
            failed[point, own[point - 1]] = wrong
    assert not failed, f"{len(failed)} of {len(points)}: {dict(itertools.islice(failed.items(), 5))}"
    return len(points)


@pytest.fixture
def whole_lane(request):
    """Skip what takes minutes, unless every kill is asked for."""
    if not request.config.getoption("every_kill"):
        pytest.skip("minutes: `make test-faults` runs it")
