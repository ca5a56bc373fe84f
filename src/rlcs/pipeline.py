"""The whole study: data -> cold start -> SFT -> GRPO -> held-out measurement -> report.

Every stage leaves a marker when it is done; a run that was stopped picks up where it was, within
SFT and GRPO at the newest checkpoint, within a measurement at the last answer.
"""

import hashlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rlcs import distill, grpo, models, report, sft
from rlcs.data import Loaded, Role, Row, load, require_usable
from rlcs.engines.opening import MakeEngine, open_engines
from rlcs.errors import DataError, RunFolderError
from rlcs.evaluation import Examiner, evaluate, write_problems
from rlcs.files import atomic_write, read_json, write_json
from rlcs.grading import GradePool
from rlcs.grading.own import check_function
from rlcs.interrupts import StopFlag
from rlcs.metrics import Screen, screen, wilson
from rlcs.recipe.loading import differences, dump, load_recipe
from rlcs.recipe.schema import Data, Grpo, Recipe
from rlcs.records import Demonstration, Problem
from rlcs.stage import StageFolder, is_done, mark_done

MODEL_OF_ARM = {"base": None, "sft": "sft", "rl": "rl_only", "two_stage": "grpo"}
"""The stage folder whose `final` each arm measures; the base model has none."""

log = logging.getLogger("rlcs")


@dataclass(frozen=True, kw_only=True)
class Output:
    """How a run speaks: `quiet` plain lines, or `json` rows."""

    quiet: bool = False
    json: bool = False

    def screen(self, stage: str, total: int) -> Screen:
        """The screen of one stage."""
        return screen(stage, total, quiet=self.quiet, json=self.json)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The three data sources of a study, read and checked."""

    cold_start: tuple[Row, ...]
    rl: tuple[Problem, ...]
    test: tuple[Problem, ...]


class Study:
    """One recipe, one seed, one run folder."""

    def __init__(self, recipe: Recipe, folder: Path, *, output: Output, stop: StopFlag) -> None:
        """Claim the folder. Raises RunFolderError if it belongs to another recipe."""
        self.recipe = recipe
        self.folder = folder
        self._output = output
        self._stop = stop
        claim(folder, recipe)
        self._recipe_hash = hashlib.sha256(dump(recipe).encode()).hexdigest()

    def run(self) -> dict[str, Any]:
        """Every stage that is not done yet; returns the summary, which also lies in summary.json."""
        with (
            attempt_log(self.folder / "logs"),
            open_engines(self.recipe, self.folder / "rollout") as make_engine,
        ):
            return self._run(make_engine)

    def _run(self, make_engine: MakeEngine) -> dict[str, Any]:
        self._make_engine = make_engine
        if self.recipe.grpo.reward.function is not None:
            check_function(self.recipe.grpo.reward.function)
        sources = read_sources(self.recipe)
        arms = self.recipe.study.arms
        demonstrations = self._cold_start(sources)
        self._sft(demonstrations)
        self._grpo("grpo", sources, start=self.folder / "sft" / "final")
        if "rl" in arms:
            self._grpo("rl_only", sources, start=None)
        self._measure(sources.test)
        summary = self._summary()
        write_json(self.folder / "summary.json", summary)
        log.info("report: %s", report.build(self.folder))
        return summary

    def _cold_start(self, sources: Sources) -> list[Demonstration]:
        folder = self.folder / "cold_start"
        started = time.monotonic()
        if is_done(folder):
            return distill.load_kept(sources.cold_start, folder)
        rows, recipe = sources.cold_start, self.recipe
        with self._output.screen("cold start", sum(row.response is None for row in rows)) as view:
            kept = distill.run(
                rows, recipe.teacher, folder=folder, seed=recipe.seed, view=view, stop=self._stop
            )
        mark_done(folder, seconds=round(time.monotonic() - started, 1), kept=len(kept))
        return kept

    def _vlm(self, start: Path | None) -> models.Vlm:
        settings = self.recipe.model
        if start is not None:
            settings = settings.model_copy(update={"name": str(start), "revision": None})
        return models.load(settings)

    def _stage_folder(self, name: str) -> StageFolder:
        settings = self.recipe.sft if name == "sft" else self.recipe.grpo
        return StageFolder(
            self.folder / name,
            name=name,
            seed=self.recipe.seed,
            settings=settings,
            recipe_hash=self._recipe_hash,
        )

    def _sft(self, demonstrations: Sequence[Demonstration]) -> None:
        if is_done(self.folder / "sft"):
            return
        self._stop.check("before SFT")
        log.info("sft: %d demonstrations", len(demonstrations))
        vlm = self._vlm(None)
        models.freeze(vlm, self.recipe.sft.freeze)
        chat = models.make_chat(vlm, self.recipe)
        steps = sft.steps_of(self.recipe.sft, len(demonstrations))
        with self._output.screen("sft", steps) as view:
            sft.train(
                vlm,
                chat,
                demonstrations,
                self.recipe.sft,
                folder=self._stage_folder("sft"),
                screen=view,
                stop=self._stop,
            )

    def _grpo(self, name: str, sources: Sources, *, start: Path | None) -> None:
        if is_done(self.folder / name):
            return
        self._stop.check(f"before {name}")
        log.info("%s: %d problems, from %s", name, len(sources.rl), start or self.recipe.model.name)
        settings = self.recipe.grpo
        vlm = self._vlm(start)
        reference = grpo.frozen_copy(vlm) if settings.kl.active else None
        models.freeze(vlm, settings.freeze)
        chat = models.make_chat(vlm, self.recipe)
        if self.recipe.prompt.rl_system is not None:
            chat = chat.with_system(self.recipe.prompt.rl_system)
        engine = self._make_engine(vlm, chat, settings.max_rows)
        with self._pool(settings) as pool, self._output.screen(name, settings.steps) as view:
            grpo.train(
                grpo.Actors(
                    vlm=vlm,
                    reference=reference,
                    chat=chat,
                    engine=engine,
                    pool=pool,
                    rollout=self.recipe.rollout,
                ),
                sources.rl,
                settings,
                folder=self._stage_folder(name),
                screen=view,
                stop=self._stop,
            )

    def _pool(self, settings: Grpo) -> GradePool:
        reward = settings.reward
        return GradePool(
            workers=reward.workers,
            deadline_s=reward.deadline_s,
            allow_fallbacks=reward.allow_fallbacks,
            function=None if reward.function is None else check_function(reward.function),
        )

    def _measure(self, problems: Sequence[Problem]) -> None:
        folder = self.folder / "eval"
        settings = self.recipe.eval
        if not (folder / "problems.jsonl").exists():
            limit = self.recipe.images.decode_limit
            write_problems(problems, folder, decode_limit=limit, gallery=self.recipe.report.gallery)
        for arm in self.recipe.study.arms:
            if is_done(folder / arm):
                continue
            started = time.monotonic()
            stage = MODEL_OF_ARM[arm]
            vlm = self._vlm(None if stage is None else self.folder / stage / "final")
            chat = models.make_chat(vlm, self.recipe)
            engine = self._make_engine(vlm, chat, settings.max_rows)
            with (
                self._pool(self.recipe.grpo) as pool,
                self._output.screen(f"eval {arm}", len(problems)) as view,
            ):
                examiner = Examiner(engine=engine, chat=chat, pool=pool, settings=settings)
                evaluate(examiner, problems, folder=folder / arm, screen=view, stop=self._stop)
            mark_done(folder / arm, seconds=round(time.monotonic() - started, 1))
            log.info("eval %s: done", arm)

    def _summary(self) -> dict[str, Any]:
        seconds = {}
        for stage in ("cold_start", "sft", "grpo", "rl_only"):
            if is_done(self.folder / stage):
                seconds[stage] = read_json(self.folder / stage / "done.json")["seconds"]
        arms = {}
        for arm in self.recipe.study.arms:
            arms[arm] = read_json(self.folder / "eval" / arm / "scores.json")
            seconds[f"eval_{arm}"] = read_json(self.folder / "eval" / arm / "done.json")["seconds"]
        return {
            "name": self.recipe.name,
            "arms": arms,
            "seconds": seconds,
            "seeds": [self.recipe.seed],
            "recipe": self.recipe.model_dump(mode="json"),
            "versions": versions(),
            "command": command(),
        }


@contextmanager
def attempt_log(folder: Path) -> Iterator[None]:
    """Every start of a run has a log of its own, `attempt-N.log`, with warnings and what stopped it."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + len(list(folder.glob("attempt-*.log")))
    handler = logging.FileHandler(folder / f"attempt-{number}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, level = logging.getLogger(), log.level
    root.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        log.error("ended by %s: %s", type(error).__name__, error)
        raise
    finally:
        log.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def claim(folder: Path, recipe: Recipe) -> None:
    """Write the resolved recipe into a new run folder, or check that an old one has the same.

    Raises RunFolderError for a folder of another recipe or with foreign content.
    """
    path = folder / "recipe.yaml"
    if path.exists():
        changed = differences(load_recipe(str(path)).recipe, recipe)
        if changed:
            listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in changed[:5])
            raise RunFolderError(
                f"the folder holds a run of another recipe: {listed}",
                where=str(folder),
                fix="choose another --out, or remove the folder, or run with its own recipe.yaml",
            )
        return
    if folder.exists() and any(path.name != "cold_start" for path in folder.iterdir()):
        raise RunFolderError(
            "the folder is not empty and holds no run", where=str(folder), fix="choose another --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot create it: {error.strerror}", where=str(folder)) from error
    atomic_write(path, dump(recipe))


def read_sources(recipe: Recipe) -> Sources:
    """Read and check all three data sources. Raises DataError before anything is trained."""
    cold_start = read_source("cold_start", recipe.data.cold_start, recipe)
    rl = read_source("rl", recipe.data.rl, recipe)
    test = read_source("test", recipe.data.test, recipe)
    return Sources(
        cold_start=cold_start.rows,
        rl=by_pass_rate([row.problem for row in rl.rows], recipe.data),
        test=tuple(row.problem for row in test.rows),
    )


def by_pass_rate(problems: Sequence[Problem], settings: Data) -> tuple[Problem, ...]:
    """The problems whose pass rate lies within `data.rl_pass_rate`. Raises DataError if none has or does."""
    if settings.rl_pass_rate is None:
        return tuple(problems)
    low, high = settings.rl_pass_rate
    rates = [(problem, problem.metadata.get("pass_rate")) for problem in problems]
    chosen = tuple(p for p, rate in rates if isinstance(rate, int | float) and low <= rate <= high)
    if not chosen:
        known = sum(isinstance(rate, int | float) for _, rate in rates)
        raise DataError(
            f"no problem has a pass_rate from {low:g} to {high:g} ({known:,} of {len(rates):,} have one)",
            where=settings.rl,
            fix="name the problems.jsonl of `rlcs distill`, or widen data.rl_pass_rate",
        )
    log.info("rl: %d of %d problems by pass rate", len(chosen), len(problems))
    return chosen


def read_source(role: Role, source: str, recipe: Recipe) -> Loaded:
    """One data source; unusable rows are logged, and too many of them raise DataError."""
    settings: Data = recipe.data
    loaded = load(source, settings, decode_limit=recipe.images.decode_limit, role=role)
    require_usable(loaded, settings)
    for row in loaded.bad:
        log.warning("left out of %s: %s", role, row)
    return loaded


def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    return {name: metadata.version(name) for name in ("rlcs", "torch", "transformers")}


def command() -> list[str]:
    """What was typed."""
    return ["rlcs", *sys.argv[1:]]


def run_seeds(recipe: Recipe, folder: Path, count: int, *, output: Output, stop: StopFlag) -> dict[str, Any]:
    """The study with `count` seeds, each in its own folder; the summary averages over them.

    Seeds share the held-out problems, so the interval of a mean is the Wilson interval of that
    mean over the problems once, not over problems times seeds.
    """
    if count == 1:
        return Study(recipe, folder, output=output, stop=stop).run()
    claim(folder, recipe)
    summaries = {}
    for seed in range(recipe.seed, recipe.seed + count):
        own = recipe.model_copy(update={"seed": seed})
        summaries[seed] = Study(own, folder / f"seed-{seed}", output=output, stop=stop).run()
    summary = averaged(recipe, summaries)
    write_json(folder / "summary.json", summary)
    report.build(folder)
    return summary


def averaged(recipe: Recipe, summaries: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds of every arm's accuracy, and each seed's own values."""
    arms = {}
    first = next(iter(summaries.values()))
    for arm in first["arms"]:
        each = [summary["arms"][arm] for summary in summaries.values()]
        accuracy = sum(one["accuracy"] for one in each) / len(each)
        n = each[0]["n"]
        low, high = wilson(round(accuracy * n), n)
        arms[arm] = {"accuracy": accuracy, "low": low, "high": high, "n": n}
    stages = first["seconds"]
    return {
        "name": recipe.name,
        "arms": arms,
        "seconds": {s: sum(x["seconds"][s] for x in summaries.values()) for s in stages},
        "seeds": list(summaries),
        "per_seed": {str(seed): summary["arms"] for seed, summary in summaries.items()},
        "recipe": recipe.model_dump(mode="json"),
        "versions": first["versions"],
        "command": command(),
    }
